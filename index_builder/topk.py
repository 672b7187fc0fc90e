"""Exact top-k: a fast product proposes, an exact score decides, ties are ordered by id bytes.

The fast product is a float32 matrix product. A pair is scored exactly only when its fast score comes
within a computed error bound of the query's current k-th score, so the result is the true top-k of
all pairs that were offered, bit for bit, whatever the tile size, thread count or BLAS.
"""

import dataclasses

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from index_builder.rules import RuleCodes

# Unit roundoff of float32.
_UNIT_ROUNDOFF = 2.0**-24
QUERY_TILE_ROWS = 1024
CORPUS_TILE_ROWS = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class IdColumn:
    """String ids as Arrow keeps them: UTF-8 bytes one after another, and where each begins."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @staticmethod
    def from_arrow(column: pa.ChunkedArray | pa.Array) -> "IdColumn":
        """Wraps an Arrow string column without nulls."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        array = array.cast(pa.large_string())
        if len(array) == 0:
            return IdColumn(np.zeros(1, np.uint8), np.zeros(1, np.int64))
        _, offsets, data = array.buffers()
        starts = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        # One spare byte, so that a column of empty ids still has a buffer.
        content = np.frombuffer(data, np.uint8) if data is not None and data.size else None
        return IdColumn(np.zeros(1, np.uint8) if content is None else content, starts)

    @staticmethod
    def numbers(count: int) -> "IdColumn":
        """Returns ids whose byte order is the order of 0, 1, ..., count - 1."""
        data = np.arange(count, dtype=">u4").view(np.uint8)
        return IdColumn(data, np.arange(count + 1, dtype=np.int64) * 4)

    @property
    def max_bytes(self) -> int:
        """The length of the longest id, at least 1."""
        return max(1, int(np.diff(self.offsets).max(initial=1)))

    def slice(self, start: int, stop: int) -> "IdColumn":
        """Returns the ids of rows start to stop, sharing the bytes."""
        return IdColumn(self.data, self.offsets[start : stop + 1])


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Vectors with what decides about a pair: exact squared norms, ids and rule codes.

    `vectors` float32 [n, d], each number exactly a float16; `squared_norms` float64 [n], or ones
    where the score is the plain inner product.
    """

    vectors: NDArray[np.float32]
    squared_norms: NDArray[np.float64]
    codes: RuleCodes

    def __len__(self) -> int:
        return len(self.vectors)

    def slice(self, start: int, stop: int) -> "Block":
        """Returns the rows start to stop, sharing memory."""
        return Block(
            self.vectors[start:stop], self.squared_norms[start:stop], self.codes.slice(start, stop)
        )


class TopK:
    """The k best neighbours so far of n queries, best first.

    Ordered by score descending, then id bytes ascending. `scores` float32 [n, k] (-inf where
    empty), `rows` int64 [n, k] (-1 where empty), `counts` int64 [n].
    """

    def __init__(self, queries: int, k: int, id_bytes: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.rows = np.full((queries, k), -1, dtype=np.int64)
        self.counts = np.zeros(queries, dtype=np.int64)
        self._ids = np.zeros((queries, k, id_bytes), dtype=np.uint8)
        self._id_lengths = np.zeros((queries, k), dtype=np.int64)

    def offer(
        self,
        slots: NDArray[np.int64],
        queries: Block,
        corpus: Block,
        ids: IdColumn,
        first_row: int,
    ) -> None:
        """Offers every row of `corpus` to every one of `queries`.

        `slots` [m] says which of the n queries each row of `queries` is; `ids` and `first_row`
        belong to the corpus rows. No pair may be offered twice. Different threads may offer to
        different slots at the same time.
        """
        bound = error_bound(queries.vectors.shape[1])
        for q in range(0, len(queries), QUERY_TILE_ROWS):
            tile = queries.slice(q, q + QUERY_TILE_ROWS)
            for c in range(0, len(corpus), CORPUS_TILE_ROWS):
                part = corpus.slice(c, c + CORPUS_TILE_ROWS)
                _offer_tile(
                    tile.vectors @ part.vectors.T,
                    bound,
                    slots[q : q + QUERY_TILE_ROWS],
                    tile.vectors,
                    tile.squared_norms,
                    tile.codes.same,
                    tile.codes.different,
                    part.vectors,
                    part.squared_norms,
                    part.codes.same,
                    part.codes.different,
                    ids.data,
                    ids.offsets[c : c + len(part) + 1],
                    first_row + c,
                    self.scores,
                    self.rows,
                    self.counts,
                    self._ids,
                    self._id_lengths,
                )


def error_bound(dim: int) -> float:
    """Returns how far a float32 dot product can be off, relative to |q| |x|.

    gamma_d = d u / (1 - d u) with u = 2^-24, for any order of summation (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1); the inputs are exact in float32.
    """
    return dim * _UNIT_ROUNDOFF / (1 - dim * _UNIT_ROUNDOFF)


@njit(cache=True, nogil=True, fastmath=True)
def _exact_dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Dot product in float64; exact in any order of summation, so reordering is harmless here."""
    total = 0.0
    for i in range(a.shape[0]):
        total += float(a[i]) * float(b[i])
    return total


