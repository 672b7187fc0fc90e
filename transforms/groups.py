"""Near-duplicate groups as Beam sees them: one element is the number of an index shard.

Each task links the rows of its shard and leaves a spanning forest in a scratch file; one step connects
the forests and writes the parts. Only numbers travel.
"""

import dataclasses
import io
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import manifests, storage
from index_builder.datasets.manifests import Part
from index_builder.datasets.suspects import suspecting
from index_builder.index.shards import open_index
from index_builder.search.groups import connect, group_tables
from index_builder.steps.pairs import PairSpec, link_shard
from transforms.counters import LOCAL_PROGRESS, count, timed

STAGE = "groups"
# Raised when the same index and configuration give other bytes than before.
REVISION = 1
_ROW_GROUP_ROWS = 65_536


def part_name(shard: int) -> str:
    """Returns the name of the groups part of an index shard."""
    return f"part-{shard:05d}"


def forest_path(folder: str, shard: int) -> str:
    """Returns the path of the scratch file with the edges of a shard, int64 [edges, 2]."""
    return storage.join(folder, manifests.WORK_FOLDER, f"forest-{shard:05d}.npy")


@dataclasses.dataclass
class FindGroups(beam.PTransform):
    """Finds the near-duplicate groups of an index.

    Input: int, the number of an index shard. Output: the Parts of the groups dataset. After an
    interrupted run, finished forests and parts are kept. `key` is the fingerprint of the dataset.
    """

    index_folder: str
    spec: PairSpec
    groups_folder: str
    key: str

    def expand(self, shards: beam.PCollection[int]) -> beam.PCollection[Part]:
        """Adds: link every shard, then connect and write all parts in one step."""
        return (
            shards
            | "LinkShard" >> beam.ParDo(_LinkShard(self))
            | "AwaitForests" >> beam.CombineGlobally(sum).without_defaults()
            | "WriteGroups" >> beam.ParDo(_WriteGroups(self))
        )


class _GroupsStep(beam.DoFn):
    """A step with the fields of FindGroups."""

    def __init__(self, graph: FindGroups) -> None:
        self._index_folder, self._spec = graph.index_folder, graph.spec
        self._folder, self._key = graph.groups_folder, graph.key


class _LinkShard(_GroupsStep):
    def process(self, shard: int) -> Iterator[int]:
        """Yields the number of edges of a shard, once its forest is on disk."""
        name = f"forest-{shard:05d}"
        part = manifests.finished_part(self._folder, name, self._key)
        if part is None:
            with timed(STAGE), suspecting(self._folder, self._key):
                index = open_index(self._index_folder)
                edges = link_shard(index, shard, self._spec)
                buffer = io.BytesIO()
                np.save(buffer, edges)
                path = forest_path(self._folder, shard)
                storage.write_bytes(path, buffer.getvalue())
            file = manifests.describe_file(self._folder, f"{manifests.WORK_FOLDER}/{name}.npy")
            part = Part(name, self._key, len(edges), (file,))
            manifests.mark_part(self._folder, part)
            count(STAGE, "images", index.parts[shard].rows)
            count(STAGE, "edges", part.rows)
            LOCAL_PROGRESS.add(index.parts[shard].rows)
        yield part.rows


class _WriteGroups(_GroupsStep):
    def process(self, edges: int) -> Iterator[Part]:
        """Yields all parts; the number of edges only says that every forest is there."""
        index = open_index(self._index_folder)
        with timed(STAGE):
            groups = connect(self._forest(shard) for shard in range(index.layout.shards))
            for shard, table in enumerate(group_tables(index, groups)):
                part = manifests.finished_part(self._folder, part_name(shard), self._key)
                if part is None:
                    name = f"{part_name(shard)}.parquet"
                    with storage.atomic_path(storage.join(self._folder, name)) as temporary:
                        pq.write_table(
                            table, temporary, row_group_size=_ROW_GROUP_ROWS, compression="ZSTD"
                        )
                    sizes = table["group_size"].to_numpy()
                    first = table["is_representative"].to_numpy()
                    properties = {
                        "groups": int((first & (sizes > 1)).sum()),
                        "grouped": int((sizes > 1).sum()),
                        "largest": int(sizes.max(initial=0)),
                    }
                    file = manifests.describe_file(self._folder, name)
                    part = Part(part_name(shard), self._key, len(table), (file,), properties)
                    manifests.mark_part(self._folder, part)
                    count(STAGE, "groups", part.properties["groups"])
                    count(STAGE, "bytes_out", file.bytes)
                yield part

    def _forest(self, shard: int) -> NDArray[np.int64]:
        data = storage.read_bytes(forest_path(self._folder, shard))
        edges: NDArray[np.int64] = np.load(io.BytesIO(data), allow_pickle=False)
        return edges
