"""From float16 codes to the float32 that products take: rows are gathered and widened in one pass."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import half_to_float, prefetch
from index_builder.scoring.vector_rows import RowArrays

# Rows between the one that is gathered and the one that is asked for.
_AHEAD = 3


@njit(cache=True, nogil=True, inline="always")
def prefetch_row(vectors: RowArrays, rows: NDArray[np.int64], i: int) -> None:
    """Asks for the row that is gathered a few rows after row i: rows lie far apart."""
    if i + _AHEAD < rows.shape[0]:
        start = vectors.bits.ctypes.data + 2 * vectors.starts[rows[i + _AHEAD]]
        for line in range(0, 2 * vectors.dim, 64):
            prefetch(start + line)


@njit(cache=True, nogil=True)
def widen_rows(vectors: RowArrays, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Writes some rows of `vectors` to `out` [len(rows), d], exactly."""
    for i in range(rows.shape[0]):
        prefetch_row(vectors, rows, i)
        start = np.uint64(vectors.starts[rows[i]])
        for j in range(np.uint64(out.shape[1])):
            out[i, j] = half_to_float(vectors.bits[start + j])
