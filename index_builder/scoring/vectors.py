"""Vectors of about unit length in float16, and sums over them that have no rounding error.

Every float16 number is an integer multiple of 2^-24, so products of two are multiples of 2^-48 and a
partial sum below 32 fits the 53 bits of a float64 exactly: norms and dot products of such vectors
have the same bits in any order of summation, on any machine.

Under cosine every vector is brought to unit length. Under the other metrics lengths count: one
power of two, the scale, brings the longest vector of a corpus to a length of at most 1.
"""

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.errors import DatasetError
from index_builder.scoring.intrinsics import half_dot, hardware_converts

# The value of every non-negative float16, by its bit pattern.
_FLOAT16_VALUES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)

# Rounding to float16 moves the length of a unit vector by about 1e-5. Numbers are moved to their
# float16 neighbour, one after another, until the squared length is this close to 1.
_LENGTH_TOLERANCE = 2e-7

# Scores are float32 numbers in the squared units of the embeddings. Within these lengths of the
# longest vector neither the largest squared distance overflows nor the smallest, 2^-48 of the scaled
# vectors, falls below the normal float32 numbers.
_LEAST_NORM, _MOST_NORM = 2.0**-38, 2.0**62
# Rounding the numbers of a vector to float16 lengthens it by 2^-11 at most, of very small ones a
# little more.
_SCALE_TOLERANCE = 2.0**-10


def squared_norms(vectors: NDArray[np.float16]) -> NDArray[np.float64]:
    """Returns the exact squared L2 norms, float64 [n], of float16 vectors [n, d].

    Not finite where a number is not.
    """
    if hardware_converts():
        norms = np.empty(len(vectors), dtype=np.float64)
        _sum_squares(np.ascontiguousarray(vectors).view(np.uint16), norms)
        return norms
    wide = vectors.astype(np.float64)
    return np.asarray(np.einsum("ij,ij->i", wide, wide), dtype=np.float64)


@njit(cache=True, nogil=True)
def _sum_squares(bits: NDArray[np.uint16], norms: NDArray[np.float64]) -> None:
    dim = bits.shape[1]
    for i in range(bits.shape[0]):
        row = bits.ctypes.data + 2 * dim * i
        norms[i] = half_dot(row, row, dim)


@njit(cache=True, nogil=True)
def norms_in_order(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the L2 norms, float64 [n], of contiguous float64 vectors [n, d].

    They are summed from the first column to the last (no fastmath, so no reordering and no FMA), so
    they have the same bits everywhere. Of float16 and float32 numbers the norm is finite when all of
    them are, and zero when all of them are.
    """
    norms = np.empty(vectors.shape[0])
    for i in range(vectors.shape[0]):
        total = 0.0
        for j in range(vectors.shape[1]):
            total += vectors[i, j] * vectors[i, j]
        norms[i] = np.sqrt(total)
    return norms


@njit(cache=True, nogil=True)
def _restore_unit_length(bits: NDArray[np.uint16], values: NDArray[np.float64]) -> None:
    """Moves single numbers of float16 rows (as bit patterns) by one unit in the last place.

    Each move is the one that brings the squared length closest to 1; all sums are exact, so the
    result is the same everywhere. As long as others help, a number moves once, so it is off by one
    and a half units at most; in rows of few numbers or equal ones, whose roundings all have one
    sign, some move further.
    """
    unmoved = np.empty(bits.shape[1], dtype=np.bool_)
    for i in range(bits.shape[0]):
        unmoved[:] = True
        once = True
        excess = -1.0
        for j in range(bits.shape[1]):
            value = values[bits[i, j] & 0x7FFF]
            excess += value * value
        for _ in range(2 * bits.shape[1]):
            if abs(excess) <= _LENGTH_TOLERANCE:
                break
            step = -1 if excess > 0 else 1
            best, best_excess = -1, excess
            for j in range(bits.shape[1]):
                magnitude = bits[i, j] & 0x7FFF
                if magnitude > 0 and unmoved[j]:
                    old, new = values[magnitude], values[magnitude + step]
                    moved = excess + new * new - old * old
                    if abs(moved) < abs(best_excess):
                        best, best_excess = j, moved
            if best < 0:
                if not once:
                    break
                once = False
                unmoved[:] = True
                continue
            bits[i, best] += step
            unmoved[best] = not once
            excess = best_excess


def unit_float16(
    vectors: NDArray[np.floating[Any]],
) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """Scales vectors to unit L2 length and rounds them to float16.

    Takes [n, d] of any float type; returns float16 [n, d] and a mask bool [n] of the rows that have
    a direction. Rows that are zero or not finite come back as zeros with False in the mask.

    The rounding keeps the length within about 1e-7 of 1, so that a plain inner product, as FAISS
    computes it, ranks like the cosine.
    """
    wide = np.ascontiguousarray(vectors, dtype=np.float64)
    norms = norms_in_order(wide)
    valid = np.isfinite(norms) & (norms > 0)
    unit = np.zeros_like(wide)
    np.divide(wide, norms[:, None], out=unit, where=valid[:, None])
    rounded = unit.astype(np.float16)
    _restore_unit_length(rounded.view(np.uint16), _FLOAT16_VALUES)
    return rounded, valid


def scale_exponent(largest_norm: float) -> int:
    """Returns the largest e for which 2^e brings a length to at most 1; 0 for a length of zero.

    Raises DatasetError where scores, squared lengths in float32, would leave the range of float32.
    """
    if largest_norm == 0:
        return 0
    if not _LEAST_NORM <= largest_norm <= _MOST_NORM:
        raise DatasetError(
            f"The longest vector has a norm of {largest_norm:.3g}, wanted {_LEAST_NORM:.1e} to "
            f"{_MOST_NORM:.1e}: squared distances would not fit float32. Multiply the embeddings by a "
            "constant, or set index.metric: cosine."
        )
    mantissa, exponent = math.frexp(largest_norm)
    return 1 - exponent if mantissa == 0.5 else -exponent


def check_scale(norms: NDArray[np.float64], exponent: int) -> None:
    """Raises DatasetError for vectors that are longer than a scale 2^exponent was chosen for.

    `norms` are float64 [n], of the embeddings, before scaling. Longer by the rounding to float16 is
    no matter.
    """
    scaled = norms * 2.0**exponent
    longer = scaled > 1 + _SCALE_TOLERANCE
    if longer.any():
        row = int(np.argmax(scaled))
        raise DatasetError(
            f"{int(longer.sum())} vectors are longer than those that the index was made for: the norm "
            f"at row {row} of its block is {norms[row]:.6g}, wanted at most {2.0**-exponent:.6g}, to "
            "which the index's scale was chosen. Build the index again from a corpus with vectors "
            "like these."
        )


def round_float16(vectors: NDArray[np.float64]) -> NDArray[np.float16]:
    """Rounds float64 vectors of at most about unit length to float16: nearest, ties to even.

    Numbers below 2^-14 become multiples of 2^-24, the smallest float16; a zero has no sign.
    """
    return (vectors + 0.0).astype(np.float16) + np.float16(0)


def relative_rounding(vectors: NDArray[np.float64], rounded: NDArray[np.float16]) -> float:
    """Returns the largest |rounded - vector| / |vector| of the rows (L2 norms); 0 without rows.

    A zero vector counts as 0. The sums have one order, so the figure is the same everywhere.
    """
    norms = norms_in_order(vectors)
    errors = norms_in_order(rounded.astype(np.float64) - vectors)
    return float(np.divide(errors, norms, out=np.zeros_like(norms), where=norms > 0).max(initial=0.0))
