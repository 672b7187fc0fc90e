"""The encoder, and the embeddings that it makes."""

from typing import Literal

from pydantic import Field

from pipelines.sections.base import AutoCount, Section
from transforms.encoders.engines.choice import EngineName, Precision
from transforms.encoders.family import Pooling
from transforms.preprocessing import Interpolation, Resize


class Encoder(Section):
    """The network that turns an image into a vector, and the pixels it gets to see."""

    name: str = Field("efficientnet_lite0", description="One of the registered encoders, or `custom`.")
    weights: str = Field(
        "imagenet",
        description="`imagenet`, `random`, or a path: a `.weights.h5` file of the named network; "
        "for `custom` a `.keras` file or a SavedModel folder.",
    )
    pooling: Pooling = Field(
        "avg",
        description="How the last feature map becomes a vector: `avg`, `max`, `gem` (their generalised "
        "mean, power 3) or `flatten`.",
    )
    engine: Literal["auto"] | EngineName = Field(
        "auto",
        description="What runs the network: `tensorflow` everywhere, `openvino` on CPUs, `jax` on "
        "GPUs. `auto` keeps the engine of the published snapshot; before the first one a worker says "
        "which is the fastest that it has.",
    )
    precision: Precision = Field(
        "float32",
        description="`bfloat16` is about twice as fast where the hardware has it; the vectors differ "
        "a little, retrieval stays within noise.",
    )
    input_size: tuple[int, int] | None = Field(
        None, description="[height, width]; by default the network's own."
    )
    preprocessing: str | None = Field(
        None,
        description="Only for `custom`: `none`, `tf`, `torch`, `caffe`, or the name of an encoder "
        "whose normalisation the model expects.",
    )
    resize: Resize = Field(
        "crop",
        description="`crop` keeps the centre with the input's proportions, `pad` keeps the whole "
        "image on white, `stretch` ignores proportions.",
    )
    interpolation: Interpolation = Field("bicubic", description="Pillow's filter for resizing.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of `random` weights.")
    batch_size: int = Field(32, ge=1, le=4096, description="Images in one call of the network.")
    decode_threads: AutoCount = Field(
        None, description="Threads that decode ahead of the network; `auto` takes all cores."
    )


class Embeddings(Section):
    """The embeddings dataset."""

    reuse: bool = Field(
        True,
        description="Take over parts of the published snapshot whose input shard, encoder and "
        "settings are unchanged, and vectors of pictures whose bytes are, instead of encoding them "
        "again.",
    )
    normalize: bool = Field(
        True,
        description="`true`: vectors of unit length in float16. `false`: the encoder's own numbers in "
        "float32, where lengths count (index.metric). It is part of the encoder's fingerprint.",
    )
    max_failed_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="A run in which a larger part of all images fails is not published.",
    )
    max_failed_fraction_per_shard: float = Field(
        1.0, ge=0, le=1, description="The same for each input shard alone."
    )
    resource_hints: dict[str, str] = Field(
        default_factory=dict,
        description="Beam's resource hints for the workers that embed, such as `accelerator` and "
        "`min_ram` (docs/gpu.md).",
    )
