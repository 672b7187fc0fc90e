"""Index shards: building them from embeddings, and opening them again.

A shard is a FAISS file and a Parquet file. The FAISS file (`IndexIVFScalarQuantizer`, float16 codes,
not by residual, a quantizer with all centroids, foreign lists empty) is the only copy of the indexed
vectors; its ids are row numbers in the whole index. The Parquet file holds, in the same order, ids,
origin, metadata, squared norms and the nearest lists of each row.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder import embeddings, manifests, storage
from index_builder.assignment import nearest_lists
from index_builder.errors import DatasetError
from index_builder.manifests import Manifest, Part
from index_builder.metadata_table import look_up
from index_builder.sharding import IndexLayout, load_layout
from index_builder.table_files import MetadataTable
from index_builder.topk import IdColumn
from index_builder.training import TrainedIndex, load_trained
from index_builder.vectors import squared_norms

KIND = "index"
TRAINED_NAME = "trained.npz"
LAYOUT_NAME = "layout.npz"
SHARED_PART = "shared"

# Columns of the embeddings that the index does not need again.
_DROPPED = ("vector", "content_sha256", "width", "height", "format")
_ROW_GROUP_ROWS = 4096


def assign_part(blocks: Iterator[pa.Table], trained: TrainedIndex, nprobe: int, path: str) -> None:
    """Transforms and assigns one part of the embeddings and writes it sorted by list.

    The result is scratch for `build_shard`: a Parquet file with columns `list` int32, `code` float16
    [dim], `probes` int32 [nprobe], and the columns of the embeddings that the index keeps. Rows of
    one list stay in the order of the part.
    """
    tables = []
    for block in blocks:
        codes = trained.transform.apply(embeddings.list_matrix(block["vector"]))
        probes = nearest_lists(codes, trained.centroids, nprobe)
        kept = block.drop_columns([name for name in _DROPPED if name in block.column_names])
        kept = kept.append_column("list", pa.array(probes[:, 0]))
        kept = kept.append_column("code", embeddings.list_array(codes))
        tables.append(kept.append_column("probes", embeddings.list_array(probes)))
    table = pa.concat_tables(tables)
    order = np.argsort(table["list"].to_numpy(), kind="stable")
    with storage.atomic_path(path) as temporary:
        pq.write_table(
            table.take(order),
            temporary,
            row_group_size=_ROW_GROUP_ROWS,
            compression="NONE",
            write_statistics=["list"],
        )


def assigned_list_sizes(path: str, nlist: int) -> NDArray[np.int64]:
    """Counts the rows of each list in an assigned part, int64 [nlist]."""
    with storage.open_binary(path) as file:
        lists = pq.read_table(file, columns=["list"])["list"].to_numpy()
    return np.bincount(lists, minlength=nlist).astype(np.int64)


def build_shard(
    folder: str,
    shard: int,
    layout: IndexLayout,
    trained: TrainedIndex,
    assigned_paths: list[str],
    key: str,
    metadata: MetadataTable | None = None,
) -> Part:
    """Writes one index shard from the assigned parts and returns its manifest entry.

    With a metadata table its columns come after those of the images, and the part's properties get
    `metadata_matched` and `metadata_unmatched`, in rows. Raises DatasetError as `look_up` does.

    Memory: the rows of the lists that the shard owns.
    """
    first_list, last_list = layout.shard_lists(shard)
    start, stop = layout.shard_rows(shard)
    table = pa.concat_tables([_read_lists(path, first_list, last_list) for path in assigned_paths])
    # Parts come in order, so a stable sort by list gives the order of the layout.
    table = table.take(np.argsort(table["list"].to_numpy(), kind="stable"))
    skipped = start - int(layout.list_offsets[first_list])
    table = table.slice(skipped, stop - start).combine_chunks()

    name = f"shard-{shard:05d}"
    properties: dict[str, int] = {}
    if metadata is not None:
        table, properties = _add_metadata(table, metadata, table_rows_path(folder, name, key))
    codes = embeddings.list_matrix(table["code"])
    lists = table["list"].to_numpy()
    _write_faiss(storage.join(folder, f"{name}.faiss"), trained, codes, lists, start)
    rows = table.drop_columns(["code", "list"])
    rows = rows.append_column("squared_norm", pa.array(squared_norms(codes)))
    with (
        storage.atomic_path(storage.join(folder, f"{name}.parquet")) as temporary,
        embeddings.parquet_writer(temporary, rows.schema) as writer,
    ):
        writer.write_table(rows, row_group_size=_ROW_GROUP_ROWS)
    files = (
        manifests.describe_file(folder, f"{name}.faiss"),
        manifests.describe_file(folder, f"{name}.parquet"),
    )
    properties |= {
        "max_id_bytes": IdColumn.from_arrow(table["image_id"]).max_bytes,
        "lists": last_list - first_list,
    }
    return Part(name, key, len(rows), files, properties)


def table_rows_path(folder: str, name: str, key: str) -> str:
    """Returns the path of the scratch file with the rows of the metadata table that a shard took.

    It holds int64 `used` (their numbers, ascending) and `table_rows` (how many the table has).
    """
    return storage.join(folder, manifests.WORK_FOLDER, f"used-{name}-{key[:16]}.npz")


def _add_metadata(
    table: pa.Table, metadata: MetadataTable, used_path: str
) -> tuple[pa.Table, dict[str, int]]:
    """Adds the columns of a metadata table before `probes`; returns the figures beside it."""
    found = look_up(metadata, table[metadata.spec.key].combine_chunks())
    for name in found.columns.column_names:
        field, place = found.columns.schema.field(name), table.column_names.index("probes")
        table = table.add_column(place, field, found.columns[name])
    with storage.atomic_path(used_path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, used=found.used, table_rows=found.table_rows)
    return table, {
        "metadata_matched": found.matched,
        "metadata_unmatched": len(table) - found.matched,
    }


def _read_lists(path: str, first_list: int, last_list: int) -> pa.Table:
    """Reads the rows of lists first <= list < last of an assigned part, row groups at a time."""
    with storage.open_binary(path) as file:
        parquet = pq.ParquetFile(file)
        column = parquet.schema_arrow.get_field_index("list")
        # Leaf columns are counted in Parquet's own order; `list` has no nested column before it.
        tables = [parquet.schema_arrow.empty_table()]
        for group in range(parquet.num_row_groups):
            if parquet.metadata.row_group(group).num_rows == 0:
                continue
            statistics = _column_statistics(parquet, group, column)
            if statistics.max >= first_list and statistics.min < last_list:
                table = parquet.read_row_group(group)
                lists = table["list"].to_numpy()
                bounds = np.searchsorted(lists, [first_list, last_list])
                tables.append(table.slice(bounds[0], bounds[1] - bounds[0]))
    return pa.concat_tables(tables)


def _column_statistics(parquet: pq.ParquetFile, group: int, column: int) -> pq.Statistics:
    chunk = parquet.metadata.row_group(group).column(column)
    if chunk.path_in_schema != "list" or chunk.statistics is None:
        raise DatasetError(
            "An assigned part has no statistics of its list column. Delete the _work folder of the "
            "index and build it again."
        )
    return chunk.statistics


def _write_faiss(
    path: str,
    trained: TrainedIndex,
    codes: NDArray[np.float16],
    lists: NDArray[np.int32],
    first_row: int,
) -> None:
    quantizer = faiss.IndexFlatIP(trained.dim)
    quantizer.add(trained.centroids.astype(np.float32))
    index = faiss.IndexIVFScalarQuantizer(
        quantizer,
        trained.dim,
        trained.nlist,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # by_residual: codes must be the vectors themselves
    )
    index.is_trained = True
    vectors = codes.astype(np.float32)
    ids = np.arange(first_row, first_row + len(vectors), dtype=np.int64)
    assigned = np.ascontiguousarray(lists, dtype=np.int64)
    index.add_core(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(assigned))
    with storage.atomic_path(path) as temporary:
        faiss.write_index(index, temporary)


@dataclasses.dataclass(frozen=True, eq=False)
class IndexDataset:
    """An opened index: its manifest, what was trained, and where the rows live."""

    folder: str
    manifest: Manifest
    trained: TrainedIndex
    layout: IndexLayout

    @property
    def parts(self) -> list[Part]:
        """The manifest entries of the shards, in shard order."""
        return [part for part in self.manifest.parts if part.name != SHARED_PART]

    @property
    def nprobe(self) -> int:
        """The number of lists searched for a query."""
        return int(self.manifest.properties["nprobe"])

    @property
    def id_bytes(self) -> int:
        """The length of the longest image id."""
        return max(int(part.properties["max_id_bytes"]) for part in self.parts)


def open_index(folder: str) -> IndexDataset:
    """Opens a complete index. Raises DatasetError where there is none or its files were changed."""
    manifest = manifests.load(folder, KIND)
    shared = [part for part in manifest.parts if part.name == SHARED_PART]
    if len(shared) != 1:
        raise DatasetError(f"{folder} names no trained quantizer. Build the index again.")
    for file in shared[0].files:
        manifests.verify_file(folder, file)
    return IndexDataset(
        folder,
        manifest,
        load_trained(storage.join(folder, TRAINED_NAME)),
        load_layout(storage.join(folder, LAYOUT_NAME)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class IndexShard:
    """One opened shard: codes are read where FAISS keeps them, mapped from the file."""

    number: int
    layout: IndexLayout
    faiss_index: faiss.IndexIVF
    table: pa.Table

    @property
    def first_row(self) -> int:
        """The shard's first row in the whole index."""
        return self.layout.shard_rows(self.number)[0]

    @property
    def lists(self) -> range:
        """The lists of which the shard owns at least one row."""
        return range(*self.layout.shard_lists(self.number))

    def list_codes(self, list_number: int) -> NDArray[np.float16]:
        """Returns a list's vectors, float16 [rows, dim]: a view that lives as long as the shard."""
        inverted = self.faiss_index.invlists
        size = inverted.list_size(list_number)
        dim = self.faiss_index.d
        if size == 0:
            return np.empty((0, dim), dtype=np.float16)
        codes = faiss.rev_swig_ptr(inverted.get_codes(list_number), size * inverted.code_size)
        matrix: NDArray[np.float16] = codes.view(np.float16).reshape(size, dim)
        return matrix

    def codes(self) -> NDArray[np.float16]:
        """Returns all vectors of the shard in row order, float16 [rows, dim], as a copy."""
        blocks = [self.list_codes(number) for number in self.lists]
        return np.concatenate([np.empty((0, self.faiss_index.d), np.float16), *blocks])

    def ids(self) -> IdColumn:
        """Returns the image ids of the shard's rows."""
        return IdColumn.from_arrow(self.table["image_id"])

    def squared_norms(self) -> NDArray[np.float64]:
        """Returns the exact squared norms of the shard's vectors, float64 [rows]."""
        norms: NDArray[np.float64] = self.table["squared_norm"].to_numpy()
        return norms

    def probes(self) -> NDArray[np.int32]:
        """Returns the nearest lists of each row, nearest first, int32 [rows, nprobe]."""
        return embeddings.list_matrix(self.table["probes"])


def read_shard_table(index: IndexDataset, number: int, columns: tuple[str, ...]) -> pa.Table:
    """Reads some Parquet columns of a shard, in row order, without touching its vectors."""
    path = storage.join(index.folder, index.parts[number].file(".parquet").path)
    with storage.open_binary(path) as file:
        return pq.read_table(file, columns=list(dict.fromkeys(columns)))


@contextlib.contextmanager
def open_shard(
    index: IndexDataset, number: int, columns: tuple[str, ...], *, verify: bool = False
) -> Iterator[IndexShard]:
    """Opens a shard with some of its Parquet columns, and closes it at the end of the block.

    With `verify` both files are first checked against the manifest (DatasetError). A task verifies
    the shard it owns, so over a whole join every shard is verified once.
    """
    part = index.parts[number]
    if verify:
        for file in part.files:
            manifests.verify_file(index.folder, file)
    table = read_shard_table(index, number, columns)
    with storage.local_copy(storage.join(index.folder, part.file(".faiss").path)) as path:
        faiss_index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        yield IndexShard(number, index.layout, faiss_index, table)
