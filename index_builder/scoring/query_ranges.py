"""Ranges of the queries of a scan, and which thread is at which.

There is one range more than threads, and a thread takes a few lists of the range that has most to do:
so ranges are long, which products like, and yet all threads end together.
"""

import threading
from collections.abc import Iterable, Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Queries of one range: enough that many probe the same list, few enough to bound their memory.
_MOST_RANGE_ROWS = 131072
_LEAST_RANGE_ROWS = 1024
# What a thread takes of a range at a time: a share of what is left, and at least so many probes and
# such a share of all.
_TAKEN_SHARE = 4
_LEAST_TAKEN = 2048
_LEAST_SHARE = 32


class QueryRange:
    """What is left to do for a range of queries: lists, and the queries that probe each."""

    def __init__(self, probes: NDArray[np.int32], rows: NDArray[np.int64], lists: range) -> None:
        self._probes, self._rows, self._lists = probes, rows, lists
        self._made = False
        self._place, self._at = 0, 0
        # Until the probes are looked at, as many as there may be.
        self.left = len(rows) * probes.shape[1]

    def take(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yields a few lists with the queries that probe them, those nearest to queries first."""
        if not self._made:
            self._group()
        least = max(_LEAST_TAKEN, len(self._probing) // _LEAST_SHARE)
        stop = self._at + max(least, self.left // _TAKEN_SHARE)
        while self.left and self._at < stop:
            end = int(self._ends[self._place])
            until = end if end - stop < least else stop
            slots = self._probing[self._at : until].astype(np.int64)
            yield int(self._numbers[self._place]), slots
            self._place += until == end
            self.left -= until - self._at
            self._at = until

    def _group(self) -> None:
        """Groups the queries by list: by the first probe of each, then by the others."""
        numbers, ends = [], []
        probing: list[NDArray[np.int32]] = []
        for first, last in ((0, 1), (1, self._probes.shape[1])):
            offsets, grouped = group_by_list(
                self._probes, self._rows, first, last, self._lists.start, self._lists.stop
            )
            probed = np.flatnonzero(np.diff(offsets))
            numbers.append(probed + self._lists.start)
            ends.append(offsets[probed + 1] + sum(len(before) for before in probing))
            probing.append(grouped.astype(np.int32))
        self._numbers, self._ends = np.concatenate(numbers), np.concatenate(ends)
        self._probing = np.concatenate(probing)
        self.left = len(self._probing)
        self._made = True


class Schedule:
    """Which thread does what: hands out ranges that nobody is at, those with most to do first.

    Ranges go in rounds: another one begins when no range of those before is free.
    """

    def __init__(self, rounds: Iterable[list[QueryRange]]) -> None:
        self._rounds = iter(rounds)
        self._lock = threading.Lock()
        self._free: list[QueryRange] = []
        self._stopped = False

    def acquire(self) -> QueryRange | None:
        """Returns a range that is the caller's until it is released; None: there is no more to do."""
        with self._lock:
            if not self._free:
                self._free = next(self._rounds, [])
            if self._stopped or not self._free:
                return None
            found = max(self._free, key=lambda one: one.left)
            self._free.remove(found)
            return found

    def release(self, done: QueryRange) -> None:
        """Takes a range back."""
        with self._lock:
            if done.left:
                self._free.append(done)

    def stop(self) -> None:
        """Hands out nothing more."""
        self._stopped = True


def count_ranges(queries: int, threads: int) -> tuple[int, int]:
    """Returns how many ranges are scanned at once, one more than threads where it pays, and rounds."""
    many = threads > 1 and queries >= _LEAST_RANGE_ROWS * threads
    at_once = max(1, min(queries, threads + many))
    return at_once, max(1, -(-queries // (at_once * _MOST_RANGE_ROWS)))


@njit(cache=True, nogil=True)
def count_probes(probes: NDArray[np.int32], lists: int) -> NDArray[np.int64]:
    """Counts how often each list is among the probes, int64 [lists]."""
    counts = np.zeros(lists, dtype=np.int64)
    for row in range(probes.shape[0]):
        for column in range(probes.shape[1]):
            counts[probes[row, column]] += 1
    return counts


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
