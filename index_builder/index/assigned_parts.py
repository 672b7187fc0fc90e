"""Assigned parts: embeddings transformed and sorted by list, the scratch that shards are made from.

One part of the embeddings becomes one Parquet file, in runs sorted by list. A shard reads the few row
groups of each run that hold its lists, so embeddings of any size pass through bounded memory.
"""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, storage
from index_builder.errors import DatasetError
from index_builder.index.assignment import nearest_lists
from index_builder.index.row_order import row_order, vector_keys
from index_builder.index.sharding import IndexLayout
from index_builder.index.training import TrainedIndex

# Columns of the embeddings that the index does not need again.
DROPPED = ("vector", "content_sha256", "width", "height", "format")
# Rows that are transformed and assigned at once.
_BLOCK_ROWS = 4096
# Small row groups, so that a shard reads little beside its own lists.
_GROUP_ROWS = 1024
# Codes of an assigned part that are sorted together.
RUN_BYTES = 128 << 20
# Key of the largest relative rounding in the file's metadata.
_ROUNDING = "worst_relative_rounding"


def assign_part(
    blocks: Iterable[pa.Table],
    trained: TrainedIndex,
    nprobe: int,
    path: str,
    run_bytes: int = RUN_BYTES,
) -> None:
    """Transforms and assigns one part of the embeddings and writes it in runs sorted by list.

    The result is scratch for `build_shard`: a Parquet file with columns `list` int32, `key` uint64
    (row_order.vector_keys), `code` (the bytes of float16 [dim], since Parquet handles a list number by
    number and bytes at the speed of memory), `probes` int32 [nprobe], and the columns of the
    embeddings that the index keeps.

    Memory: one run of about `run_bytes` of codes with its other columns, and one block of `blocks`. A
    part larger than that is written as several runs, of which a shard reads a few row groups each.
    """
    rows = max(_BLOCK_ROWS, run_bytes // (2 * trained.dim))
    with storage.atomic_path(path) as temporary, contextlib.ExitStack() as stack:
        writer, worst = None, 0.0
        run = _Run(rows, trained.dim, nprobe)
        for block in _cut_blocks(blocks):
            codes, error = trained.transform.apply_and_measure(embeddings.list_matrix(block["vector"]))
            worst = max(worst, error)
            probes = nearest_lists(codes, trained.centroids, nprobe, trained.transform.metric)
            kept = block.drop_columns([name for name in DROPPED if name in block.column_names])
            if writer is None:
                schema = run.schema(kept.schema)
                writer = stack.enter_context(
                    pq.ParquetWriter(
                        temporary, schema, compression="NONE", write_statistics=["list"],
                        use_dictionary=[field.name for field in kept.schema],
                    )
                )  # fmt: skip
            if run.rows + len(block) > rows:
                run.write(writer)
            run.add(codes, probes, kept)
        if writer is not None:
            run.write(writer)
            writer.add_key_value_metadata({_ROUNDING: repr(worst)})


def _cut_blocks(blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields blocks of at most _BLOCK_ROWS rows; an empty block stays, so that columns are known."""
    for block in blocks:
        for start in range(0, max(1, len(block)), _BLOCK_ROWS):
            yield block.slice(start, _BLOCK_ROWS)


class _Run:
    """Assigned rows that are sorted by list and written together."""

    def __init__(self, capacity: int, dim: int, nprobe: int) -> None:
        # Memory is taken as rows come in: the arrays are not touched before.
        self._codes = np.empty((capacity, dim), dtype=np.float16)
        self._probes = np.empty((capacity, nprobe), dtype=np.int32)
        self._tables: list[pa.Table] = []
        self.rows = 0

    def schema(self, kept: pa.Schema) -> pa.Schema:
        """Returns the columns of an assigned part, given those that it keeps of the embeddings."""
        return self._table(kept.empty_table(), np.empty(0, dtype=np.int64)).schema

    def add(self, codes: NDArray[np.float16], probes: NDArray[np.int32], kept: pa.Table) -> None:
        """Takes in a block of rows."""
        stop = self.rows + len(codes)
        self._codes[self.rows : stop], self._probes[self.rows : stop] = codes, probes
        self._tables.append(kept)
        self.rows = stop

    def write(self, writer: pq.ParquetWriter) -> None:
        """Writes the rows sorted by list, a row group at a time, and forgets them."""
        if self.rows:
            kept = pa.concat_tables(self._tables).combine_chunks()
            order = np.argsort(self._probes[: self.rows, 0], kind="stable")
            for start in range(0, self.rows, _GROUP_ROWS):
                rows = order[start : start + _GROUP_ROWS]
                writer.write_table(self._table(kept.take(rows), rows))
        self._tables, self.rows = [], 0

    def _table(self, kept: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
        codes, probes = self._codes[rows], self._probes[rows]
        columns = {
            "list": pa.array(np.ascontiguousarray(probes[:, 0])),
            "key": pa.array(vector_keys(codes)),
            "code": as_bytes(codes),
            "probes": embeddings.list_array(probes),
        }
        for name, values in columns.items():
            kept = kept.append_column(name, values)
        return kept


def as_bytes(codes: NDArray[np.float16]) -> pa.FixedSizeBinaryArray:
    """Wraps float16 [n, dim] as an Arrow column of bytes without copying them."""
    rows = np.ascontiguousarray(codes)
    kind = pa.binary(2 * rows.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])


def _from_bytes(column: pa.ChunkedArray, dim: int) -> NDArray[np.float16]:
    """Returns what `as_bytes` wrapped."""
    array = column.combine_chunks()
    content = array.buffers()[1]
    codes = np.frombuffer(content, np.float16) if len(array) else np.empty(0, np.float16)
    return codes[array.offset * dim : (array.offset + len(array)) * dim].reshape(-1, dim)


def assigned_list_sizes(path: str, nlist: int) -> NDArray[np.int64]:
    """Counts the rows of each list in an assigned part, int64 [nlist]."""
    with storage.open_arrow(path) as file:
        lists = pq.read_table(file, columns=["list"])["list"].to_numpy()
    return np.bincount(lists, minlength=nlist).astype(np.int64)


def assigned_rounding(path: str) -> float:
    """Returns the largest relative error that rounding to float16 made in an assigned part."""
    with storage.open_arrow(path) as file:
        return float(pq.read_metadata(file).metadata[_ROUNDING.encode()])


def gather_shard(shard: int, layout: IndexLayout, paths: list[str]) -> pa.Table:
    """Returns the rows of a shard from assigned parts: `list`, `code` and the columns they keep."""
    codes, table = gather_rows(shard, layout, paths)
    lists = np.repeat(
        np.arange(*layout.shard_lists(shard), dtype=np.int32),
        [stop - start for start, stop in list_bounds(layout, shard).values()],
    )
    table = table.append_column("list", pa.array(lists))
    return table.append_column("code", embeddings.list_array(codes))


def list_bounds(layout: IndexLayout, shard: int) -> dict[int, tuple[int, int]]:
    """Returns the range of a shard's rows in each list that it has rows of, or that lies between."""
    lists = range(*layout.shard_lists(shard))
    return {number: layout.list_rows(shard, number) for number in lists}


def gather_rows(
    shard: int, layout: IndexLayout, paths: list[str]
) -> tuple[NDArray[np.float16], pa.Table]:
    """Returns the codes of a shard, float16 [rows, dim], and its other columns, in the index's order.

    In a list, rows are in the order of row_order. A first pass over the assigned parts reads two
    narrow columns and finds the place of every row, a second one puts the rows there.
    """
    first_list, last_list = layout.shard_lists(shard)
    start, stop = layout.shard_rows(shard)
    found = [
        (block["list"].to_numpy(), block["key"].to_numpy())
        for block in _read_lists(paths, first_list, last_list, ["list", "key"])
    ]
    lists = np.concatenate([lists for lists, _ in found])
    keys = np.concatenate([keys for _, keys in found])

    def ids(rows: NDArray[np.int64]) -> list[str]:
        return _take_ids(paths, first_list, last_list, rows)

    order = row_order(lists, keys, ids)
    skipped = start - int(layout.list_offsets[first_list])
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order)) - skipped
    del found, lists, keys, order

    with storage.open_arrow(paths[0]) as file:
        dim = pq.read_schema(file).field("code").type.byte_width // 2
    codes = np.empty((stop - start, dim), dtype=np.float16)
    tables, owned_places, seen = [], [], 0
    for block in _read_lists(paths, first_list, last_list, None):
        place = places[seen : seen + len(block)]
        seen += len(block)
        owned = np.flatnonzero((place >= 0) & (place < stop - start))
        codes[place[owned]] = _from_bytes(block["code"], dim)[owned]
        tables.append(block.drop_columns(["code", "list", "key"]).take(owned))
        owned_places.append(place[owned])
    inverse = np.argsort(np.concatenate(owned_places))
    return codes, pa.concat_tables(tables).combine_chunks().take(inverse)


