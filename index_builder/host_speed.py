"""How fast this host is at what a build and a join are made of, measured in a moment.

Each rate is the best of a few repetitions on made data, so that a pause of the machine does not count.
They serve predictions only: nothing that is measured here decides what a run writes.
"""

import dataclasses
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from index_builder import embeddings, storage
from index_builder.assignment import nearest_lists
from index_builder.vectors import unit_float16

_QUERY_ROWS = 1024
_CORPUS_ROWS = 2048
# Copies of the corpus for the pairs of a join, whose heaps are full most of the time.
_CORPUS_COPIES = 4
_KMEANS_CLUSTERS = 1024
_FILE_ROWS = 4096
# Up to so many rows, all of this is divided by so much.
_SMALL_ROWS = 20_000
_SMALL_SHARE = 8
_LEAST_CALLS = 3
_SEED = 0


@dataclasses.dataclass(frozen=True)
class HostSpeed:
    """Rates a second, with all cores.

    Floating-point operations of NumPy's products and of k-means by FAISS; pairs that are scored and
    selected, of the dimension that was measured; numbers brought to unit length; bytes written to and
    read from Parquet, and hashed. `seconds` is what measuring took.
    """

    product32: float
    product64: float
    kmeans: float
    assigned_pairs: float
    joined_pairs: float
    unit_numbers: float
    written_bytes: float
    read_bytes: float
    hashed_bytes: float
    cores: int
    seconds: float


def measure_host(
    rows: int, dim: int, nlist: int, nprobe: int, k: int, folder: str, seconds_each: float = 0.01
) -> HostSpeed:
    """Measures this host at `rows` vectors of `dim` numbers, nprobe of nlist lists and k neighbours.

    Writes a small file into `folder`, or to the temporary folder where that is a bucket, and removes
    it. Takes ten times `seconds_each` and what four calls of each cost. A small catalogue is measured
    at small sizes, in the temporary folder, and once in a process.
    """
    if rows <= _SMALL_ROWS:
        return _measure_once(dim, nlist, nprobe, k, seconds_each)
    return _measure(1, dim, nlist, nprobe, k, _local_folder(folder), seconds_each)


@functools.lru_cache(maxsize=64)
def _measure_once(dim: int, nlist: int, nprobe: int, k: int, seconds_each: float) -> HostSpeed:
    return _measure(_SMALL_SHARE, dim, nlist, nprobe, k, None, seconds_each)


def _measure(
    share: int, dim: int, nlist: int, nprobe: int, k: int, folder: str | None, seconds_each: float
) -> HostSpeed:
    query_rows, corpus_rows = _QUERY_ROWS // share, _CORPUS_ROWS // share
    begun = time.perf_counter()
    rng = np.random.default_rng(_SEED)
    codes, _ = unit_float16(rng.standard_normal((corpus_rows, dim), dtype=np.float32))
    queries, corpus = codes[:query_rows], codes
    # Numbers of a vector in another order are another vector of unit length.
    large = np.concatenate([np.roll(codes, shift, axis=1) for shift in range(_CORPUS_COPIES)])

    def rate(work: float, call: Callable[[], object]) -> float:
        call()
        best, calls, stop, end = np.inf, 0, 0.0, time.perf_counter() + seconds_each
        while calls < _LEAST_CALLS or stop < end:
            start = time.perf_counter()
            call()
            stop = time.perf_counter()
            best, calls = min(best, stop - start), calls + 1
        return work / max(best, 1e-9)

    left, right = queries.astype(np.float32), corpus.astype(np.float32)
    flop = 2.0 * len(left) * len(right) * dim
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    lists = corpus[: min(nlist, len(corpus))]
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(right[: min(_KMEANS_CLUSTERS, nlist)])
    kmeans_flop = 2.0 * len(right) * quantizer.ntotal * dim
    few = right[:256].astype(np.float64)
    with tempfile.TemporaryDirectory(dir=folder, prefix=storage.TEMPORARY_PREFIX) as place:
        path = os.path.join(place, "speed.parquet")
        file_codes = np.resize(codes, (_FILE_ROWS // share, dim))
        table = pa.table({"code": embeddings.list_array(file_codes)})
        data = file_codes.tobytes()

        def write() -> None:
            with embeddings.parquet_writer(path, table.schema) as writer:
                writer.write_table(table, row_group_size=embeddings.ROW_GROUP_ROWS)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        def read() -> None:
            embeddings.list_matrix(pq.read_table(path)["code"])

        # A further pair of a long list: the first ones, which fill the heaps, are left out.
        k = min(k, len(corpus))
        first = 1 / rate(1.0, lambda: nearest_lists(queries, corpus, k))
        all_of_them = 1 / rate(1.0, lambda: nearest_lists(queries, large, k))
        further = max(all_of_them - first, all_of_them / 4)
        pairs = len(queries) * (len(large) - len(corpus))
        return HostSpeed(
            rate(flop, lambda: left @ right.T),
            rate(flop, lambda: wide_left @ wide_right.T),
            rate(kmeans_flop, lambda: quantizer.search(right, 1)),
            rate(
                len(queries) * len(lists),
                lambda: nearest_lists(queries, lists, min(nprobe, len(lists))),
            ),
            pairs / further,
            rate(few.size, lambda: unit_float16(few)),
            rate(len(data), write),
            rate(len(data), read),
            rate(len(data), lambda: hashlib.sha256(data).digest()),
            len(os.sched_getaffinity(0)),
            time.perf_counter() - begun,
        )


def _local_folder(folder: str) -> str | None:
    """Returns a local folder that exists, or None for the temporary one."""
    return folder if not storage.is_remote(folder) and os.path.isdir(folder) else None
