"""The graph of a join as Beam sees it: edges change sides through scratch files.

Three steps, each a task a part: write the edges bucketed by the part of their target; turn those that
arrive around; write the evidence, which needs the degrees of neighbours everywhere. Elements are
numbers of parts and of buckets.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import manifests, storage
from index_builder.datasets.manifests import Part
from index_builder.datasets.suspects import suspecting
from index_builder.index.sharding import IndexLayout
from index_builder.index.shards import IndexDataset, open_index, read_shard_table
from index_builder.steps.graph import (
    EDGE_SCHEMA,
    GraphSpec,
    NeighborLists,
    evidence_table,
    part_figures,
    reverse_side,
    split_edges,
)
from transforms.counters import LOCAL_PROGRESS, count, timed

STAGE = "graph"
# Raised when the same neighbours and configuration give other bytes than before.
REVISION = 1
_ROW_GROUP_ROWS = 8192


def part_name(number: int) -> str:
    """Returns the name of the graph part of a neighbours part."""
    return f"part-{number:05d}"


@dataclasses.dataclass
class BuildGraph(beam.PTransform):
    """Builds the graph of a neighbours dataset; of its index only layout and ids are read.

    Input: int, the number of a neighbours part. Output: the Parts of the graph dataset. After an
    interrupted run, finished steps of every part are kept. `key` is the fingerprint of the dataset.
    """

    index_folder: str
    neighbors_folder: str
    parts: tuple[Part, ...]
    spec: GraphSpec
    graph_folder: str
    key: str

    def expand(self, numbers: beam.PCollection[int]) -> beam.PCollection[Part]:
        """Adds the three steps."""
        files = _Files(self)
        return (
            numbers
            | "SplitEdges" >> beam.ParDo(_SplitEdges(files))
            | "GroupByTarget" >> beam.GroupByKey()
            | "TurnAround" >> beam.ParDo(_TurnAround(files))
            | "AwaitDegrees" >> beam.CombineGlobally(sum).without_defaults()
            | "ListParts" >> beam.FlatMap(_numbers, len(self.parts))
            | "SpreadParts" >> beam.Reshuffle()
            | "WriteEvidence" >> beam.ParDo(_WriteEvidence(files))
        )


def _numbers(_: int, parts: int) -> Iterator[int]:
    yield from range(parts)


class _Files:
    """Where the steps find and leave what they work on; travels to the workers."""

    def __init__(self, graph: BuildGraph) -> None:
        self.spec, self.key, self.folder = graph.spec, graph.key, graph.graph_folder
        self.parts = graph.parts
        self._neighbors_folder = graph.neighbors_folder
        self._index_folder = graph.index_folder

    def index(self) -> IndexDataset:
        """Opens the index."""
        return open_index(self._index_folder)

    def lists(self, layout: IndexLayout, number: int, *, verify: bool = False) -> NeighborLists:
        """Reads the lists of a part."""
        file = self.parts[number].file(".parquet")
        path = storage.join(self._neighbors_folder, file.path)
        if verify:
            manifests.verify_file(self._neighbors_folder, file)
        with storage.open_arrow(path) as opened:
            table = pq.read_table(opened, columns=list(NeighborLists.COLUMNS))
        return NeighborLists.of(table, layout.shard_rows(number), layout.rows, path)

    def work_name(self, kind: str, number: int, suffix: str) -> str:
        """Returns the name of a scratch file in the dataset's folder."""
        return f"{manifests.WORK_FOLDER}/{kind}-{number:05d}.{suffix}"

    def path(self, name: str) -> str:
        return storage.join(self.folder, name)

    def save_array(self, name: str, array: NDArray[Any]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array)
        storage.write_bytes(self.path(name), buffer.getvalue())

    def load_array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(
            io.BytesIO(storage.read_bytes(self.path(name))), allow_pickle=False
        )
        return array

    def write_table(self, name: str, table: pa.Table) -> None:
        with storage.atomic_path(self.path(name)) as temporary:
            pq.write_table(table, temporary, row_group_size=_ROW_GROUP_ROWS, compression="ZSTD")

    def finished(self, name: str) -> Part | None:
        return manifests.finished_part(self.folder, name, self.key)

    def mark(self, name: str, rows: int, files: Iterable[str], properties: dict[str, Any]) -> Part:
        """Records a finished step with its files."""
        described = tuple(manifests.describe_file(self.folder, file) for file in files)
        part = Part(name, self.key, rows, described, properties)
        manifests.mark_part(self.folder, part)
        return part


