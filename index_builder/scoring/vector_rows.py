"""Float16 vectors wherever they lie in memory: in a matrix, or list by list in a mapped file."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class RowArrays(NamedTuple):
    """The rows of VectorRows as compiled code takes them.

    Row i is `bits[starts[i] : starts[i] + dim]`: `bits` uint16 [m] are bit patterns of float16
    numbers, `starts` int64 [n].
    """

    bits: NDArray[np.uint16]
    starts: NDArray[np.int64]
    dim: int


@dataclasses.dataclass(frozen=True, eq=False)
class VectorRows:
    """n float16 vectors in memory that others share; none of them is copied by taking some.

    The memory is not freed before its last rows are.
    """

    arrays: RowArrays

    @staticmethod
    def of(matrix: NDArray[np.floating[Any]]) -> "VectorRows":
        """Returns the rows of a matrix [n, d]; one of another type must hold float16 numbers."""
        halves = np.ascontiguousarray(matrix, dtype=np.float16)
        starts = np.arange(len(halves), dtype=np.int64) * halves.shape[1]
        return VectorRows.at(halves.reshape(-1).view(np.uint16), starts, halves.shape[1])

    @staticmethod
    def at(bits: NDArray[np.uint16], starts: NDArray[np.int64], dim: int) -> "VectorRows":
        """Returns the rows that begin at `starts`; see RowArrays."""
        return VectorRows(RowArrays(read_only(bits), read_only(starts), dim))

    def __len__(self) -> int:
        return len(self.arrays.starts)

    @property
    def dim(self) -> int:
        """The numbers of a vector."""
        return self.arrays.dim

    def slice(self, start: int, stop: int) -> "VectorRows":
        """Returns the rows start to stop."""
        return VectorRows.at(self.arrays.bits, self.arrays.starts[start:stop], self.dim)

    def take(self, rows: NDArray[np.int64]) -> "VectorRows":
        """Returns some rows, in their order."""
        return VectorRows.at(self.arrays.bits, self.arrays.starts[rows], self.dim)

    def matrix(self) -> NDArray[np.float16]:
        """Returns a copy, float16 [n, d]."""
        copied = np.empty((len(self), self.dim), dtype=np.uint16)
        _copy(self.arrays, copied)
        return copied.view(np.float16)


def read_only(values: NDArray[Any]) -> NDArray[Any]:
    """Returns a view that is read-only, as are mapped arrays: one type for compiled code."""
    view = values.view()
    view.flags.writeable = False
    return view


@njit(cache=True, nogil=True)
def _copy(rows: RowArrays, out: NDArray[np.uint16]) -> None:
    for i in range(out.shape[0]):
        start = np.uint64(rows.starts[i])
        for j in range(np.uint64(out.shape[1])):
            out[i, j] = rows.bits[start + j]
