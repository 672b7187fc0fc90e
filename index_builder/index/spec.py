"""What index to build: the request, and the request resolved for a catalogue of a given size."""

import dataclasses
import math
from typing import Any

from index_builder.errors import ConfigError
from index_builder.index.goals import Encoding, Goal, Method, TransformSpec, require_least
from index_builder.index.memory import join_row_bytes, readable_memory
from index_builder.index.method_cost import (
    LEAST_GAIN,
    LEAST_GAIN_OF_LISTS,
    Night,
    codes_cost,
    probed_rows,
    vectors_cost,
)
from index_builder.index.product_quantizer import code_bytes
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import multiplies_bfloat16

# FAISS warns below 39 training points a centroid (faiss/Clustering.h: min_points_per_centroid) and
# takes 256 at most. With 128 and 256 recall was the same within its error (200,000 x 256, 1,024 lists).
MIN_POINTS_PER_CENTROID = 39
MAX_POINTS_PER_CENTROID = 128
# What k-means keeps of a row beside its vector: norms, the nearest centroid, the order of clusters.
_KMEANS_ROW_BYTES = 120

# An index shard is about this large (or less, where memory is short), a tenth of it a unit of work.
_SHARD_BYTES = 256 << 20
# A shard and the task that joins it take at most this share of the memory limit.
_SHARD_MEMORY_SHARE = 0.5

# Codes of an assigned part that are sorted together, and their share of the memory limit.
_RUN_BYTES = 128 << 20
_RUN_MEMORY_SHARE = 1 / 8

# Proposals by codes for each neighbour: 99 % of those that vectors find (docs/concepts.md).
DEFAULT_REFINE = 10
# What codes miss at that is too much for a promise above this, and of shorter vectors for any: 6 % of
# 64 numbers, 2 % of 128, 1 % of 256 were measured.
_MOST_RECALL_BY_CODES = 0.97
_LEAST_DIM_OF_CODES = 128

# Where every list is searched there are so many at most.
_EXACT_LISTS = 64
# nprobe before calibration, in square roots of nlist, by the recall that is asked for.
_NPROBE_FACTORS = ((0.9, 2.0), (0.97, 4.0), (0.99, 6.0), (1.0, 8.0))
_UNSTATED_NPROBE_FACTOR = 4.0
# The share of that which calibration chooses: a tenth to a half was measured on made sets.
_CALIBRATED_SHARE = 0.25
# The probed lists hold at least this many rows for each neighbour wanted.
_PROBED_ROWS_PER_NEIGHBOR = 10


