"""Building the index: train once, assign part by part, plan the layout, write shard by shard.

Between the steps only small descriptors travel. Vectors move through scratch files in the index's
`_work` folder, sorted by list, of which each shard reads the lists that it owns.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsIter, AsSingleton
from apache_beam.utils.shared import Shared
from numpy.typing import NDArray

from index_builder import embeddings, manifests, shards, storage
from index_builder.fingerprints import fingerprint
from index_builder.manifests import Part
from index_builder.metadata_table import count_used
from index_builder.sampling import read_sample
from index_builder.sharding import load_layout, plan_layout, save_layout
from index_builder.spec import ResolvedSpec
from index_builder.table_files import MetadataTable
from index_builder.training import TrainedIndex, load_trained, save_trained, train_index
from transforms.counters import LOCAL_PROGRESS, count, timed

STAGE = "build"
# Raised when the same embeddings and configuration give other bytes than before.
REVISION = 1


@dataclasses.dataclass(frozen=True)
class BuildSpec:
    """What is indexed, how, and where the index goes; travels to the workers.

    `key` is the fingerprint of the index that is being made; `metadata` the table whose columns it
    gets beside those of the images.
    """

    embeddings_folder: str
    embeddings_parts: tuple[Part, ...]
    index: ResolvedSpec
    index_folder: str
    key: str
    metadata: MetadataTable | None = None

    def work_path(self, name: str) -> str:
        """Returns the path of a scratch file."""
        return storage.join(self.index_folder, manifests.WORK_FOLDER, name)

    def assigned_path(self, number: int) -> str:
        """Returns the path of the scratch file of one part of the embeddings."""
        return self.work_path(f"assigned-{number:05d}-{self.key[:16]}.parquet")

    @property
    def trained_path(self) -> str:
        """The path of the trained transform and quantizer."""
        return storage.join(self.index_folder, shards.TRAINED_NAME)


@dataclasses.dataclass
class BuildIndex(beam.PTransform):
    """Builds the index shards.

    Input: the pipeline's root. Output: the Part of every index shard, and the part that holds what
    all shards share. After an interrupted run, finished steps and shards are kept.
    """

    spec: BuildSpec

    def expand(self, root: beam.Pipeline) -> beam.PCollection[Part]:
        """Adds: train, assign, plan, build."""
        shared = Shared()
        numbers = range(len(self.spec.embeddings_parts))
        trained = root | "OneTask" >> beam.Create([self.spec]) | "Train" >> beam.Map(_train)
        sizes = (
            root
            | "ListParts" >> beam.Create(numbers)
            | "SpreadParts" >> beam.Reshuffle()
            | "AssignPart" >> beam.ParDo(_AssignPart(self.spec, shared), AsSingleton(trained))
            | "SumListSizes" >> beam.CombineGlobally(_sum_list_sizes).without_defaults()
        )
        plans = sizes | "PlanLayout" >> beam.FlatMap(_plan, self.spec)
        built = (
            plans
            | "SpreadShards" >> beam.Reshuffle()
            | "BuildShard" >> beam.ParDo(_BuildShard(self.spec, shared))
        )
        finished = sizes | "DescribeShared" >> beam.Map(_describe_shared, self.spec, AsIter(built))
        return (built, finished) | "AllParts" >> beam.Flatten()


def _train(spec: BuildSpec) -> str:
    """Trains unless an earlier attempt did; returns the path of the result."""
    name = "trained"
    if manifests.finished_part(spec.index_folder, name, spec.key) is None:
        with timed(STAGE):
            sample = read_sample(
                spec.embeddings_folder,
                spec.embeddings_parts,
                spec.index.sample,
                spec.index.request.seed,
            )
            save_trained(spec.trained_path, train_index(spec.index, sample))
            count(STAGE, "training_vectors", len(sample))
        file = manifests.describe_file(spec.index_folder, shards.TRAINED_NAME)
        manifests.mark_part(spec.index_folder, Part(name, spec.key, 0, (file,)))
    return spec.trained_path


def effective_nprobe(spec: ResolvedSpec, trained: TrainedIndex) -> int:
    """Returns nprobe, no more than the lists that training left."""
    return min(spec.nprobe, trained.nlist)


class _WithTrained(beam.DoFn):
    """A step that shares the trained quantizer between all threads of a process."""

    def __init__(self, spec: BuildSpec, shared: Shared) -> None:
        self._spec = spec
        self._shared = shared

    def trained(self) -> TrainedIndex:
        path = self._spec.trained_path
        trained: TrainedIndex = self._shared.acquire(lambda: load_trained(path), tag=path)
        return trained


class _AssignPart(_WithTrained):
    def process(self, number: int, trained_path: str) -> Iterator[NDArray[np.int64]]:
        """Yields the list sizes of one part; the side input makes it wait for training."""
        spec, trained = self._spec, self.trained()
        part, path = spec.embeddings_parts[number], spec.assigned_path(number)
        if not storage.exists(path):
            with timed(STAGE):
                blocks = embeddings.read_part(spec.embeddings_folder, part)
                shards.assign_part(blocks, trained, effective_nprobe(spec.index, trained), path)
                count(STAGE, "vectors_in", part.rows)
        yield shards.assigned_list_sizes(path, trained.nlist)


def _sum_list_sizes(blocks: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    total: NDArray[np.int64] = np.sum(list(blocks), axis=0, dtype=np.int64)
    return total


def _plan(list_sizes: NDArray[np.int64], spec: BuildSpec) -> Iterator[int]:
    """Writes the layout and yields the numbers of the shards."""
    layout = plan_layout(list_sizes, spec.index.shards)
    if manifests.finished_part(spec.index_folder, shards.SHARED_PART, spec.key) is None:
        save_layout(storage.join(spec.index_folder, shards.LAYOUT_NAME), layout)
    yield from range(layout.shards)


class _BuildShard(_WithTrained):
    def process(self, shard: int) -> Iterator[Part]:
        """Yields the shard's part, writing its files unless an earlier attempt did."""
        spec = self._spec
        layout = load_layout(storage.join(spec.index_folder, shards.LAYOUT_NAME))
        key = fingerprint({"index": spec.key, "rows": layout.shard_rows(shard)})
        part = manifests.finished_part(spec.index_folder, f"shard-{shard:05d}", key)
        if part is None:
            with timed(STAGE):
                paths = [spec.assigned_path(i) for i in range(len(spec.embeddings_parts))]
                part = shards.build_shard(
                    spec.index_folder, shard, layout, self.trained(), paths, key, spec.metadata
                )
            manifests.mark_part(spec.index_folder, part)
            count(STAGE, "vectors_out", part.rows)
            count(STAGE, "bytes_out", sum(file.bytes for file in part.files))
            if spec.metadata is not None:
                for name in ("metadata_matched", "metadata_unmatched"):
                    count(STAGE, name, part.properties[name])
        LOCAL_PROGRESS.add(part.rows)
        yield part


