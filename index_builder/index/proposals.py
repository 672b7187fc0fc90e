"""The rows with the least sums of every query: what a compressed search proposes.

A proposal's key is its sum and, below it, its row in the whole index, so no two are equal and the best
are the same whatever the order of the offers. Rules are applied before a proposal is kept.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.rules.rules import CandidateCodes, QueryCodes
from index_builder.scoring.tiles import excludes

# Bits of a key that hold the row.
_ROW_BITS = 40
_MOST_ROWS = 1 << _ROW_BITS
_ROW_MASK = np.uint64(_MOST_ROWS - 1)
# A query has room for so many more than it keeps, at least: when it is full, the best remain.
_LEAST_SPARE = 64
# Keys that a pivot is chosen from.
_SAMPLED = 15
# Sums that are compared with the limit before anything else is decided.
_CHUNK = 64


def room(kept: int) -> int:
    """Returns how many keys a query has room for; each takes 8 bytes."""
    return kept + max(_LEAST_SPARE, kept)


class _Pools(NamedTuple):
    """Keys uint64 [n, room], how many, and the key below which another one is let in."""

    keys: NDArray[np.uint64]
    counts: NDArray[np.int64]
    limits: NDArray[np.uint64]


class Proposals:
    """The best `kept` proposals so far of n queries.

    Memory: 8 room(kept) bytes a query. Raises ValueError for an index of more than 2^40 rows.
    """

    def __init__(self, queries: int, kept: int, index_rows: int) -> None:
        if index_rows > _MOST_ROWS:
            raise ValueError(f"the index has {index_rows} rows, wanted at most {_MOST_ROWS}")
        self.kept = kept
        self._pools = _Pools(
            np.empty((queries, room(kept)), dtype=np.uint64),
            np.zeros(queries, dtype=np.int64),
            np.full(queries, np.iinfo(np.uint64).max, dtype=np.uint64),
        )

    def offer(
        self,
        sums: NDArray[np.int32],
        slots: NDArray[np.int64],
        queries: QueryCodes,
        candidates: CandidateCodes,
        first_row: int,
    ) -> None:
        """Offers rows from `first_row` on, with sums int32 [m, rows], to the queries `slots` [m].

        `queries` are the codes of all queries, `candidates` those of the rows. Different threads may
        offer to different queries at the same time. No row may be offered twice.
        """
        _offer(
            sums, slots, np.uint64(first_row), self.kept, self._pools,
            queries.same, queries.different, queries.excluded_offsets, queries.excluded,
            candidates.same, candidates.different, candidates.excluded, candidates.eligible,
        )  # fmt: skip

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the rows proposed, int64 [n, kept] (in any order), and how many there are, int64 [n].

        Nothing can be offered afterwards: the rows take the place of the keys.
        """
        return _finish(self.kept, self._pools)[:, : self.kept], self._pools.counts


@njit(cache=True, nogil=True)
def _partition(keys: NDArray[np.uint64], q: int, low: int, high: int, pivot: int) -> int:
    """Puts the keys of low to high that are below a pivot first; returns where the others begin.

    Without branches: half of them would be guessed wrong.
    """
    place = low
    for i in range(low, high):
        key = keys[q, i]
        keys[q, i] = keys[q, place]
        keys[q, place] = key
        place += int(key < pivot)
    return place


