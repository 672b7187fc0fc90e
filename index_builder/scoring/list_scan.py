"""Scanning inverted lists: each thread owns ranges of the queries and runs every list for them.

For a list there is one matrix product of the queries of the range that probe it by the list's rows.
The lists nearest to the queries come first, so that thresholds are tight before the rest. Threads
share nothing but the lists: no barriers between lists, and products of one thread each.
"""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.blocks import PreparedCandidates, PreparedQueries
from index_builder.scoring.products import Product, single_threaded
from index_builder.scoring.topk import Scorer, TopK

# Queries of one range: enough that many probe the same list, few enough that threads end together.
_MOST_RANGE_ROWS = 65536
_LEAST_RANGE_ROWS = 1024
_RANGES_A_THREAD = 3


class ListScan:
    """Queries on their way through lists; made by `list_scan`."""

    def __init__(
        self,
        top: TopK,
        queries: PreparedQueries,
        probes: NDArray[np.int32],
        pool: ThreadPoolExecutor,
        threads: int,
        product: Product | None,
    ) -> None:
        self._top = top
        self._queries = queries
        self._probes = np.ascontiguousarray(probes)
        self._pool = pool
        self._product = product
        self._idle: queue.SimpleQueue[Scorer] = queue.SimpleQueue()
        # Neighbouring queries probe the same lists.
        order = np.argsort(self._probes[:, 0], kind="stable").astype(np.int64)
        rows = range_rows(len(order), threads)
        self._ranges = [order[start : start + rows] for start in range(0, len(order), rows)]

    def run(self, lists: range, candidates: Callable[[int], PreparedCandidates | None]) -> None:
        """Offers the rows of some lists to the queries that probe them.

        `candidates` returns the rows of a list, or None; several threads call it at once.
        """

        def scan(rows: NDArray[np.int64]) -> None:
            with self._scorer() as scorer:
                self._scan(scorer, rows, lists, candidates)

        # Exceptions of the threads are raised here.
        for _ in self._pool.map(scan, self._ranges):
            pass

    @contextlib.contextmanager
    def _scorer(self) -> Iterator[Scorer]:
        try:
            scorer = self._idle.get_nowait()
        except queue.Empty:
            scorer = Scorer(self._queries.vectors.shape[1], self._product)
        try:
            yield scorer
        finally:
            self._idle.put(scorer)

    def _scan(
        self,
        scorer: Scorer,
        rows: NDArray[np.int64],
        lists: range,
        candidates: Callable[[int], PreparedCandidates | None],
    ) -> None:
        for first, last in ((0, 1), (1, self._probes.shape[1])):
            if first == last:
                continue
            offsets, probing = group_by_list(self._probes, rows, first, last, lists.start, lists.stop)
            for place in np.flatnonzero(np.diff(offsets)):
                found = candidates(lists.start + int(place))
                if found is not None and found.distinct:
                    slots = probing[offsets[place] : offsets[place + 1]]
                    scorer.offer(self._top, slots, self._queries, slots, found)

    def count(self) -> None:
        """Adds the pairs proposed and scored so far to the figures of the top-k."""
        scorers = []
        with contextlib.suppress(queue.Empty):
            while True:
                scorers.append(self._idle.get_nowait())
        self._top.proposed += sum(scorer.proposed for scorer in scorers)
        self._top.rescored += sum(scorer.rescored for scorer in scorers)


@contextlib.contextmanager
def list_scan(
    top: TopK,
    queries: PreparedQueries,
    probes: NDArray[np.int32],
    threads: int | None = None,
    product: Product | None = None,
) -> Iterator[ListScan]:
    """Opens a scan for queries that probe the lists `probes`, int32 [n, nprobe], nearest first.

    Query i has slot i of `top`. `threads` defaults to the cores of this process, `product` to the
    fastest product of the host. Memory: a Scorer a thread.
    """
    threads = threads or len(os.sched_getaffinity(0))
    with single_threaded(), ThreadPoolExecutor(threads) as pool:
        scan = ListScan(top, queries, probes, pool, threads, product)
        yield scan
        scan.count()


def range_rows(queries: int, threads: int) -> int:
    """Returns how many queries make a range."""
    fair = max(_LEAST_RANGE_ROWS, queries // (threads * _RANGES_A_THREAD))
    return max(1, min(_MOST_RANGE_ROWS, fair, -(-queries // threads)))


@njit(cache=True, nogil=True)
def group_by_list(
    probes: NDArray[np.int32],
    rows: NDArray[np.int64],
    first_column: int,
    last_column: int,
    first_list: int,
    last_list: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups some rows of `probes` by the lists that they name in some columns.

    Returns offsets int64 [lists + 1] and the rows that name each list, in the order of `rows`.
    """
    offsets = np.zeros(last_list - first_list + 1, dtype=np.int64)
    for row in rows:
        for column in range(first_column, last_column):
            number = probes[row, column]
            if first_list <= number < last_list:
                offsets[number - first_list + 1] += 1
    offsets = np.cumsum(offsets)
    ends = offsets[:-1].copy()
    grouped = np.empty(offsets[-1], dtype=np.int64)
    for row in rows:
        for column in range(first_column, last_column):
            number = probes[row, column]
            if first_list <= number < last_list:
                grouped[ends[number - first_list]] = row
                ends[number - first_list] += 1
    return offsets, grouped
