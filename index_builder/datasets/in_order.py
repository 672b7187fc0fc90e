"""Work on a few threads whose results come in the order of what was given, in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Reading Parquet with more threads takes more memory and is seldom faster: the disk is the limit.
MOST_READERS = 4


def cores() -> int:
    """Returns the cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def readers() -> int:
    """Returns how many threads read Parquet at the same time."""
    return min(MOST_READERS, cores())


def map_in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yields work(item) of every item, in their order, worked out by so many threads.

    At most `threads` results are there or being made while the caller holds another one; with one
    thread nothing is done ahead, in the caller's own. An exception of an item comes in its place, and
    nothing is begun after it.
    """
    if threads <= 1:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(waiting) == threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