class _SplitEdges(beam.DoFn):
    def __init__(self, files: _Files) -> None:
        self._files = files

    def process(self, number: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yields (part of the target, (this part, number of the batch)), or batch -1 for itself."""
        files = self._files
        part = files.finished(f"edges-{number:05d}")
        if part is None:
            with timed(STAGE), suspecting(files.folder, files.key):
                part = self._split(number)
            count(STAGE, "edges_in", part.rows)
        # Also where nothing leads to: that part has to be written as well.
        yield number, (number, -1)
        for batch, target in enumerate(part.properties["targets"]):
            yield target, (number, batch)

    def _split(self, number: int) -> Part:
        files = self._files
        layout = files.index().layout
        lists = files.lists(layout, number, verify=True)
        targets = []
        name = files.work_name("edges", number, "arrow")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            storage.atomic_path(files.path(name)) as temporary,
            pa.OSFile(temporary, "wb") as sink,
            pa.ipc.new_file(sink, EDGE_SCHEMA, options=options) as writer,
        ):
            for target, batch in split_edges(lists, layout.shard_offsets):
                writer.write_batch(batch)
                targets.append(target)
        return files.mark(f"edges-{number:05d}", len(lists.rows), [name], {"targets": targets})


class _TurnAround(beam.DoFn):
    def __init__(self, files: _Files) -> None:
        self._files = files

    def process(self, element: tuple[int, Iterable[tuple[int, int]]]) -> Iterator[int]:
        """Yields the number of edges that lead to a part, once its reverse side is written."""
        number, buckets = element
        files = self._files
        part = files.finished(f"reverse-{number:05d}")
        if part is None:
            with timed(STAGE), suspecting(files.folder, files.key):
                incoming = self._read([bucket for bucket in buckets if bucket[1] >= 0])
                index = files.index()
                lists = files.lists(index.layout, number)
                manifests.verify_file(index.folder, index.parts[number].file(".parquet"))
                items = read_shard_table(index, number, ("image_id",))["image_id"]
                side = reverse_side(lists, items, incoming, index.layout.rows, files.spec)
                names = [f"reverse-{number:05d}.parquet", f"mutual-{number:05d}.parquet"]
                files.write_table(names[0], side.reverse)
                files.write_table(names[1], side.mutual_edges)
                for kind, array in (("degrees", side.degrees), ("flags", side.mutual)):
                    names.append(files.work_name(kind, number, "npy"))
                    files.save_array(names[-1], array)
                figures = part_figures(side)
                part = files.mark(f"reverse-{number:05d}", len(incoming), names, figures)
            count(STAGE, "mutual_edges", part.properties["mutual_edges"])
        yield part.rows

    def _read(self, buckets: list[tuple[int, int]]) -> pa.Table:
        """Reads the batches of a target from the files of their sources."""
        files, batches = self._files, []
        for source, batch in sorted(buckets):
            name = files.work_name("edges", source, "arrow")
            with storage.open_arrow(files.path(name)) as opened, pa.ipc.open_file(opened) as reader:
                batches.append(reader.get_batch(batch))
        return pa.Table.from_batches(batches, EDGE_SCHEMA)


class _WriteEvidence(beam.DoFn):
    def __init__(self, files: _Files) -> None:
        self._files = files

    def process(self, number: int) -> Iterator[Part]:
        """Yields a part of the graph dataset: its three files."""
        files = self._files
        part = files.finished(part_name(number))
        if part is None:
            with timed(STAGE):
                part = self._write(number)
            count(STAGE, "queries", part.rows)
            count(STAGE, "bytes_out", sum(file.bytes for file in part.files))
        LOCAL_PROGRESS.add(part.rows)
        yield part

    def _write(self, number: int) -> Part:
        files = self._files
        layout = files.index().layout
        lists = files.lists(layout, number)
        own = files.load_array(files.work_name("degrees", number, "npy"))
        mutual = files.load_array(files.work_name("flags", number, "npy"))
        targets = layout.shard_of_rows(lists.rows)
        degrees = np.empty(len(lists.rows), dtype=np.int32)
        for target in np.unique(targets):
            those = targets == target
            known = files.load_array(files.work_name("degrees", int(target), "npy"))
            degrees[those] = known[lists.rows[those] - layout.shard_rows(int(target))[0]]
        name = f"evidence-{number:05d}.parquet"
        files.write_table(name, evidence_table(lists, own, mutual, degrees))
        turned = files.finished(f"reverse-{number:05d}")
        assert turned is not None
        others = [file.path for file in turned.files if file.path.endswith(".parquet")]
        return files.mark(part_name(number), len(lists.ids), [name, *others], turned.properties)
