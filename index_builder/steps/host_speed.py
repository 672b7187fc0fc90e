"""How fast this host is at what a build and a join are made of, measured in a moment.

Each rate is the best of a few repetitions on made data, so that a pause of the machine does not count.
They serve predictions only: nothing that is measured here decides what a run writes.
"""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, storage
from index_builder.index import assigned_parts
from index_builder.index.assignment import NearestCentroids, nearest_lists
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import unit_float16

_QUERY_ROWS = 1024
_CORPUS_ROWS = 2048
# Copies of the corpus for the pairs of a join, whose heaps are full most of the time.
_CORPUS_COPIES = 4
_KMEANS_CLUSTERS = 1024
_FILE_ROWS = 4096
# Up to so many rows, all of this is divided by so much.
_SMALL_ROWS = 20_000
_SMALL_SHARE = 8
# A join of a few seconds should not wait half a second for its prediction.
_MIDDLE_ROWS = 500_000
_MIDDLE_SHARE = 4
_LEAST_CALLS = 3
_SEED = 0


@dataclasses.dataclass(frozen=True)
class JoinSpeed:
    """Rates a second, with all cores, of what a join is made of.

    Pairs that are scored and selected, of the dimension that was measured; bytes read from Parquet,
    and hashed.
    """

    joined_pairs: float
    read_bytes: float
    hashed_bytes: float


@dataclasses.dataclass(frozen=True)
class HostSpeed(JoinSpeed):
    """Those of a build too.

    Floating-point operations of NumPy's products and of finding the nearest centroids in k-means; pairs
    that are compared to assign a row; numbers brought to unit length; bytes written to Parquet.
    `seconds` is what measuring took.
    """

    product32: float
    product64: float
    kmeans: float
    assigned_pairs: float
    unit_numbers: float
    written_bytes: float
    cores: int
    seconds: float


def measure_host(
    rows: int, dim: int, nlist: int, nprobe: int, k: int, folder: str, seconds_each: float = 0.01
) -> HostSpeed:
    """Measures this host at `rows` vectors of `dim` numbers, nprobe of nlist lists and k neighbours.

    Writes a small file without a name to the disk of `folder`, or of the temporary folder where that
    is a bucket. Takes ten times `seconds_each` and what four calls of each cost. A small catalogue is
    measured at small sizes, in the temporary folder, and once in a process.
    """
    if rows <= _SMALL_ROWS:
        return _measure_once(dim, nlist, nprobe, k, seconds_each)
    return _measure(1, dim, nlist, nprobe, k, _local_folder(folder), seconds_each)


def measure_join(rows: int, dim: int, k: int, folder: str, seconds_each: float = 0.01) -> JoinSpeed:
    """Measures this host at a join of `rows` vectors alone, as `measure_host` does, much sooner.

    The kernels that it loads are those that the join needs next.
    """
    if rows <= _SMALL_ROWS:
        return _measure_join_once(dim, k, seconds_each)
    share = _MIDDLE_SHARE if rows <= _MIDDLE_ROWS else 1
    return _measure_join(share, dim, k, _local_folder(folder), seconds_each)


@functools.lru_cache(maxsize=64)
def _measure_once(dim: int, nlist: int, nprobe: int, k: int, seconds_each: float) -> HostSpeed:
    return _measure(_SMALL_SHARE, dim, nlist, nprobe, k, None, seconds_each)


@functools.lru_cache(maxsize=64)
def _measure_join_once(dim: int, k: int, seconds_each: float) -> JoinSpeed:
    return _measure_join(_SMALL_SHARE, dim, k, None, seconds_each)


