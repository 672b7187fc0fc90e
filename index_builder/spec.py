"""What index to build: the request, and the request resolved for a catalogue of a given size."""

import dataclasses
import enum
import math
from typing import Any

from index_builder.errors import ConfigError

# FAISS warns below 39 training points a centroid and gains little above 256
# (faiss/Clustering.h: min_points_per_centroid, max_points_per_centroid).
MIN_POINTS_PER_CENTROID = 39
MAX_POINTS_PER_CENTROID = 256

_SHARD_BYTES = 256 << 20
_EXACT_ROWS = 20_000


class Metric(enum.Enum):
    """How two vectors are compared. Higher scores are better for every metric."""

    COSINE = "cosine"


@dataclasses.dataclass(frozen=True)
class TransformSpec:
    """The index's linear transform: `none`, or `pca` to `dim` dimensions.

    `eigen_power` scales each component by its eigenvalue to that power before normalising, in the
    terms of FAISS's PCAMatrix: 0 keeps the plain PCA, -0.25 whitens by half, -0.5 in full.
    """

    kind: str = "none"
    dim: int = 256
    eigen_power: float = -0.25


@dataclasses.dataclass(frozen=True)
class IndexSpec:
    """What the user asks for; None means that Kith chooses.

    `nlist` inverted lists, `nprobe` of them searched for a query, `shards` index shards, trained on
    a random sample of at most `training_rows` vectors, all randomness from `seed`.
    """

    metric: Metric = Metric.COSINE
    transform: TransformSpec = TransformSpec()
    nlist: int | None = None
    nprobe: int | None = None
    shards: int | None = None
    training_rows: int = 500_000
    seed: int = 0

    def resolve(self, rows: int, encoder_dim: int) -> "ResolvedSpec":
        """Chooses what was left open for a catalogue of `rows` vectors of `encoder_dim` numbers.

        nlist: about the square root of 16 N as FAISS's guidelines advise, but never so many that a
        list has fewer than 39 training points. nprobe: every list of an index of at most 20,000
        vectors, where exact search costs next to nothing, otherwise 4 sqrt(nlist).
        Raises ConfigError for a combination that cannot be built.
        """
        if rows < 1:
            raise ConfigError("The index would be empty: there are 0 embeddings. Embed images first.")
        sample = min(rows, self.training_rows)
        most = max(1, sample // MIN_POINTS_PER_CENTROID)
        nlist = min(round(4 * math.sqrt(rows)), most) if self.nlist is None else self.nlist
        if nlist > sample:
            raise ConfigError(
                f"index.nlist is {nlist}, but only {sample} vectors are there to train on "
                f"({rows} embeddings, index.training_rows {self.training_rows}). "
                f"Set index.nlist: auto or at most {sample}."
            )
        nprobe = _auto_nprobe(rows, nlist) if self.nprobe is None else self.nprobe
        if nprobe > nlist:
            raise ConfigError(
                f"index.nprobe is {nprobe}, but the index has {nlist} lists. "
                f"Set index.nprobe: auto or at most {nlist}."
            )
        dim = encoder_dim if self.transform.kind == "none" else self.transform.dim
        if dim > encoder_dim:
            raise ConfigError(
                f"index.transform.dim is {dim}, but the embeddings have dim {encoder_dim}. "
                f"Set index.transform.dim to at most {encoder_dim}, or index.transform.type: none."
            )
        total = rows * dim * 2
        shards = max(1, math.ceil(total / _SHARD_BYTES)) if self.shards is None else self.shards
        return ResolvedSpec(self, rows, encoder_dim, nlist, nprobe, min(shards, rows), sample)

    def fingerprint_value(self) -> dict[str, Any]:
        """Returns the request as plain JSON values, for fingerprints and manifests."""
        value = dataclasses.asdict(self)
        value["metric"] = self.metric.value
        return value


@dataclasses.dataclass(frozen=True)
class ResolvedSpec:
    """An IndexSpec with every choice made, for `rows` vectors of `encoder_dim` numbers."""

    request: IndexSpec
    rows: int
    encoder_dim: int
    nlist: int
    nprobe: int
    shards: int
    sample: int

    @property
    def training_bytes(self) -> int:
        """Memory that training takes: the sample in float64, its covariance, and the k-means copy."""
        covariance = 0 if self.request.transform.kind == "none" else 3 * self.encoder_dim**2 * 8
        return self.sample * self.encoder_dim * (8 + 4) + covariance


def _auto_nprobe(rows: int, nlist: int) -> int:
    return nlist if rows <= _EXACT_ROWS else min(nlist, math.ceil(4 * math.sqrt(nlist)))


def check_training_memory(spec: ResolvedSpec, limit_bytes: int) -> None:
    """Raises ConfigError when training would take more memory than the limit, before any work."""
    if spec.training_bytes > limit_bytes:
        rows = max(1, limit_bytes // (spec.encoder_dim * 12))
        raise ConfigError(
            f"Training the index would take {spec.training_bytes / 2**30:.1f} GiB "
            f"({spec.sample} vectors of {spec.encoder_dim} numbers, transform "
            f"{spec.request.transform.kind}), index.memory_limit_gib allows "
            f"{limit_bytes / 2**30:.1f}. Lower index.training_rows to about {rows}, choose a "
            "pooling with fewer dimensions, or raise the limit."
        )
