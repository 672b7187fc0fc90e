"""Export: neighbours as a recommender loads them, as Parquet and as JSONL."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.manifests import Part
from index_builder.errors import DatasetError
from index_builder.rules.rules import OWN_ITEM
from transforms.counters import LOCAL_PROGRESS, count, timed
from transforms.item_rows import ItemRows, best_of_items, shares

KIND = "recommendations"
STAGE = "export"
# Raised when the same neighbours and configuration give other bytes than before.
REVISION = 1
_ROW_GROUP_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """What is exported: formats (`parquet`, `jsonl`), columns of the neighbours, least score.

    A query keeps its row when none of its neighbours reaches `min_score`: its list is empty then,
    so that a load replaces what an earlier night had written. With `items` a row is of an item, not
    of an image.
    """

    formats: tuple[str, ...]
    columns: tuple[str, ...] = ()
    min_score: float | None = None
    items: ItemRows | None = None


@dataclasses.dataclass
class ExportNeighbors(beam.PTransform):
    """Exports parts of a neighbours dataset.

    Input: Part of the neighbours dataset. Output: the Part of the export that each became. A row of
    an item takes the rows of all its images, wherever they are: those travel in blocks to the part
    that the item's id falls to; `names` are the names of all parts then.
    """

    neighbors_folder: str
    spec: ExportSpec
    export_folder: str
    key: str
    names: tuple[str, ...] = ()

    def expand(self, parts: beam.PCollection[Part]) -> beam.PCollection[Part]:
        """Adds the one step, or for items: split, group, merge."""
        writer = _Writer(self.export_folder, self.spec.formats, self.key)
        if self.spec.items is None:
            return parts | "ExportPart" >> beam.ParDo(
                _ExportPart(self.neighbors_folder, self.spec, writer)
            )
        return (
            parts
            | "SplitItems" >> beam.FlatMap(split_items, self.neighbors_folder, self.spec, self.names)
            | "GroupByPart" >> beam.GroupByKey()
            | "ExportItems" >> beam.ParDo(_ExportItems(self.spec, self.names, writer))
        )


class _ExportPart(beam.DoFn):
    def __init__(self, neighbors_folder: str, spec: ExportSpec, writer: "_Writer") -> None:
        self._neighbors_folder = neighbors_folder
        self._spec = spec
        self._writer = writer

    def process(self, source: Part) -> Iterator[Part]:
        def select() -> pa.Table:
            blocks = embeddings.read_part(self._neighbors_folder, source)
            return pa.concat_tables([select_neighbors(block, self._spec) for block in blocks])

        yield self._writer.part(source.name, select)


class _ExportItems(beam.DoFn):
    def __init__(self, spec: ExportSpec, names: tuple[str, ...], writer: "_Writer") -> None:
        self._spec = spec
        self._names = names
        self._writer = writer

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[Part]:
        number, blocks = element

        def merge() -> pa.Table:
            tables = [pa.ipc.open_stream(block).read_all() for block in blocks]
            return merge_items(pa.concat_tables(tables), self._spec)

        yield self._writer.part(self._names[number], merge)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes parts of an export, each in all formats, unless an earlier attempt did."""

    folder: str
    formats: tuple[str, ...]
    key: str

    def part(self, name: str, make: Callable[[], pa.Table]) -> Part:
        part = manifests.finished_part(self.folder, name, self.key)
        if part is None:
            with timed(STAGE):
                part = self._write(name, make())
            manifests.mark_part(self.folder, part)
            count(STAGE, "queries", part.rows)
            count(STAGE, "pairs_out", part.properties["pairs"])
            count(STAGE, "bytes_out", sum(file.bytes for file in part.files))
        LOCAL_PROGRESS.add(part.rows)
        return part

    def _write(self, part_name: str, table: pa.Table) -> Part:
        names = [f"{part_name}.{extension}" for extension in self.formats]
        paths = {name: storage.join(self.folder, name) for name in names}
        pairs = pc.sum(pc.list_value_length(table["neighbors"])).as_py() or 0
        for name, path in paths.items():
            with storage.atomic_path(path) as temporary:
                if name.endswith(".jsonl"):
                    _write_jsonl(temporary, table)
                else:
                    pq.write_table(table, temporary, row_group_size=_ROW_GROUP_ROWS, compression="ZSTD")
        files = tuple(manifests.describe_file(self.folder, name) for name in names)
        return Part(part_name, self.key, len(table), files, {"pairs": pairs})


def export_schema(columns: tuple[tuple[str, pa.DataType], ...]) -> pa.Schema:
    """Returns the schema of an export: `query_id`, and `neighbors`, best first.

    Both ids are those of images, or of items; then `image_id` of a neighbour's best image is a column.
    """
    neighbor = pa.struct(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("score", pa.float32(), nullable=False),
            *[pa.field(name, kind) for name, kind in columns],
        ]
    )
    return pa.schema(
        [
            pa.field("query_id", pa.string(), nullable=False),
            pa.field("neighbors", pa.list_(neighbor), nullable=False),
        ]
    )


