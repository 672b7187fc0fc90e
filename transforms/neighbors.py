"""The join as Beam sees it: one element is the number of a query shard."""

import dataclasses
from collections.abc import Iterator

import apache_beam as beam
import pyarrow.parquet as pq

from index_builder import manifests, storage
from index_builder.join import JoinSpec, join_shard
from index_builder.manifests import Part
from index_builder.neighbors import CAPPED, EXHAUSTED, FILLED
from index_builder.shards import open_index
from transforms.counters import LOCAL_PROGRESS, count, timed

STAGE = "join"
# Raised when the same index and configuration give other bytes than before.
REVISION = 1
_ROW_GROUP_ROWS = 8192


def part_name(shard: int) -> str:
    """Returns the name of the neighbours part of a query shard."""
    return f"part-{shard:05d}"


@dataclasses.dataclass
class JoinNeighbors(beam.PTransform):
    """Finds the neighbours of every row of the index.

    Input: int, the number of a query shard. Output: the Part of the neighbours dataset that the
    task wrote or, after an interrupted run, had written. `key` is the fingerprint of the dataset.
    """

    index_folder: str
    spec: JoinSpec
    neighbors_folder: str
    key: str

    def expand(self, shards: beam.PCollection[int]) -> beam.PCollection[Part]:
        """Adds the one step."""
        return shards | "JoinShard" >> beam.ParDo(
            _JoinShard(self.index_folder, self.spec, self.neighbors_folder, self.key)
        )


class _JoinShard(beam.DoFn):
    def __init__(self, index_folder: str, spec: JoinSpec, folder: str, key: str) -> None:
        self._index_folder = index_folder
        self._spec = spec
        self._folder = folder
        self._key = key

    def process(self, shard: int) -> Iterator[Part]:
        name = part_name(shard)
        part = manifests.finished_part(self._folder, name, self._key)
        if part is None:
            with timed(STAGE):
                part = self._join(shard, name)
            manifests.mark_part(self._folder, part)
            count(STAGE, "queries", part.rows)
            count(STAGE, "pairs_out", part.properties["pairs"])
            count(STAGE, "bytes_out", sum(file.bytes for file in part.files))
        LOCAL_PROGRESS.add(part.rows)
        yield part

    def _join(self, shard: int, name: str) -> Part:
        table = join_shard(open_index(self._index_folder), shard, self._spec)
        path = storage.join(self._folder, f"{name}.parquet")
        with storage.atomic_path(path) as temporary:
            pq.write_table(table, temporary, row_group_size=_ROW_GROUP_ROWS, compression="ZSTD")
        status = table["status"].value_counts().to_pylist()
        counts = {entry["values"]: entry["counts"] for entry in status}
        properties = {
            "pairs": len(table["neighbor_ids"].combine_chunks().flatten()),
            **{name: counts.get(name, 0) for name in (FILLED, EXHAUSTED, CAPPED)},
        }
        file = manifests.describe_file(self._folder, f"{name}.parquet")
        return Part(name, self._key, len(table), (file,), properties)
