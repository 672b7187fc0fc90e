"""The order of rows inside an inverted list: equal vectors side by side, in the order of their ids.

Rows are sorted by a 64-bit key of the vector's bytes, so a shard's rows are put in order from a few
bytes a row, and the order depends neither on the parts of the embeddings nor on how shards are cut.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def vector_keys(codes: NDArray[np.float16]) -> NDArray[np.uint64]:
    """Returns a key of each vector's bytes, uint64 [n]: equal for equal bytes, else as good as never.

    A multilinear hash of the 16-bit words modulo 2^64: two different vectors share a key with a chance
    of 2^-48 at most. Such a pair may interleave their copies; nothing relies on it not to.
    """
    words = np.ascontiguousarray(codes).view(np.uint16).astype(np.uint64)
    keys: NDArray[np.uint64] = words @ _multipliers(codes.shape[1])
    return keys


def _multipliers(dim: int) -> NDArray[np.uint64]:
    """Returns odd 64-bit numbers, uint64 [dim]: the SplitMix64 sequence (Steele et al., 2014)."""
    z = np.arange(1, dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd: NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return odd


def row_order(
    lists: NDArray[np.int32],
    keys: NDArray[np.uint64],
    ids: Callable[[NDArray[np.int64]], list[str]],
) -> NDArray[np.int64]:
    """Returns the order of rows by (list, key, id bytes), int64 [n].

    `ids` returns the ids of some rows, in their order; it is asked only for rows that share list and
    key with another.
    """
    order: NDArray[np.int64] = np.lexsort((keys, lists)).astype(np.int64)
    same = (lists[order[1:]] == lists[order[:-1]]) & (keys[order[1:]] == keys[order[:-1]])
    if same.any():
        follows = np.concatenate([[False], same])
        places = np.flatnonzero(follows | np.concatenate([same, [False]]))
        rows, run = order[places], np.cumsum(~follows)[places]
        names = [name.encode() for name in ids(rows)]
        ranked = sorted(range(len(rows)), key=lambda i: (run[i], names[i]))
        order[places] = rows[ranked]
    return order