def _take_ids(paths: list[str], first_list: int, last_list: int, rows: NDArray[np.int64]) -> list[str]:
    """Returns the image ids of some rows, numbered as `_read_lists` yields them."""
    ascending, inverse = np.unique(rows, return_inverse=True)
    names: list[str] = []
    seen = 0
    for block in _read_lists(paths, first_list, last_list, ["list", "image_id"]):
        begin, end = np.searchsorted(ascending, [seen, seen + len(block)])
        names += block["image_id"].take(ascending[begin:end] - seen).to_pylist()
        seen += len(block)
    return [names[place] for place in inverse]


def _read_lists(
    paths: list[str], first_list: int, last_list: int, columns: list[str] | None
) -> Iterator[pa.Table]:
    """Yields the rows of lists first <= list < last of assigned parts, a row group at a time."""
    for path in paths:
        with storage.open_arrow(path) as file:
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):
                statistics = _list_statistics(parquet, group)
                if statistics.max >= first_list and statistics.min < last_list:
                    table = parquet.read_row_group(group, columns=columns)
                    bounds = np.searchsorted(table["list"].to_numpy(), [first_list, last_list])
                    yield table.slice(bounds[0], bounds[1] - bounds[0])


def _list_statistics(parquet: pq.ParquetFile, group: int) -> pq.Statistics:
    metadata = parquet.metadata.row_group(group)
    # Leaf columns are counted in Parquet's own order.
    chunks = (metadata.column(number) for number in range(metadata.num_columns))
    statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == "list"]
    if not statistics or statistics[0] is None:
        raise DatasetError(
            "An assigned part has no statistics of its list column. Delete the _work folder of the "
            "index and build it again."
        )
    return statistics[0]