def _require_carried(block: pa.Table, columns: Iterable[str]) -> None:
    for name in columns:
        if f"neighbor_{name}" not in block.column_names:
            raise DatasetError(
                f"export.columns names {name!r}, but the neighbours carry only "
                f"{[c for c in block.column_names if c.startswith('neighbor_')]}. "
                "Run the join again with this configuration."
            )


def select_neighbors(block: pa.Table, spec: ExportSpec) -> pa.Table:
    """Turns a block of the neighbours dataset into rows of the export.

    Raises DatasetError when the neighbours do not carry a column that is wanted.
    """
    _require_carried(block, spec.columns)
    block = block.combine_chunks()
    ids = block["neighbor_ids"].combine_chunks()
    scores = block["scores"].combine_chunks()
    kinds = tuple(
        (name, block.schema.field(f"neighbor_{name}").type.value_type) for name in spec.columns
    )
    schema = export_schema(kinds)
    struct = schema.field("neighbors").type.value_type
    values = [ids.flatten(), scores.flatten()]
    values += [block[f"neighbor_{name}"].combine_chunks().flatten() for name, _ in kinds]
    neighbors = pa.StructArray.from_arrays(values, fields=list(struct))
    parents = ids.value_parent_indices()
    if spec.min_score is not None:
        keep = pc.greater_equal(values[1], pa.scalar(spec.min_score, pa.float32()))
        neighbors, parents = neighbors.filter(keep), parents.filter(keep)
    sizes = np.bincount(parents.to_numpy(), minlength=len(block))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    lists = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), neighbors, type=schema.field("neighbors").type
    )
    return pa.table([block["query_id"], lists], schema=schema)


def carried_columns(spec: ExportSpec) -> tuple[str, ...]:
    """Returns the columns of neighbours that an export reads, without repetition."""
    if spec.items is None:
        return spec.columns
    return tuple(dict.fromkeys((OWN_ITEM, *spec.columns, *(name for name, _ in spec.items.max_per))))


def item_columns(spec: ExportSpec) -> tuple[str, ...]:
    """Returns the columns of a neighbour in a row of an item: its best image comes first."""
    return tuple(dict.fromkeys(("image_id", *spec.columns)))


def split_items(
    source: Part, neighbors_folder: str, spec: ExportSpec, names: tuple[str, ...]
) -> Iterator[tuple[int, bytes]]:
    """Yields (number of a part, Arrow IPC block of rows whose items fall to it) of one part.

    The source's own number comes at least once, so that every part is written. Raises DatasetError
    when the neighbours do not carry a column that is needed.
    """
    needed = carried_columns(spec)
    own = names.index(source.name)
    for block in embeddings.read_part(neighbors_folder, source):
        _require_carried(block, needed)
        carried = [f"neighbor_{name}" for name in needed]
        table = block.select(["query_item_id", "neighbor_ids", "scores", *carried])
        yield own, _to_ipc(table.slice(0, 0))
        for number, rows in shares(table["query_item_id"], len(names)):
            yield number, _to_ipc(table.take(pa.array(rows)))


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def merge_items(table: pa.Table, spec: ExportSpec) -> pa.Table:
    """Turns rows of images, all there are of their items, into rows of the export by item."""
    assert spec.items is not None
    lists, owners, pairs = best_of_items(table, spec.items)
    kinds = tuple(
        (name, pairs.schema.field(f"neighbor_{name}").type if name != "image_id" else pa.string())
        for name in item_columns(spec)
    )
    if spec.min_score is not None:
        keep = pc.greater_equal(pairs["scores"], pa.scalar(spec.min_score, pa.float32()))
        pairs, owners = pairs.filter(keep), owners[keep.to_numpy()]
    schema = export_schema(kinds)
    sources = {"id": "neighbor_item_id", "score": "scores", "image_id": "neighbor_ids"}
    struct = schema.field("neighbors").type.value_type
    values = [pairs[sources.get(field.name, f"neighbor_{field.name}")] for field in struct]
    neighbors = pa.StructArray.from_arrays([v.combine_chunks() for v in values], fields=list(struct))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(lists)))])
    column = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), neighbors, type=schema.field("neighbors").type
    )
    return pa.table([lists, column], schema=schema)


def _write_jsonl(path: str, table: pa.Table) -> None:
    """Writes one JSON object a query; nine digits tell all float32 scores apart.

    JSON has no number for a NaN or an infinity in a metadata column: such a value becomes null.
    """
    doubtful = [field.name for field in table.schema.field("neighbors").type.value_type
                if pa.types.is_floating(field.type) and field.name != "score"]  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        for batch in table.to_batches(max_chunksize=_ROW_GROUP_ROWS):
            for row in batch.to_pylist():
                for neighbor in row["neighbors"]:
                    neighbor["score"] = float(f"{neighbor['score']:.9g}")
                    for name in doubtful:
                        if neighbor[name] is not None and not math.isfinite(neighbor[name]):
                            neighbor[name] = None
                file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
