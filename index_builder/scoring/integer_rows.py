"""Rows of 8-bit integers: float16 vectors, each scaled by its largest number, and what rounding took.

A product of such rows is off by what rounding took from the two vectors: with x = x' + e and
y = y' + f, x y - x' y' = e y + x' f, so |x y - x' y'| <= (|e| / |x| + |x'| / |x| |f| / |y|) |x| |y|
(Cauchy and Schwarz). These shares are measured, vector by vector.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import half_to_float
from index_builder.scoring.vector_rows import RowArrays, VectorRows
from index_builder.scoring.widening import prefetch_row

# Integers go from -127 to 127.
LARGEST = 127
# What unsigned ones have added.
UNSIGNED = np.float32(128)

# Sums in float32 of at most 2^16 numbers are off by 2^-8 of themselves at most.
MOST_DIM = 1 << 16
_SUM_ERROR = 2.0**-8
# For the roundings of float32 inside what is measured.
_LEAST_SHARE = 2.0**-20


class Roundings(NamedTuple):
    """How n vectors are rounded, float32 [n] each.

    Vector i is about `scales[i]` times integers, and `shares[i]` bounds |e| / |x|. A scale below zero:
    not measured yet.
    """

    scales: NDArray[np.float32]
    shares: NDArray[np.float32]

    @staticmethod
    def unmeasured(count: int) -> "Roundings":
        """Returns room for so many vectors."""
        return Roundings(np.full(count, -1, np.float32), np.zeros(count, np.float32))


class IntegerRows(NamedTuple):
    """A tile's rows: `numbers` int8 [n, d], row i being `scales[i]` times them.

    `shares` float32 [n] are as Roundings has them, `sums` int32 [n] those of a row's numbers.
    """

    numbers: NDArray[np.int8]
    scales: NDArray[np.float32]
    shares: NDArray[np.float32]
    sums: NDArray[np.int32]

    @staticmethod
    def of(numbers: NDArray[np.int8]) -> "IntegerRows":
        """Returns room for as many rows; columns beyond those of the vectors stay as they are."""
        rows = len(numbers)
        floats = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        return IntegerRows(numbers, *floats, np.zeros(rows, np.int32))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def measure_roundings(vectors: RowArrays, rows: NDArray[np.int64], roundings: Roundings) -> None:
    """Measures some rows of `vectors`, finite ones, that are not measured yet.

    They have at most MOST_DIM dimensions.
    """
    scales, shares = roundings
    dim = np.uint64(vectors.dim)
    for i in range(rows.shape[0]):
        row = np.uint64(rows[i])
        if not scales[row] < 0:
            continue
        prefetch_row(vectors, rows, i)
        start = np.uint64(vectors.starts[row])
        # Magnitudes of float16 are ordered like their bit patterns.
        largest = np.uint16(0)
        for j in range(dim):
            largest = max(largest, np.uint16(vectors.bits[start + j] & np.uint16(0x7FFF)))
        scale = np.float32(half_to_float(largest) / np.float32(LARGEST))
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        lost, norm = np.float32(0.0), np.float32(0.0)
        for j in range(dim):
            number = half_to_float(vectors.bits[start + j])
            error = number - np.rint(number * inverse) * scale
            lost += error * error
            norm += number * number
        share = np.sqrt(lost / norm) if norm > 0 else np.float32(0.0)
        scales[row] = scale
        shares[row] = np.float32(share * np.float32(1 + _SUM_ERROR) + np.float32(_LEAST_SHARE))


@njit(cache=True, nogil=True, error_model="numpy")
def round_to_integers(
    vectors: RowArrays,
    rows: NDArray[np.int64],
    roundings: Roundings,
    added: np.float32,
    out: IntegerRows,
) -> None:
    """Rounds some rows of `vectors`, measured ones, to the first of `out`.

    `added` to every number is 0, or UNSIGNED for unsigned bytes.
    """
    numbers, scales, shares, sums = out
    dim = np.uint64(vectors.dim)
    for i in range(rows.shape[0]):
        prefetch_row(vectors, rows, i)
        row = np.uint64(rows[i])
        start = np.uint64(vectors.starts[row])
        scale = roundings.scales[row]
        inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
        total = np.int32(0)
        for j in range(dim):
            whole = np.int32(np.rint(half_to_float(vectors.bits[start + j]) * inverse) + added)
            numbers[i, j] = np.int8(whole)
            total += whole
        scales[i], shares[i], sums[i] = scale, roundings.shares[row], total


def mean_share(vectors: VectorRows) -> float:
    """Returns the mean of |e| / |x| of vectors, at least one."""
    roundings = Roundings.unmeasured(len(vectors))
    measure_roundings(vectors.arrays, np.arange(len(vectors)), roundings)
    return float(roundings.shares.mean())
