"""What a build and a join will take: bytes on disk, memory of a task, time on a measured host.

Memory is what a step adds to the process that it runs in; time is that of one host which does all
tasks. The models are sums of what the steps hold and do; their few constants were fitted to measured
runs (docs/operations.md says how near they come).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, storage
from index_builder.datasets.in_order import MOST_READERS, readers
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import ConfigError, DatasetError
from index_builder.index import assigned_parts, product_quantizer
from index_builder.index.kmeans import BLOCK_CLUSTERS
from index_builder.index.memory import join_row_bytes, readable_memory
from index_builder.index.method_cost import codes_over_pairs, probed_rows
from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.index.spec import MAX_POINTS_PER_CENTROID, ResolvedSpec, check_training_memory
from index_builder.index.training import KMEANS_ITERATIONS
from index_builder.scoring.products import multiplies_bfloat16
from index_builder.scoring.query_ranges import count_probes
from index_builder.search.join import probed_shards
from index_builder.steps.host_speed import HostSpeed, JoinSpeed

_BLOCK_ROWS = 4096
# What any step takes beside its data: compiled code, buffers of Arrow, the heaps of allocators.
_STEP_BYTES = 8 << 20
# Copies of a row group, as `group` below counts it, while batches of it are looked at (seen).
_CHECKED_GROUPS = 4
# The same for each of several threads that look at groups.
_READ_GROUPS = 2
# Tiles of fast scores.
_TILE_BYTES = 8 << 20
# A pair that is compared in the exact search of calibration: selecting it, and its score (seen).
_COMPARED_SECONDS = 7e-9
_COMPARED_BYTES = 10
# Starting a pipeline and its tasks, which small catalogues are made of.
_STAGE_SECONDS = 0.8
_SHARD_SECONDS = 0.05
# Bytes and seconds of one neighbour of one row, from the heap to the compressed Parquet file.
_NEIGHBOR_BYTES = 16
_NEIGHBOR_SECONDS = 4e-7
# Seconds of one core for each number that k-means adds to its centroid.
_ADDED_SECONDS = 6e-10
# Seconds of one core for each number of a vector that gets a code.
_ENCODED_SECONDS = 1e-8


@dataclasses.dataclass(frozen=True)
class Source:
    """The embeddings of a plan: what its manifest and one of its row groups tell.

    `kept_row_bytes` is the memory of the columns that the index keeps of a row, without the vector.
    """

    rows: int
    dim: int
    number_bytes: int
    part_rows: int
    group_rows: int
    kept_row_bytes: float
    file_bytes: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: the memory it adds to its process, and its time on one host."""

    name: str
    memory_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a stage will take.

    `disk_bytes` by what they are for, `steps` in order, `figures` more to show (plain JSON values).
    """

    stage: str
    reasons: tuple[str, ...]
    disk_bytes: dict[str, int]
    steps: tuple[Step, ...]
    figures: dict[str, Any]

    @property
    def memory_bytes(self) -> int:
        """Memory that the stage adds to its process: that of its largest step."""
        return max(step.memory_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time of all steps on one host."""
        return sum(step.seconds for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values."""
        return {
            "stage": self.stage,
            "reasons": list(self.reasons),
            "disk_bytes": self.disk_bytes,
            "steps": [
                {
                    "name": step.name,
                    "memory_bytes": step.memory_bytes,
                    "seconds": round(step.seconds, 3),
                }
                for step in self.steps
            ],
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 3),
            **self.figures,
        }


def describe_source(folder: str, manifest: Manifest) -> Source:
    """Looks at an embeddings dataset: its manifest, and the first row group of its largest part."""
    return describe_parts(folder, manifest.parts, embeddings.load_dim(manifest))


def describe_parts(folder: str, parts: Sequence[Part], dim: int) -> Source:
    """The same of the parts of embeddings of `dim` numbers."""
    largest = max(parts, key=lambda part: part.rows)
    block = _first_rows(folder, largest)
    width = block["vector"].type.value_type.bit_width // 8
    kept = block.drop_columns([name for name in assigned_parts.DROPPED if name in block.column_names])
    kept_bytes = kept.nbytes / max(1, len(kept))
    rows = sum(part.rows for part in parts)
    file_bytes = sum(file.bytes for part in parts for file in part.files)
    return Source(rows, dim, width, largest.rows, max(1, len(block)), kept_bytes, file_bytes)


def _first_rows(folder: str, part: Part) -> pa.Table:
    path = storage.join(folder, part.file(".parquet").path)
    try:
        with storage.open_arrow(path) as file:
            return pq.ParquetFile(file).read_row_group(0)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path} cannot be read: {error}. Copy it again, or make the embeddings again."
        ) from error


def plan_build(spec: ResolvedSpec, source: Source, speed: HostSpeed, calibrated_on: int = 0) -> Plan:
    """Predicts a build of `spec` from `source`; nprobe is chosen on so many queries, if on any."""
    rows, wide, dim, nlist, nprobe = spec.rows, spec.encoder_dim, spec.dim, spec.nlist, spec.nprobe
    memory = build_memory(spec, source, calibrated_on)
    centroids = nlist * dim
    code_bytes = rows * 2 * dim
    kept = rows * source.kept_row_bytes
    # Codes of 4 bits, and working them out.
    short = product_quantizer.code_bytes(dim) if spec.has_codes else 0
    encoding = rows * dim * _ENCODED_SECONDS if spec.has_codes else 0.0
    rest = int(kept * 0.5) + rows * (4 * nprobe + 8)
    matrix = 0 if spec.request.transform.kind == "none" else 8 * wide * dim
    disk = {
        "shards": code_bytes + rows * (8 + short) + spec.shards * centroids * 4 + rest,
        "trained": centroids * 2 + matrix,
        "scratch": code_bytes + rows * (4 * nprobe + 12) + int(kept * 0.5),
    }
    hashed = source.file_bytes / speed.hashed_bytes
    read = source.file_bytes / speed.read_bytes + hashed
    # What is only looked at, or sampled, is read by several threads.
    decoded = source.file_bytes / speed.read_bytes / min(speed.cores, MOST_READERS)
    clustered = min(spec.sample, nlist * MAX_POINTS_PER_CENTROID)
    transform_flop = 0 if not matrix else 2.0 * wide * dim
    unit = 0.0 if not matrix else dim / speed.unit_numbers
    moving = min(speed.cores, -(-nlist // BLOCK_CLUSTERS))
    moved = (clustered * dim * _ADDED_SECONDS + nlist * dim / speed.unit_numbers) / moving
    train = (
        decoded
        + KMEANS_ITERATIONS * (clustered * nlist * dim * 2 / speed.kmeans + moved)
        + spec.sample * (transform_flop / speed.product64 + unit)
        + (0 if not matrix else (2.0 * spec.sample * wide**2 + 20.0 * wide**3) / speed.product64)
    )
    assign = (
        read
        + rows * (transform_flop / speed.product64 + unit)
        + rows * nlist / speed.assigned_pairs
        + disk["scratch"] / speed.written_bytes
    )
    build = (
        # Vectors are bytes there: reading them takes no longer than writing them does.
        disk["scratch"] / speed.written_bytes
        + disk["shards"] * (1 / speed.written_bytes + 1 / speed.hashed_bytes)
        + spec.shards * _SHARD_SECONDS
        + encoding
    )
    steps: tuple[Step, ...] = (
        Step("check", memory["check"], _STAGE_SECONDS + hashed + decoded),
        Step("train", memory["train"], train),
        Step("assign", memory["assign"], assign),
        Step("build shards", memory["build shards"], _STAGE_SECONDS + build),
    )
    if calibrated_on:
        calibrate = (
            read
            + rows * (transform_flop / speed.product64 + unit)
            + calibrated_on * rows * (2.0 * dim / speed.product32 + _COMPARED_SECONDS)
            + 2.0 * calibrated_on * nlist * dim / speed.product64
        )
        steps = (*steps[:2], Step("calibrate", memory["calibrate"], calibrate), *steps[2:])
    figures = {
        "rows": rows,
        "choices": spec.choices(),
        "join_task_memory_bytes": memory["join task"],
        "pairs": guess_pairs(spec),
        "fan_out": guess_fan_out(spec),
        "memory_limit_bytes": spec.goal.memory_limit_bytes,
        "host": dataclasses.asdict(speed),
    }
    return Plan("build", spec.reasons, disk, steps, figures)


def build_memory(spec: ResolvedSpec, source: Source, calibrated_on: int = 0) -> dict[str, int]:
    """Returns the memory that each step of a build adds, and that of a join task over the result.

    `calibrated_on` is as `plan_build` takes it.
    """
    dim, wide, nlist, nprobe = spec.dim, spec.encoder_dim, spec.nlist, spec.nprobe
    group = source.group_rows * (2 * wide * source.number_bytes + 2 * source.kept_row_bytes)
    widened = 8 * wide if spec.request.transform.kind == "none" else 16 * wide + 24 * dim
    block = min(_BLOCK_ROWS, source.group_rows) * (widened + 8 * nprobe)
    sampled = min(_BLOCK_ROWS, spec.sample) * widened
    run_rows = min(source.part_rows, max(_BLOCK_ROWS, spec.run_bytes // (2 * dim)))
    run = run_rows * (2 * dim + 4 * nprobe + 2 * source.kept_row_bytes)
    centroids = nlist * dim
    shard_rows = -(-spec.rows // spec.shards)
    short = product_quantizer.code_bytes(dim) if spec.may_have_codes else 0
    shard = shard_rows * (2 * dim + short + 2 * (source.kept_row_bytes + 4 * nprobe) + 24)
    refine = spec.request.refine if spec.may_have_codes else None
    checked = int(max(_CHECKED_GROUPS, readers() * _READ_GROUPS) * group) + _STEP_BYTES
    queries = calibrated_on * (14 * dim + _BLOCK_ROWS * _COMPARED_BYTES)
    return {
        "check": checked,
        "calibrate": checked + queries if calibrated_on else 0,
        "train": spec.training_bytes + max(sampled, int(readers() * group)) + _STEP_BYTES,
        "assign": int(group + block + run) + 6 * centroids + _TILE_BYTES + _STEP_BYTES,
        "build shards": int(shard) + 10 * centroids + _STEP_BYTES,
        "join task": join_memory(shard_rows, spec.goal.k, dim, nprobe, nlist, refine),
    }


def join_memory(
    shard_rows: int, k: int, dim: int, nprobe: int, nlist: int, refine: int | None = None
) -> int:
    """Returns the memory that a join task adds: query shard, corpus shard, heaps, and its tiles.

    With `refine` codes propose so many rows for each neighbour.
    """
    return (
        shard_rows * join_row_bytes(dim, nprobe, k, refine)
        + 6 * nlist * dim
        + _TILE_BYTES
        + _STEP_BYTES
    )


def check_memory(spec: ResolvedSpec, source: Source, chosen: str = "", calibrated_on: int = 0) -> None:
    """Raises ConfigError, before any work, when a step would take more than the memory limit.

    Looked at are all steps of a plan, and the task that joins a shard. `chosen` says after nprobe who
    settled on it, where that is not the spec; `calibrated_on` is as `plan_build` takes it.
    """
    limit = spec.goal.memory_limit_bytes
    check_training_memory(spec, limit)
    memory = build_memory(spec, source, calibrated_on)
    shard_rows = -(-spec.rows // spec.shards)
    for name, what in (("build shards", "Building one shard"), ("join task", "Joining one shard")):
        if memory[name] > limit:
            needed = max(spec.shards + 1, -(-spec.shards * memory[name] // max(1, limit)))
            wanted = "" if spec.request.shards is None else "auto or "
            raise ConfigError(
                f"{what} would take {readable_memory(memory[name])} ({shard_rows} vectors of "
                f"{spec.dim} numbers, nprobe {spec.nprobe}{chosen}, k {spec.goal.k}), "
                f"index.memory_limit_gib allows {readable_memory(limit)}. Set index.shards to {wanted}"
                f"at least {needed}, or raise the limit."
            )
    if memory["assign"] > limit:
        raise ConfigError(
            f"Assigning one part would take {readable_memory(memory['assign'])} (row groups of "
            f"{source.group_rows} embeddings of {spec.encoder_dim} numbers, {spec.nlist} lists, nprobe "
            f"{spec.nprobe}{chosen}), index.memory_limit_gib allows {readable_memory(limit)}. Write "
            "the embeddings with smaller row groups, lower index.nlist, or raise the limit."
        )
    fewer = ", lower evaluate.sample" if calibrated_on else ""
    for name, what, remedy in (
        ("check", "Checking the embeddings", ""),
        ("train", "Sampling the embeddings", ", lower index.training_rows"),
        ("calibrate", f"Choosing nprobe on {calibrated_on} queries", fewer),
    ):
        if memory[name] > limit:
            raise ConfigError(
                f"{what} would take {readable_memory(memory[name])} (row groups of {source.group_rows} "
                f"embeddings of {spec.encoder_dim} numbers, {readers()} read at a time), "
                f"index.memory_limit_gib allows {readable_memory(limit)}. Write the embeddings with "
                f"smaller row groups{remedy}, or raise the limit."
            )


def guess_pairs(spec: ResolvedSpec) -> int:
    """Guesses the pairs that an all-against-all join scores, before any list is known."""
    return int(probed_rows(spec.rows, spec.nlist, spec.nprobe) * spec.rows)


def guess_fan_out(spec: ResolvedSpec) -> int:
    """Guesses the corpus shards that a query shard probes: neighbouring lists share shards."""
    return spec.shards if spec.nprobe == spec.nlist else min(spec.shards, spec.nprobe)


@dataclasses.dataclass(frozen=True)
class JoinWork:
    """What an all-against-all join of an index has to do, counted from the stored probes.

    `pairs`: the sum over the lists of queries that probe it times its rows. `fan_out`: corpus shards
    that a query shard probes, on average.
    """

    pairs: int
    fan_out: float


def count_join_work(index: IndexDataset) -> JoinWork:
    """Counts the pairs and the fan-out of a join of an index with itself; reads probes alone."""
    layout = index.layout
    probing: NDArray[np.int64] = np.zeros(index.trained.nlist, dtype=np.int64)
    touched = 0
    for number in range(layout.shards):
        table = read_shard_table(index, number, ("probes",))
        probes = embeddings.list_matrix(table["probes"])
        probing += count_probes(probes, index.trained.nlist)
        touched += len(probed_shards(index, probes, number))
    pairs = int(probing @ np.diff(layout.list_offsets))
    return JoinWork(pairs, touched / layout.shards)


def plan_join(index: IndexDataset, work: JoinWork, k: int, speed: JoinSpeed) -> Plan:
    """Predicts a join of an index with itself."""
    layout, dim, nprobe = index.layout, index.trained.dim, index.nprobe
    shard_rows = int(np.diff(layout.shard_offsets).max())
    index_bytes = index.manifest.bytes
    tables = sum(part.file(".parquet").bytes for part in index.parts)
    pairs_out = layout.rows * k
    probed, refine = work.pairs / max(1, layout.rows), index.refine
    by_codes = 1.0
    if refine is not None:
        by_codes = codes_over_pairs(probed, dim, refine * k, nprobe, multiplies_bfloat16())
    seconds = (
        by_codes * work.pairs / speed.joined_pairs
        + index_bytes / speed.hashed_bytes
        # Vectors are mapped: they come from the disk once, whatever the fan-out.
        + (index_bytes + tables * work.fan_out) / speed.read_bytes
        + pairs_out * _NEIGHBOR_SECONDS
        + layout.shards * _SHARD_SECONDS
    )
    memory = join_memory(shard_rows, k, dim, nprobe, index.trained.nlist, refine)
    figures = {
        "rows": layout.rows,
        "choices": {
            "k": k,
            "nprobe": nprobe,
            "nlist": index.trained.nlist,
            "shards": layout.shards,
            "refine": refine,
        },
        "pairs": work.pairs,
        "flop": 2 * dim * work.pairs,
        "read_bytes": int(index_bytes * work.fan_out),
        "fan_out": round(work.fan_out, 3),
        "host": dataclasses.asdict(speed),
    }
    reasons: tuple[str, ...] = (
        f"pairs {work.pairs}: what the stored probes of {layout.rows} rows name, "
        f"{probed:.0f} rows a query",
        f"fan-out {work.fan_out:.1f} of {layout.shards} shards",
    )
    if refine is not None:
        reasons += (f"encoding compressed: codes propose {refine * k} rows a query, vectors decide",)
    disk = {"neighbors": int(pairs_out * _NEIGHBOR_BYTES)}
    return Plan("join", reasons, disk, (Step("join", memory, _STAGE_SECONDS + seconds),), figures)
