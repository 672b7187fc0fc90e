"""Export: neighbours as a recommender loads them, as Parquet and as JSONL."""

import dataclasses
import json
import math
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from index_builder import embeddings, manifests, storage
from index_builder.errors import DatasetError
from index_builder.manifests import Part
from transforms.counters import LOCAL_PROGRESS, count, timed

KIND = "recommendations"
STAGE = "export"
# Raised when the same neighbours and configuration give other bytes than before.
REVISION = 1
_ROW_GROUP_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """What is exported: formats (`parquet`, `jsonl`), columns of the neighbours, least score.

    A query keeps its row when none of its neighbours reaches `min_score`: its list is empty then,
    so that a load replaces what an earlier night had written.
    """

    formats: tuple[str, ...]
    columns: tuple[str, ...] = ()
    min_score: float | None = None


@dataclasses.dataclass
class ExportNeighbors(beam.PTransform):
    """Exports parts of a neighbours dataset.

    Input: Part of the neighbours dataset. Output: the Part of the export that each became.
    """

    neighbors_folder: str
    spec: ExportSpec
    export_folder: str
    key: str

    def expand(self, parts: beam.PCollection[Part]) -> beam.PCollection[Part]:
        """Adds the one step."""
        return parts | "ExportPart" >> beam.ParDo(
            _ExportPart(self.neighbors_folder, self.spec, self.export_folder, self.key)
        )


class _ExportPart(beam.DoFn):
    def __init__(self, neighbors_folder: str, spec: ExportSpec, folder: str, key: str) -> None:
        self._neighbors_folder = neighbors_folder
        self._spec = spec
        self._folder = folder
        self._key = key

    def process(self, source: Part) -> Iterator[Part]:
        part = manifests.finished_part(self._folder, source.name, self._key)
        if part is None:
            with timed(STAGE):
                part = self._export(source)
            manifests.mark_part(self._folder, part)
            count(STAGE, "queries", part.rows)
            count(STAGE, "pairs_out", part.properties["pairs"])
            count(STAGE, "bytes_out", sum(file.bytes for file in part.files))
        LOCAL_PROGRESS.add(part.rows)
        yield part

    def _export(self, source: Part) -> Part:
        names = [f"{source.name}.{extension}" for extension in self._spec.formats]
        paths = {name: storage.join(self._folder, name) for name in names}
        blocks = embeddings.read_part(self._neighbors_folder, source)
        table = pa.concat_tables([select_neighbors(block, self._spec) for block in blocks])
        pairs = pc.sum(pc.list_value_length(table["neighbors"])).as_py() or 0
        for name, path in paths.items():
            with storage.atomic_path(path) as temporary:
                if name.endswith(".jsonl"):
                    _write_jsonl(temporary, table)
                else:
                    pq.write_table(table, temporary, row_group_size=_ROW_GROUP_ROWS, compression="ZSTD")
        files = tuple(manifests.describe_file(self._folder, name) for name in names)
        return Part(source.name, self._key, len(table), files, {"pairs": pairs})


def export_schema(columns: tuple[tuple[str, pa.DataType], ...]) -> pa.Schema:
    """Returns the schema of an export: `query_id`, and `neighbors`, best first."""
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


def select_neighbors(block: pa.Table, spec: ExportSpec) -> pa.Table:
    """Turns a block of the neighbours dataset into rows of the export.

    Raises DatasetError when the neighbours do not carry a column that is wanted.
    """
    for name in spec.columns:
        if f"neighbor_{name}" not in block.column_names:
            raise DatasetError(
                f"export.columns names {name!r}, but the neighbours carry only "
                f"{[c for c in block.column_names if c.startswith('neighbor_')]}. "
                "Run the join again with this configuration."
            )
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