@njit(cache=True, nogil=True)
def _select(
    keys: NDArray[np.uint64], q: int, count: int, least: int, most: int, sample: NDArray[np.uint64]
) -> int:
    """Puts the best of the first `count` keys of a row, which differ, first; returns how many.

    They are between `least` and `most`, which are at least 1 and less than `count`. `sample` is scratch
    of _SAMPLED keys. (Rows are not sliced: a slice counts a reference, in memory that threads share.)
    """
    low, high = 0, count
    while True:
        length = high - low
        if length <= _SAMPLED:
            # Insertion sort of what is left: then as many as are wanted are the best.
            for i in range(low + 1, high):
                key, j = keys[q, i], i
                while j > low and keys[q, j - 1] > key:
                    keys[q, j] = keys[q, j - 1]
                    j -= 1
                keys[q, j] = key
            return least
        for i in range(_SAMPLED):
            key, j = keys[q, low + i * (length - 1) // (_SAMPLED - 1)], i
            while j > 0 and sample[j - 1] > key:
                sample[j] = sample[j - 1]
                j -= 1
            sample[j] = key
        wanted = (least + most) // 2 - low
        pivot = sample[min(_SAMPLED - 1, max(1, wanted * _SAMPLED // length))]
        place: int = _partition(keys, q, low, high, pivot)
        if least <= place <= most:
            return place
        if place > most:
            high = place
        else:
            low = place


@njit(cache=True, nogil=True)
def _survivors(sums: NDArray[np.int32], i: int, most: int, found: NDArray[np.int32]) -> int:
    """Writes the places of row i's sums that are at most `most` to `found`; returns how many."""
    count = 0
    for start in range(0, sums.shape[1], _CHUNK):
        stop = min(start + _CHUNK, sums.shape[1])
        hits = np.uint8(0)
        for j in range(start, stop):
            hits |= np.uint8(sums[i, j] <= most)
        if hits != 0:
            for j in range(start, stop):
                found[count] = j
                count += int(sums[i, j] <= most)
    return count


@njit(cache=True, nogil=True)
def _offer(
    sums: NDArray[np.int32],
    slots: NDArray[np.int64],
    first_row: int,
    kept: int,
    pools: _Pools,
    q_same: NDArray[np.int32],
    q_different: NDArray[np.int32],
    q_excluded_offsets: NDArray[np.int64],
    q_excluded: NDArray[np.int32],
    x_same: NDArray[np.int32],
    x_different: NDArray[np.int32],
    x_excluded: NDArray[np.int32],
    eligible: NDArray[np.bool_],
) -> None:
    keys, counts, limits = pools
    shift = np.uint64(_ROW_BITS)
    most_sum = np.int64(np.iinfo(np.int32).max)
    slack = kept + (keys.shape[1] - kept) // 2
    # One more: what is not found is written, too.
    found = np.empty(sums.shape[1] + 1, dtype=np.int32)
    sample = np.empty(_SAMPLED, dtype=np.uint64)
    for i in range(slots.shape[0]):
        q = slots[i]
        count, limit = counts[q], limits[q]
        most = np.int32(min(most_sum, np.int64(limit >> shift)))
        for place in range(_survivors(sums, i, most, found)):
            x = found[place]
            key = (np.uint64(sums[i, x]) << shift) | (first_row + np.uint64(x))
            if key >= limit:
                continue
            allowed = eligible[x]
            for rule in range(q_same.shape[0]):
                code = q_same[rule, q]
                allowed &= code >= 0 and code == x_same[rule, x]
            for rule in range(q_different.shape[0]):
                code = q_different[rule, q]
                allowed &= code < 0 or code != x_different[rule, x]
            if allowed and x_excluded[x] >= 0:
                low, high = q_excluded_offsets[q], q_excluded_offsets[q + 1]
                allowed = not excludes(q_excluded, low, high, x_excluded[x])
            if not allowed:
                continue
            keys[q, count] = key
            count += 1
            if count == keys.shape[1]:
                count = _select(keys, q, count, kept, slack, sample)
                # At least `kept` are below it or equal, so what is above is out for good.
                limit = keys[q, 0]
                for place_of in range(1, count):
                    limit = max(limit, keys[q, place_of])
        counts[q], limits[q] = count, limit


@njit(cache=True, nogil=True)
def _finish(kept: int, pools: _Pools) -> NDArray[np.int64]:
    keys, counts, _ = pools
    sample = np.empty(_SAMPLED, dtype=np.uint64)
    for q in range(keys.shape[0]):
        if counts[q] > kept:
            counts[q] = _select(keys, q, counts[q], kept, kept, sample)
        for place in range(counts[q]):
            keys[q, place] &= _ROW_MASK
    return keys.view(np.int64)
