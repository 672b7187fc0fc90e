"""Sorting the few columns of a tile's row that may enter a heap, by their fast products."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import WIDE

# Columns that are sorted by ranking each among all; a multiple of WIDE.
MOST_RANKED = 128


@njit(cache=True, nogil=True)
def _sift_down(
    keys: NDArray[np.float32], found: NDArray[np.int32], base: int, start: int, count: int
) -> None:
    """Restores a binary heap of keys, the smallest first, below one entry; columns start at `base`."""
    key, column = keys[start], found[base + start]
    parent = start
    while True:
        child = 2 * parent + 1
        if child >= count:
            break
        if child + 1 < count and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[parent], found[base + parent] = keys[child], found[base + child]
        parent = child
    keys[parent], found[base + parent] = key, column


@njit(cache=True, nogil=True)
def sort_keys(
    keys: NDArray[np.float32],
    found: NDArray[np.int32],
    base: int,
    count: int,
    ranks: NDArray[np.int32],
    ranked_keys: NDArray[np.float32],
    ranked: NDArray[np.int32],
) -> None:
    """Sorts keys, none of them NaN, the largest first, and the columns from `base` on with them.

    A few are ranked by comparing each with all, many at a time: no branch depends on a key. `ranks`,
    `ranked_keys` and `ranked` are scratch of MOST_RANKED numbers.
    """
    if count < 2:
        return
    if count > MOST_RANKED:
        for start in range(count // 2 - 1, -1, -1):
            _sift_down(keys, found, base, start, count)
        for last in range(count - 1, 0, -1):
            keys[0], keys[last] = keys[last], keys[0]
            found[base], found[base + last] = found[base + last], found[base]
            _sift_down(keys, found, base, 0, last)
        return
    # Whole vectors: what lies beyond the last key is ranked, too, and left there.
    padded = np.uint64(-(-count // WIDE) * WIDE)
    for i in range(padded):
        ranks[i] = 0
    for j in range(np.uint64(count)):
        key = keys[j]
        for i in range(padded):
            ranks[i] += np.int32(key > keys[i])
        ranked[j] = -1
    for j in range(count):
        rank = ranks[j]
        while ranked[rank] >= 0:
            rank += 1
        ranked[rank], ranked_keys[rank] = found[base + j], keys[j]
    for j in range(count):
        found[base + j], keys[j] = ranked[j], ranked_keys[j]