def _measure_join(share: int, dim: int, k: int, folder: str | None, seconds_each: float) -> JoinSpeed:
    codes = _made_codes(share, dim)
    queries = codes[: _QUERY_ROWS // share]
    # Numbers of a vector in another order are another vector of unit length.
    large = np.concatenate([np.roll(codes, shift, axis=1) for shift in range(_CORPUS_COPIES)])
    # A further pair of a long list: the first ones, which fill the heaps, are left out.
    k = min(k, len(codes))
    first = 1 / _rate(1.0, lambda: nearest_lists(queries, codes, k), seconds_each)
    all_of_them = 1 / _rate(1.0, lambda: nearest_lists(queries, large, k), seconds_each)
    further = max(all_of_them - first, all_of_them / 4)
    pairs = len(queries) * (len(large) - len(codes))
    with storage.unnamed_file(folder) as path:
        data = _write_codes(path, share, codes)

        def read() -> None:
            embeddings.list_matrix(pq.read_table(path)["code"])

        return JoinSpeed(
            pairs / further,
            _rate(data.nbytes, read, seconds_each),
            _rate(data.nbytes, lambda: hashlib.sha256(data.data).digest(), seconds_each),
        )


def _measure(
    share: int, dim: int, nlist: int, nprobe: int, k: int, folder: str | None, seconds_each: float
) -> HostSpeed:
    begun = time.perf_counter()
    codes = _made_codes(share, dim)
    queries = codes[: _QUERY_ROWS // share]
    left, right = queries.astype(np.float32), codes.astype(np.float32)
    flop = 2.0 * len(left) * len(right) * dim
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    lists = codes[: min(nlist, len(codes))]
    centroids = codes[: min(_KMEANS_CLUSTERS, nlist)]
    # Enough rows that packing the centroids hardly counts.
    sampled = np.concatenate([np.roll(codes, shift + 1, axis=1) for shift in range(_CORPUS_COPIES)])
    nearest = NearestCentroids(sampled, Metric.COSINE)
    kmeans_flop = 2.0 * len(sampled) * len(centroids) * dim
    few = right[:256].astype(np.float64)
    joined = _measure_join(share, dim, k, folder, seconds_each)

    def rate(work: float, call: Callable[[], object]) -> float:
        return _rate(work, call, seconds_each)

    with storage.unnamed_file(folder) as path:
        written = _FILE_ROWS // share * codes[0].nbytes
        return HostSpeed(
            **dataclasses.asdict(joined),
            product32=rate(flop, lambda: left @ right.T),
            product64=rate(flop, lambda: wide_left @ wide_right.T),
            kmeans=rate(kmeans_flop, lambda: nearest.find(centroids)),
            assigned_pairs=rate(
                len(queries) * len(lists),
                lambda: nearest_lists(queries, lists, min(nprobe, len(lists))),
            ),
            unit_numbers=rate(few.size, lambda: unit_float16(few)),
            written_bytes=rate(written, lambda: _write_codes(path, share, codes, as_bytes=True)),
            cores=len(os.sched_getaffinity(0)),
            seconds=time.perf_counter() - begun,
        )


def _rate(work: float, call: Callable[[], object], seconds_each: float) -> float:
    call()
    best, calls, stop, end = np.inf, 0, 0.0, time.perf_counter() + seconds_each
    while calls < _LEAST_CALLS or stop < end:
        start = time.perf_counter()
        call()
        stop = time.perf_counter()
        best, calls = min(best, stop - start), calls + 1
    return work / max(best, 1e-9)


def _made_codes(share: int, dim: int) -> NDArray[np.float16]:
    rng = np.random.default_rng(_SEED)
    return unit_float16(rng.standard_normal((_CORPUS_ROWS // share, dim), dtype=np.float32))[0]


def _write_codes(
    path: str, share: int, codes: NDArray[np.float16], *, as_bytes: bool = False
) -> NDArray[np.float16]:
    """Writes a file of codes to the disk itself, as lists or as bytes; returns them."""
    written: NDArray[np.float16] = np.resize(codes, (_FILE_ROWS // share, codes.shape[1]))
    column = assigned_parts.as_bytes(written) if as_bytes else embeddings.list_array(written)
    table = pa.table({"code": column})
    with embeddings.parquet_writer(path, table.schema) as writer:
        writer.write_table(table, row_group_size=embeddings.ROW_GROUP_ROWS)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return written


def _local_folder(folder: str) -> str | None:
    """Returns a local folder that exists, or None for the temporary one."""
    return folder if not storage.is_remote(folder) and os.path.isdir(folder) else None