@dataclasses.dataclass(frozen=True)
class IndexSpec:
    """What the user asks for; None means that Kith chooses.

    `nlist` inverted lists, `nprobe` of them searched for a query, `shards` index shards, trained on
    a random sample of at most `training_rows` vectors, all randomness from `seed`. Where `encoding` is
    compressed, `refine` rows are scored for each neighbour that is wanted. Raises ValueError.
    """

    metric: Metric = Metric.COSINE
    transform: TransformSpec = TransformSpec()  # noqa: RUF009 (frozen)
    nlist: int | None = None
    nprobe: int | None = None
    shards: int | None = None
    training_rows: int = 500_000
    seed: int = 0
    encoding: Encoding | None = None
    refine: int = DEFAULT_REFINE

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            raise ValueError(
                f"IndexSpec.metric is {self.metric!r}, wanted a Metric. Give Metric({self.metric!r})."
            )
        for name in ("nlist", "nprobe", "shards", "training_rows"):
            require_least(self, name, 1)
        require_least(self, "seed", 0)

    def resolve(self, rows: int, encoder_dim: int, goal: Goal | None = None) -> "ResolvedSpec":
        """Chooses what was left open for a catalogue of `rows` vectors of `encoder_dim` numbers.

        - Method: exact, unless list-major is expected to be 1.1 times as fast from vectors to
          neighbours: training, choosing nprobe and the join with itself (see `method_cost`). That
          depends on N, d, k, the recall that is asked for and, for some tens of thousands of vectors,
          on whether the host multiplies in bfloat16. A given nprobe decides it instead.
        - nlist: about the square root of 16 N, as FAISS's guidelines advise, but never so many that a
          list has fewer than 39 training points; at most 64 where every list is searched.
        - nprobe: all lists if exact, else 2 to 8 times the square root of nlist, by the recall that
          is asked for (4 times where none is), and so many that the probed lists hold ten rows for
          each neighbour. Calibration starts from here.
        - Encoding: float16, unless a recall is asked for that codes can keep (up to 0.97, of vectors of
          128 numbers or more) and they are expected to be 1.2 times as fast. Where they are with the
          nprobe that calibration starts from, that is decided afterwards.
        - Shards: of about 256 MB of codes, or smaller, so that joining one takes at most half of the
          memory limit.

        Raises ConfigError for a combination that cannot be built.
        """
        goal = Goal() if goal is None else goal
        if rows < 1:
            raise ConfigError("The index would be empty: there are 0 embeddings. Embed images first.")
        if self.refine < 1:
            raise ConfigError(
                f"index.refine is {self.refine}, wanted at least 1: the rows that are scored for each "
                f"neighbour. Set index.refine: {DEFAULT_REFINE} or another number from 1."
            )
        sample = min(rows, self.training_rows)
        dim = encoder_dim if self.transform.kind == "none" else self.transform.dim
        if dim > encoder_dim:
            raise ConfigError(
                f"index.transform.dim is {dim}, but the embeddings have dim {encoder_dim}. "
                f"Set index.transform.dim to at most {encoder_dim}, or index.transform.type: none."
            )
        every, why_method = self._choose_every(rows, dim, sample, goal)
        nlist, why_nlist = self._choose_nlist(rows, sample, every)
        nprobe, why_nprobe = self._choose_nprobe(rows, nlist, goal, every)
        method, codes, why_encoding = self._choose_encoding(rows, dim, nlist, nprobe, goal)
        shards, why_shards = self.choose_shards(rows, dim, nprobe, goal, codes)
        reasons = (
            _why_method(method, rows, why_method),
            why_nlist,
            why_nprobe,
            why_encoding,
            why_shards,
        )
        return ResolvedSpec(
            self, rows, encoder_dim, nlist, nprobe, min(shards, rows), sample, method, goal, reasons,
            codes,
        )  # fmt: skip

    def _choose_every(self, rows: int, dim: int, sample: int, goal: Goal) -> tuple[bool, str]:
        """Returns whether every list is searched, and why; the host is asked where it decides."""
        if self.nprobe is not None:
            return False, "follows from index.nlist and index.nprobe as configured"
        gains = [self._gain_of_lists(rows, dim, sample, goal, rounded) for rounded in (False, True)]
        decisions = {gain >= LEAST_GAIN_OF_LISTS for gain in gains}
        gain = gains[multiplies_bfloat16()] if len(decisions) > 1 else min(gains)
        compared = f"{rows} vectors are compared"
        if gain >= LEAST_GAIN_OF_LISTS:
            return False, f"{compared} where lists are near, {gain:.1f} times as fast as all with all"
        return True, f"{compared} all with all, near lists would be {gain:.2f} times as fast"

    def _gain_of_lists(self, rows: int, dim: int, sample: int, goal: Goal, bfloat16: bool) -> float:
        """Returns how many times as fast a night is expected to be where some lists are searched."""
        proposals = self.refine * goal.k if self.encoding is Encoding.COMPRESSED else None
        night = Night(rows, dim, goal.k, bfloat16, proposals)

        def cost(every: bool) -> float:
            nlist, _ = self._choose_nlist(rows, sample, every)
            nprobe, _ = self._choose_nprobe(rows, nlist, goal, every)
            calibrated = goal.min_recall > 0 and nprobe < nlist
            if calibrated:
                nprobe = math.ceil(nprobe * _CALIBRATED_SHARE)
            clustered = min(sample, nlist * MAX_POINTS_PER_CENTROID)
            return night.cost(clustered, nlist, nprobe, calibrated=calibrated)

        return cost(True) / cost(False)

    def _choose_nlist(self, rows: int, sample: int, every: bool) -> tuple[int, str]:
        if self.nlist is not None:
            if self.nlist > sample:
                raise ConfigError(
                    f"index.nlist is {self.nlist}, but only {sample} vectors are there to train on "
                    f"({rows} embeddings, index.training_rows {self.training_rows}). "
                    f"Set index.nlist: auto or at most {sample}."
                )
            return self.nlist, f"nlist {self.nlist}: as configured"
        most = max(1, sample // MIN_POINTS_PER_CENTROID)
        root = round(4 * math.sqrt(rows))
        if every and min(root, most) > _EXACT_LISTS:
            return _EXACT_LISTS, f"nlist {_EXACT_LISTS}: all are searched, so more lists save nothing"
        if most < root:
            return most, (
                f"nlist {most}: {MIN_POINTS_PER_CENTROID} of {sample} sampled vectors a list "
                f"(4 sqrt(N) would be {root})"
            )
        return root, f"nlist {root}: 4 sqrt(N), {rows / root:.0f} rows a list"

    def _choose_nprobe(self, rows: int, nlist: int, goal: Goal, every: bool) -> tuple[int, str]:
        if self.nprobe is not None:
            if self.nprobe > nlist:
                raise ConfigError(
                    f"index.nprobe is {self.nprobe}, but the index has {nlist} lists. "
                    f"Set index.nprobe: auto or at most {nlist}."
                )
            return self.nprobe, f"nprobe {self.nprobe}: as configured"
        if every:
            return nlist, f"nprobe {nlist}: all lists"
        factor, target = _UNSTATED_NPROBE_FACTOR, "no evaluate.min_recall is set"
        if goal.min_recall > 0:
            factor = next(f for recall, f in _NPROBE_FACTORS if goal.min_recall <= recall)
            target = f"evaluate.min_recall {goal.min_recall:g}"
        wanted = math.ceil(factor * math.sqrt(nlist))
        for_k = math.ceil(_PROBED_ROWS_PER_NEIGHBOR * goal.k * nlist / rows)
        nprobe = min(nlist, max(wanted, for_k))
        if for_k > wanted:
            return nprobe, f"nprobe {nprobe}: {_PROBED_ROWS_PER_NEIGHBOR} rows a neighbour, k {goal.k}"
        return nprobe, f"nprobe {nprobe}: {factor:g} sqrt(nlist), {target}"

    def _choose_encoding(
        self, rows: int, dim: int, nlist: int, nprobe: int, goal: Goal
    ) -> tuple[Method, bool, str]:
        """Returns the method, whether codes may be used (calibration may decide), and why."""
        by_vectors = Method.EXACT if nprobe == nlist else Method.LIST_MAJOR
        plain = f"encoding float16: {2 * dim} bytes a vector"
        size = f"codes of {code_bytes(dim)} bytes propose {self.refine} rows a neighbour"
        coded = f"encoding compressed: {size}"
        if self.encoding is Encoding.COMPRESSED:
            return Method.COMPRESSED, True, f"{coded}, as configured"
        if self.encoding is Encoding.FLOAT16:
            return by_vectors, False, f"{plain}, as configured"
        promised = 0 < goal.min_recall <= _MOST_RECALL_BY_CODES
        if by_vectors is Method.EXACT or not promised or dim < _LEAST_DIM_OF_CODES:
            return by_vectors, False, f"{plain}, scores are exact"
        # Before calibration that is for many lists: with fewer, codes gain less.
        gain = self.gain_of_codes(rows, dim, nlist, nprobe, nprobe, goal.k)
        if gain < LEAST_GAIN:
            return by_vectors, False, f"{plain}, codes would be {gain:.2f} times as fast"
        if self.nprobe is None:
            return by_vectors, True, f"{plain}, unless codes are faster with the nprobe of calibration"
        return Method.COMPRESSED, True, f"{coded}, {gain:.1f} times as fast as float16"

    def gain_of_codes(
        self, rows: int, dim: int, nlist: int, nprobe: int, nprobe_of_codes: int, k: int
    ) -> float:
        """Returns how many times as fast a join is expected to be by codes, on hosts like this one.

        `nprobe` is what it takes by vectors; by codes it may take more, for they miss some themselves.
        """
        probed = probed_rows(rows, nlist, nprobe)
        by_vectors = vectors_cost(probed, dim, k, nprobe, multiplies_bfloat16())
        probed = probed_rows(rows, nlist, nprobe_of_codes)
        return by_vectors / codes_cost(probed, dim, self.refine * k, nprobe_of_codes)

    def choose_shards(
        self, rows: int, dim: int, nprobe: int, goal: Goal, codes: bool
    ) -> tuple[int, str]:
        """Returns the number of shards, and why; `codes`: rows have codes, too."""
        if self.shards is not None:
            return self.shards, f"shards {self.shards}: as configured"
        by_size = math.ceil(rows * dim * 2 / _SHARD_BYTES)
        allowed = goal.memory_limit_bytes * _SHARD_MEMORY_SHARE
        refine = self.refine if codes else None
        by_memory = math.ceil(rows * join_row_bytes(dim, nprobe, goal.k, refine) / allowed)
        shards = max(1, by_size, by_memory)
        size = f"{rows * dim * 2 / shards / 2**20:.1f} MiB of codes each"
        if by_memory > max(1, by_size):
            share = f"joining one takes {_SHARD_MEMORY_SHARE:.0%} of index.memory_limit_gib"
            return shards, f"shards {shards}: {size}, {share}"
        return shards, f"shards {shards}: {size}, at most {_SHARD_BYTES >> 20}"

    def fingerprint_value(self) -> dict[str, Any]:
        """Returns the request as plain JSON values, for fingerprints and manifests."""
        value = dataclasses.asdict(self)
        value["metric"] = self.metric.value
        value["encoding"] = None if self.encoding is None else self.encoding.value
        return value


@dataclasses.dataclass(frozen=True)
class ResolvedSpec:
    """An IndexSpec with every choice made, for `rows` vectors of `encoder_dim` numbers.

    `may_have_codes`: rows have codes, or get them if calibration finds that they are faster.
    """

    request: IndexSpec
    rows: int
    encoder_dim: int
    nlist: int
    nprobe: int
    shards: int
    sample: int
    method: Method = Method.LIST_MAJOR
    goal: Goal = Goal()  # noqa: RUF009 (frozen)
    reasons: tuple[str, ...] = ()
    may_have_codes: bool = False

    @property
    def dim(self) -> int:
        """The numbers of an indexed vector, at most (PCA may find fewer)."""
        transform = self.request.transform
        return self.encoder_dim if transform.kind == "none" else transform.dim

    @property
    def encoding(self) -> Encoding:
        """What of a row is looked at first."""
        return Encoding.COMPRESSED if self.has_codes else Encoding.FLOAT16

    @property
    def has_codes(self) -> bool:
        """Whether rows have codes beside their vectors."""
        return self.method is Method.COMPRESSED

    @property
    def refine(self) -> int | None:
        """How many proposals by codes are scored for each neighbour; None where all rows are."""
        return self.request.refine if self.has_codes else None

    @property
    def run_bytes(self) -> int:
        """Codes that are sorted together while a part is assigned; it decides no bytes.

        They are fewer where the probes beside them would take more than the run's share of memory.
        """
        share = self.goal.memory_limit_bytes * _RUN_MEMORY_SHARE
        of_codes = 2 * self.dim / (2 * self.dim + 4 * self.nprobe)
        return min(_RUN_BYTES, max(1, int(2 * share * of_codes)), max(1, int(share)))

    def settled(self, nprobe: int, refine: int | None) -> "ResolvedSpec":
        """Returns the spec with the nprobe and refine that were settled on after it was resolved.

        Where shards were left open and more is searched than was expected, there are as many as that
        takes; never fewer than before.
        """
        request = self.request if refine is None else dataclasses.replace(self.request, refine=refine)
        shards, _ = request.choose_shards(self.rows, self.dim, nprobe, self.goal, refine is not None)
        return dataclasses.replace(
            self,
            request=request,
            nprobe=nprobe,
            shards=min(max(self.shards, shards), self.rows),
            may_have_codes=refine is not None,
        )

    def choices(self) -> dict[str, Any]:
        """Returns what was chosen, as plain JSON values, for fingerprints and manifests."""
        return {
            "method": self.method.value,
            "encoding": self.encoding.value,
            "refine": self.refine,
            "nlist": self.nlist,
            "nprobe": self.nprobe,
            "shards": self.shards,
        }

    @property
    def training_bytes(self) -> int:
        """Memory that training takes.

        The sample, with the transformed float16 vectors that k-means looks at, its centroids with a
        block of their sums, and before that the covariance in float64 with what its eigenvectors take.
        """
        clustered = min(self.sample, self.nlist * MAX_POINTS_PER_CENTROID)
        kmeans = clustered * self._clustered_row_bytes + self._centroid_bytes
        return self.sample * self._sample_row_bytes + max(kmeans, self.covariance_bytes)

    @property
    def _sample_row_bytes(self) -> int:
        return self.encoder_dim * (4 if self.request.metric.is_scaled else 2)

    @property
    def _clustered_row_bytes(self) -> int:
        return 2 * self.dim + _KMEANS_ROW_BYTES

    @property
    def _centroid_bytes(self) -> int:
        return 4 * self.nlist * self.dim * 2

    def training_rows_within(self, limit_bytes: int) -> int:
        """Returns how many rows of a sample training can take in so much memory, at least one."""
        row = self._sample_row_bytes
        with_kmeans = (limit_bytes - self._centroid_bytes) // (row + self._clustered_row_bytes)
        return max(1, min(with_kmeans, (limit_bytes - self.covariance_bytes) // row))

    @property
    def covariance_bytes(self) -> int:
        """Memory that learning the transform takes beside the sample."""
        return 0 if self.request.transform.kind == "none" else 4 * self.encoder_dim**2 * 8


def _why_method(method: Method, rows: int, why: str) -> str:
    if method is Method.COMPRESSED:
        return f"method compressed: {rows} vectors are looked through by codes, then by vectors"
    return f"method {method.value}: {why}"


def check_training_memory(spec: ResolvedSpec, limit_bytes: int) -> None:
    """Raises ConfigError when training would take more memory than the limit, before any work."""
    if spec.training_bytes <= limit_bytes:
        return
    rows = spec.training_rows_within(limit_bytes)
    remedy = f"Lower index.training_rows to about {rows}, choose"
    if spec.covariance_bytes >= limit_bytes:
        covariance = readable_memory(spec.covariance_bytes)
        remedy = (
            f"The covariance of {spec.encoder_dim} numbers alone takes {covariance}: set "
            "index.transform.type: none, choose"
        )
    raise ConfigError(
        f"Training the index would take {readable_memory(spec.training_bytes)} "
        f"({spec.sample} vectors of {spec.encoder_dim} numbers, transform "
        f"{spec.request.transform.kind}), index.memory_limit_gib allows "
        f"{readable_memory(limit_bytes)}. {remedy} a pooling with fewer dimensions, or raise the limit."
    )
