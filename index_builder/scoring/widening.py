"""From float16 codes to the float32 that products take: rows are gathered and widened in one pass."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import half_to_float, prefetch

# Rows between the one that is gathered and the one that is asked for.
_AHEAD = 3


@njit(cache=True, nogil=True, inline="always")
def prefetch_row(address: int, row_bytes: int, rows: NDArray[np.int64], i: int) -> None:
    """Asks for the row that is gathered a few rows after row i: rows lie far apart."""
    if i + _AHEAD < rows.shape[0]:
        start = address + rows[i + _AHEAD] * row_bytes
        for line in range(0, row_bytes, 64):
            prefetch(start + line)


@njit(cache=True, nogil=True)
def _widen(bits: NDArray[np.uint16], rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    address, row_bytes = bits.ctypes.data, 2 * bits.shape[1]
    for i in range(rows.shape[0]):
        prefetch_row(address, row_bytes, rows, i)
        row = np.uint64(rows[i])
        for j in range(np.uint64(out.shape[1])):
            out[i, j] = half_to_float(bits[row, j])


def widen_rows(vectors: NDArray[np.float16], rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Writes some rows of `vectors` [n, d] to `out` [len(rows), d], exactly."""
    _widen(vectors.view(np.uint16), rows, out)
