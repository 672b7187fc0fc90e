"""Vectors of unit length in float16, and sums over them that have no rounding error.

Every float16 number is an integer multiple of 2^-24, so products of two are multiples of 2^-48 and a
partial sum below 32 fits the 53 bits of a float64 exactly: norms and dot products of such vectors
have the same bits in any order of summation, on any machine.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

# The value of every non-negative float16, by its bit pattern.
_FLOAT16_VALUES = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)

# Rounding to float16 moves the length of a unit vector by about 1e-5. Numbers are moved to their
# float16 neighbour, one after another, until the squared length is this close to 1.
_LENGTH_TOLERANCE = 2e-7


def squared_norms(vectors: NDArray[np.float16]) -> NDArray[np.float64]:
    """Returns the exact squared L2 norms, float64 [n], of float16 vectors [n, d]."""
    wide = vectors.astype(np.float64)
    norms: NDArray[np.float64] = np.einsum("ij,ij->i", wide, wide)
    return norms


@njit(cache=True, nogil=True)
def _norms_in_order(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """L2 norms, summed from the first column to the last (no fastmath, so no reordering, no FMA)."""
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
    norms = _norms_in_order(wide)
    valid = np.isfinite(norms) & (norms > 0)
    unit = np.zeros_like(wide)
    np.divide(wide, norms[:, None], out=unit, where=valid[:, None])
    rounded = unit.astype(np.float16)
    _restore_unit_length(rounded.view(np.uint16), _FLOAT16_VALUES)
    return rounded, valid