@njit(cache=True, nogil=True)
def _id_precedes(
    data: NDArray[np.uint8], start: int, stop: int, kept: NDArray[np.uint8], length: int
) -> bool:
    """Tells whether data[start:stop] sorts before kept[:length], byte by byte."""
    for i in range(min(stop - start, length)):
        if data[start + i] != kept[i]:
            return bool(data[start + i] < kept[i])
    return stop - start < length


@njit(cache=True, nogil=True)
def _offer_tile(
    fast: NDArray[np.float32],
    bound: float,
    slots: NDArray[np.int64],
    q_vectors: NDArray[np.float32],
    q_norms: NDArray[np.float64],
    q_same: NDArray[np.int32],
    q_different: NDArray[np.int32],
    x_vectors: NDArray[np.float32],
    x_norms: NDArray[np.float64],
    x_same: NDArray[np.int32],
    x_different: NDArray[np.int32],
    id_data: NDArray[np.uint8],
    id_offsets: NDArray[np.int64],
    first_row: int,
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.int64],
) -> None:
    k = scores.shape[1]
    lengths = np.sqrt(x_norms)
    for i in range(fast.shape[0]):
        slot = slots[i]
        q_length = np.sqrt(q_norms[i])
        for j in range(fast.shape[1]):
            count = counts[slot]
            if count == k:
                # 2^-23 covers the rounding of scores to float32 on both sides.
                floor = np.float64(scores[slot, k - 1]) - bound - 2.0**-23
                if fast[i, j] < floor * q_length * lengths[j]:
                    continue
            eligible = True
            for rule in range(q_same.shape[0]):
                if q_same[rule, i] < 0 or q_same[rule, i] != x_same[rule, j]:
                    eligible = False
            for rule in range(q_different.shape[0]):
                if q_different[rule, i] >= 0 and q_different[rule, i] == x_different[rule, j]:
                    eligible = False
            if not eligible:
                continue
            dot = _exact_dot(q_vectors[i], x_vectors[j])
            score = np.float32(dot / np.sqrt(q_norms[i] * x_norms[j]))
            start, stop = id_offsets[j], id_offsets[j + 1]
            place = count
            while place > 0:
                before = scores[slot, place - 1]
                if score < before:
                    break
                if score == before and not _id_precedes(
                    id_data, start, stop, ids[slot, place - 1], id_lengths[slot, place - 1]
                ):
                    break
                place -= 1
            if place == k:
                continue
            for p in range(min(count, k - 1), place, -1):
                scores[slot, p] = scores[slot, p - 1]
                rows[slot, p] = rows[slot, p - 1]
                id_lengths[slot, p] = id_lengths[slot, p - 1]
                ids[slot, p] = ids[slot, p - 1]
            scores[slot, place] = score
            rows[slot, place] = first_row + j
            id_lengths[slot, place] = stop - start
            for b in range(stop - start):
                ids[slot, place, b] = id_data[start + b]
            counts[slot] = min(count + 1, k)
