"""The encoders that Kith knows, by name.

A new family is one module that defines an `EncoderFamily`, and one line in `_FAMILIES`.
"""

from index_builder.errors import ConfigError
from transforms.encoders import custom, efficientnet_lite0, keras_applications
from transforms.encoders.encoder import Encoder
from transforms.encoders.engines.choice import (
    DEFAULT_CHOICE,
    EngineChoice,
    EngineName,
    Precision,
    auto_engine,
    require_engine,
)
from transforms.encoders.engines.engine import UnsupportedModelError
from transforms.encoders.engines.loading import engine_loader
from transforms.encoders.family import POOLINGS, EncoderFamily, EncoderSpec
from transforms.encoders.keras_runtime import require_backend

__all__ = [
    "Encoder",
    "EncoderFamily",
    "EncoderSpec",
    "check_encoder",
    "choose_engine",
    "encoder_names",
    "load_encoder",
    "network_fingerprint",
    "resolve_input_size",
]

_FAMILIES: dict[str, EncoderFamily] = {
    family.name: family
    for family in (
        efficientnet_lite0.FAMILY,
        efficientnet_lite0.PYTORCH_FAMILY,
        *keras_applications.FAMILIES,
        custom.FAMILY,
    )
}


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


def network_fingerprint(spec: EncoderSpec) -> dict[str, object]:
    """What identifies the network and its weights: JSON-able, and made without TensorFlow.

    Weights files are identified by content, never by path.
    """
    check_encoder(spec)
    family = _FAMILIES[spec.name]
    return {
        "encoder": spec.name,
        "weights": family.weights_id(spec),
        "pooling": spec.pooling,
        "normalisation": family.preprocessing_id(spec),
    }


def load_encoder(spec: EncoderSpec, batch_size: int, choice: EngineChoice = DEFAULT_CHOICE) -> Encoder:
    """Loads the network and compiles it for batches of `batch_size` images.

    Raises:
        ConfigError: the spec is impossible (see `check_encoder`).
        KithError: this machine cannot honour the choice, the engine cannot run the model, the
            weights cannot be had, or are not those that the network expects.
    """
    check_encoder(spec)
    require_engine(choice)
    require_backend("jax" if choice.engine == "jax" else "tensorflow")
    family, load_engine = _FAMILIES[spec.name], engine_loader(choice)
    return Encoder(
        lambda size: load_engine(lambda: family.load(spec), spec.pooling, size, choice),
        family.input_size(spec),
        batch_size,
    )


def choose_engine(spec: EncoderSpec, precision: Precision) -> tuple[EngineName, str]:
    """Chooses an engine for an encoder on the machine that this runs on, and says why.

    A model of the user's own is compiled for it, for not every engine runs every model.
    """
    engine, why = auto_engine()
    if spec.name == custom.NAME and engine == "openvino":
        try:
            load_encoder(spec, 1, EngineChoice(engine, precision))
        except UnsupportedModelError:
            return auto_engine(refused=(engine,))
    return engine, why
