"""The index, and the groups of near-duplicates in it."""

from typing import Literal

from pydantic import Field

from index_builder.index.spec import DEFAULT_REFINE
from pipelines.sections.base import AutoCount, AutoEncoding, Section


class Transform(Section):
    """The linear transform that the index applies to every vector."""

    type: Literal["none", "pca"] = Field("none", description="`pca` reduces the dimensions.")
    dim: int = Field(256, ge=1, description="Dimensions that PCA keeps.")
    whitening: Literal["none", "half", "full"] = Field(
        "half",
        description="Scales each component by eigenvalue^-0.25 (`half`), ^-0.5 (`full`) or not.",
    )


class Index(Section):
    """The FAISS index."""

    metric: Literal["cosine", "euclidean", "inner_product"] = Field(
        "cosine",
        description="How vectors are compared: by their angle, by distance, or by the dot product. The "
        "last two are meant for embeddings.normalize: false; of unit vectors all three rank alike.",
    )
    transform: Transform = Transform()
    nlist: AutoCount = Field(
        None,
        description="Inverted lists. `auto` aims at the shortest night, build and join together, and "
        "may choose few lists that are all searched; `kith build --plan` says what, and why. State a "
        "number for an index that is to serve single queries online.",
    )
    nprobe: AutoCount = Field(
        None,
        description="Lists searched for one query; `auto`: all where that makes the shorter night, as "
        "for some ten thousand images, else calibrated for `evaluate.min_recall` on real queries, or "
        "4 sqrt(nlist) where nothing is promised.",
    )
    shards: AutoCount = Field(
        None,
        description="Index shards; `auto` makes them about 256 MB, or smaller where memory is short.",
    )
    encoding: AutoEncoding = Field(
        None,
        description="What of the rows a join looks through: their vectors (`float16`), or codes of a "
        "sixteenth of their size, after which the vectors of the likeliest rows decide (`compressed`). "
        "`auto` takes codes where `evaluate.min_recall` is set, to 0.97 at most, and they are expected "
        "to be faster.",
    )
    refine: int = Field(
        DEFAULT_REFINE,
        ge=1,
        description="Rows that are scored exactly for each neighbour where codes propose them. What "
        "codes miss shows in the recall certificate.",
    )
    training_rows: int = Field(
        500_000, ge=1, description="Vectors in the random sample that the index is trained on."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the sample and of k-means.")
    memory_limit_gib: float = Field(
        8.0,
        gt=0,
        description="What one task may take: training, building or joining one shard. A spec that "
        "would take more is refused before any work.",
    )


class Duplicates(Section):
    """Groups of near-duplicates, found in the index before the join.

    Their columns `group`, `is_representative` and `group_size` can be named by rules and exports.
    """

    threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Two images with at least this score (of `index.metric`) are in one group, and so "
        "are those that others link; `null` looks for none.",
    )
    nprobe: AutoCount = Field(
        None,
        description="Two images are compared when the list of one is among so many nearest lists of "
        "the other; `auto`: all that the index keeps, `index.nprobe`.",
    )
