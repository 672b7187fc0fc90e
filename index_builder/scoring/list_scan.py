"""Scanning inverted lists: ranges of the queries run through the lists, one thread at a time each.

For a list there is one matrix product of the queries of the range that probe it by the list's rows.
The lists nearest to the queries come first, so that thresholds are tight before the rest. Threads
share nothing but the lists: no barriers between lists, and products of one thread each. Which range
a thread is at, `query_ranges` says.
"""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from index_builder.scoring.blocks import PreparedCandidates, PreparedQueries
from index_builder.scoring.products import Product, product_for, single_threaded
from index_builder.scoring.query_ranges import QueryRange, Schedule, count_ranges
from index_builder.scoring.topk import Scorer, TopK


class ListScan:
    """Queries on their way through lists; made by `list_scan`."""

    def __init__(
        self,
        top: TopK,
        queries: PreparedQueries,
        probes: NDArray[np.int32],
        pool: ThreadPoolExecutor,
        threads: int,
        product: Product,
    ) -> None:
        self._top = top
        self._queries = queries
        self._probes = np.ascontiguousarray(probes)
        self._pool = pool
        self._product = product
        self._idle: queue.SimpleQueue[Scorer] = queue.SimpleQueue()
        # Neighbouring queries probe the same lists.
        order = np.argsort(self._probes[:, 0], kind="stable").astype(np.int64)
        at_once, rounds = count_ranges(len(order), threads)
        self._workers = min(threads, at_once)
        ranges = np.array_split(order, at_once * rounds)
        self._rounds = [ranges[first : first + at_once] for first in range(0, len(ranges), at_once)]

    def run(self, lists: range, candidates: Callable[[int], PreparedCandidates | None]) -> None:
        """Offers the rows of some lists to the queries that probe them.

        `candidates` returns the rows of a list, or None; several threads call it at once.
        """
        schedule = Schedule(
            [QueryRange(self._probes, rows, lists) for rows in ranges] for ranges in self._rounds
        )

        def work(_: int) -> None:
            try:
                with self._scorer() as scorer:
                    while (found := schedule.acquire()) is not None:
                        self._scan(scorer, found, candidates)
                        schedule.release(found)
            except BaseException:
                schedule.stop()
                raise

        # Exceptions of the threads are raised here.
        for _ in self._pool.map(work, range(self._workers)):
            pass

    @contextlib.contextmanager
    def _scorer(self) -> Iterator[Scorer]:
        try:
            scorer = self._idle.get_nowait()
        except queue.Empty:
            scorer = Scorer(self._queries.vectors.dim, self._product)
        try:
            yield scorer
        finally:
            self._idle.put(scorer)

    def _scan(
        self,
        scorer: Scorer,
        scanned: QueryRange,
        candidates: Callable[[int], PreparedCandidates | None],
    ) -> None:
        for number, slots in scanned.take():
            found = candidates(number)
            if found is not None and found.distinct:
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
    fastest product of the host for such queries. Memory: a Scorer a thread.
    """
    threads = threads or len(os.sched_getaffinity(0))
    product = product or product_for(queries.vectors)
    with single_threaded(), ThreadPoolExecutor(threads) as pool:
        scan = ListScan(top, queries, probes, pool, threads, product)
        yield scan
        scan.count()
