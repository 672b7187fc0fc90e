"""The encoders that Kith knows, by name.

A new family is one module that defines an `EncoderFamily`, and one line in `_FAMILIES`.
"""

from index_builder.errors import ConfigError
from transforms.encoders import custom, efficientnet_lite0, keras_applications
from transforms.encoders.encoder import Encoder
from transforms.encoders.family import POOLINGS, EncoderFamily, EncoderSpec
from transforms.preprocessing import Preprocessing

__all__ = [
    "Encoder",
    "EncoderFamily",
    "EncoderSpec",
    "check_encoder",
    "encoder_fingerprint",
    "encoder_names",
    "load_encoder",
    "resolve_input_size",
]

_FAMILIES: dict[str, EncoderFamily] = {
    family.name: family
    for family in (
        efficientnet_lite0.FAMILY,
        *keras_applications.FAMILIES,
        custom.FAMILY,
    )
}

ENGINE = "tensorflow"
PRECISION = "float32"


def encoder_names() -> list[str]:
    """The names that `EncoderSpec.name` may take, in the order of the table."""
    return list(_FAMILIES)


def check_encoder(spec: EncoderSpec) -> None:
    """Refuses, before any work and without TensorFlow, a spec that cannot be loaded.

    Raises:
        ConfigError: the name, pooling, weights, input size or preprocessing is impossible.
    """
    if spec.name not in _FAMILIES:
        raise ConfigError(
            f"encoder.name is {spec.name!r}, which is no encoder. Set one of: {', '.join(_FAMILIES)}."
        )
    if spec.pooling not in POOLINGS:
        raise ConfigError(f"encoder.pooling is {spec.pooling!r}. Set one of: {', '.join(POOLINGS)}.")
    if not 0 <= spec.seed < 2**32:
        raise ConfigError(f"encoder.seed is {spec.seed}. Set a whole number from 0 to {2**32 - 1}.")
    _FAMILIES[spec.name].check(spec)


def resolve_input_size(spec: EncoderSpec) -> tuple[int, int]:
    """The (height, width) that the encoder will take, for `Preprocessing.input_size`.

    Needs TensorFlow only for a SavedModel whose size the configuration does not state.

    Raises:
        ConfigError: the model does not fix its input size and the spec does not state one.
    """
    check_encoder(spec)
    return _FAMILIES[spec.name].input_size(spec)


def encoder_fingerprint(spec: EncoderSpec, preprocessing: Preprocessing) -> dict[str, object]:
    """What decides whether two vectors are comparable: JSON-able, and made without TensorFlow.

    Weights files are identified by content, never by path.
    """
    check_encoder(spec)
    family = _FAMILIES[spec.name]
    return {
        "encoder": spec.name,
        "weights": family.weights_id(spec),
        "pooling": spec.pooling,
        "normalisation": family.preprocessing_id(spec),
        "engine": ENGINE,
        "precision": PRECISION,
        **preprocessing.fingerprint(),
    }


def load_encoder(spec: EncoderSpec, batch_size: int) -> Encoder:
    """Loads the network and compiles it for batches of `batch_size` images.

    Raises:
        ConfigError: the spec is impossible (see `check_encoder`).
        KithError: the weights cannot be had, or are not those that the network expects.
    """
    check_encoder(spec)
    return Encoder(_FAMILIES[spec.name].load(spec), spec.pooling, batch_size)
