"""One FAISS file of all shards, for a service that searches online with FAISS alone."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import storage
from index_builder.errors import ConfigError
from index_builder.index.faiss_file import write_lists
from index_builder.index.shards import IndexDataset, empty_faiss_index, open_shard, read_shard_table

FAISS_SUFFIX = ".faiss"


@dataclasses.dataclass(frozen=True)
class MergedIndex:
    """What a merge wrote: the FAISS file, and the Parquet file that names its rows."""

    faiss_path: str
    ids_path: str
    rows: int
    bytes: int


def merge_shards(index: IndexDataset, path: str) -> MergedIndex:
    """Writes all shards of an index as one FAISS file, and beside it a Parquet file of its rows.

    The FAISS file is of the same kind as the shards, its ids are row numbers of the index, its nprobe
    is set. `items.faiss` gets `items.parquet` with columns `row` int64, `image_id` and `item_id`.
    Both are replaced whole. Raises ConfigError for a path that does not end in .faiss, DatasetError
    for a shard that does not belong to the index.

    Memory: the centroids; codes are copied from mapped shards, one shard open at a time.
    """
    if not path.endswith(FAISS_SUFFIX):
        raise ConfigError(f"--merge is {path!r}, wanted a file name that ends in {FAISS_SUFFIX}.")
    empty = empty_faiss_index(index.trained)
    empty.nprobe = index.nprobe
    sizes = np.diff(index.layout.list_offsets)
    with storage.atomic_path(path) as temporary:
        write_lists(temporary, empty, sizes, _whole_lists(index))
    ids_path = path.removesuffix(FAISS_SUFFIX) + ".parquet"
    _write_ids(index, ids_path)
    return MergedIndex(path, ids_path, index.layout.rows, storage.size(path))


def _whole_lists(
    index: IndexDataset,
) -> Iterator[tuple[Iterator[NDArray[np.float16]], NDArray[np.int64]]]:
    """Yields the codes, in pieces, and the ids of every list; pieces must be taken in order."""
    for number, pieces in itertools.groupby(_pieces(index), key=lambda piece: piece[0]):
        start, stop = index.layout.list_offsets[number : number + 2]
        yield (codes for _, codes in pieces), np.arange(start, stop)


def _pieces(index: IndexDataset) -> Iterator[tuple[int, NDArray[np.float16]]]:
    """Yields (list, codes) of what each shard owns of each list; a view of the shard that is open."""
    for shard in range(index.layout.shards):
        with open_shard(index, shard, (), verify=True) as opened:
            for number in opened.lists:
                codes = opened.list_codes(number)
                if len(codes):
                    yield number, codes


def _write_ids(index: IndexDataset, path: str) -> None:
    names = ("image_id", "item_id")
    with storage.atomic_path(path) as temporary:
        writer = None
        try:
            for shard in range(index.layout.shards):
                start, stop = index.layout.shard_rows(shard)
                table = read_shard_table(index, shard, names)
                table = table.add_column(0, "row", pa.array(np.arange(start, stop)))
                if writer is None:
                    writer = pq.ParquetWriter(temporary, table.schema, compression="ZSTD")
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
