"""What an encoder is before it is loaded, and what a family of encoders has to say of itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Pooling = Literal["avg", "max", "gem", "flatten"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder, by name, as the configuration states it.

    `weights` is `imagenet`, `random` (drawn from `seed`) or a local path; `pooling` turns the last
    feature map into a vector; `input_size` is (height, width), None for the family's own;
    `preprocessing` names the normalisation of a `custom` model and is None for all others.
    """

    name: str
    weights: str = "imagenet"
    pooling: str = "avg"
    seed: int = 0
    input_size: tuple[int, int] | None = None
    preprocessing: str | None = None

    def weights_path(self) -> Path | None:
        """The local file or folder that `weights` names, or None for a keyword."""
        return None if self.weights in ("imagenet", "random") else Path(self.weights).expanduser()


@dataclass(frozen=True, eq=False)
class Network:
    """A loaded network without its top.

    `features` maps normalised images, a float32 tensor [b, h, w, 3], to a feature map
    [b, h', w', c] or to vectors [b, dim]; `normalise` maps raw 0..255 images to its input.
    `freeze` says that its variables can be folded into the graph as constants; `variables` are
    those of the Keras model, none for a model that is no Keras model.
    """

    input_size: tuple[int, int]
    normalise: Callable[[Any], Any]
    features: Callable[[Any], Any]
    freeze: bool = True
    variables: Sequence[Any] = ()


@dataclass(frozen=True)
class EncoderFamily:
    """How the encoders of one family are checked, identified and loaded.

    `check` raises ConfigError and imports no TensorFlow; `input_size` is (height, width) and may
    open the model; `preprocessing_id` names the normalisation; `weights_id` names the weights in
    fingerprints without TensorFlow; `load` builds the network.
    """

    name: str
    check: Callable[[EncoderSpec], None]
    input_size: Callable[[EncoderSpec], tuple[int, int]]
    preprocessing_id: Callable[[EncoderSpec], str]
    weights_id: Callable[[EncoderSpec], str]
    load: Callable[[EncoderSpec], Network]