def _describe_shared(list_sizes: NDArray[np.int64], spec: BuildSpec, built: Iterable[Part]) -> Part:
    """Returns the part of what all shards share, once all shards are built."""
    trained = load_trained(spec.trained_path)
    files = tuple(
        manifests.describe_file(spec.index_folder, name)
        for name in (shards.TRAINED_NAME, shards.LAYOUT_NAME)
    )
    built = list(built)
    rows = [part.rows for part in built]
    properties: dict[str, Any] = {
        "nlist": trained.nlist,
        "nprobe": effective_nprobe(spec.index, trained),
        "dim": trained.dim,
        "shards": len(rows),
        "empty_lists": int((list_sizes == 0).sum()),
        # Sum of squares over the even split: 1 when all lists are equal (FAISS's imbalance factor).
        "imbalance": round(
            float(trained.nlist * np.square(list_sizes, dtype=np.float64).sum())
            / float(list_sizes.sum()) ** 2,
            6,
        ),
        "largest_shard_over_mean": round(max(rows) * len(rows) / sum(rows), 6),
    }
    if spec.metadata is not None:
        properties["metadata"] = _describe_metadata(spec, built)
    part = Part(shards.SHARED_PART, spec.key, 0, files, properties)
    manifests.mark_part(spec.index_folder, part)
    return part


def _describe_metadata(spec: BuildSpec, built: list[Part]) -> dict[str, int]:
    """Returns the figures of the join with the metadata table: of the index, then of the table.

    An item's images may be in several shards, so the table's rows that were used are a union.
    """
    used: list[NDArray[np.int64]] = []
    table_rows = 0
    for part in built:
        path = shards.table_rows_path(spec.index_folder, part.name, part.key)
        with storage.open_binary(path) as file:
            taken = np.load(file)
            used.append(taken["used"])
            table_rows = int(taken["table_rows"])
    return {
        "matched": sum(part.properties["metadata_matched"] for part in built),
        "unmatched": sum(part.properties["metadata_unmatched"] for part in built),
        "table_rows": table_rows,
        "ignored": table_rows - count_used(used, table_rows),
    }
