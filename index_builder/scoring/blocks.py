"""Rows of one side of a join: vectors with their norms, ids and rule codes, and runs of equal ones."""

import dataclasses
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from index_builder.rules.rules import CandidateCodes, QueryCodes
from index_builder.scoring.tiles import CandidateArrays, QueryArrays
from index_builder.scoring.vector_rows import RowArrays, VectorRows, read_only

Codes = TypeVar("Codes", QueryCodes, CandidateCodes)


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
class Block(Generic[Codes]):
    """Vectors with what decides about a pair: exact squared norms and rule codes.

    `squared_norms` float64 [n] are those of the vectors; `codes` are QueryCodes or CandidateCodes.
    """

    vectors: VectorRows
    squared_norms: NDArray[np.float64]
    codes: Codes

    def __len__(self) -> int:
        return len(self.vectors)

    def slice(self, start: int, stop: int) -> "Block[Codes]":
        """Returns the rows start to stop, sharing memory."""
        return Block(
            self.vectors.slice(start, stop),
            self.squared_norms[start:stop],
            self.codes.slice(start, stop),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedQueries:
    """A block of queries in the form that compiled code takes."""

    vectors: VectorRows
    arrays: QueryArrays

    @staticmethod
    def of(block: Block[QueryCodes]) -> "PreparedQueries":
        """Prepares a block."""
        codes = block.codes
        norms = _plain(block.squared_norms, np.float64)
        arrays = QueryArrays(
            block.vectors.arrays,
            norms,
            _plain(np.sqrt(norms), np.float32),
            _plain(codes.same, np.int32),
            _plain(codes.different, np.int32),
            _plain(codes.excluded_offsets, np.int64),
            _plain(codes.excluded, np.int32),
        )
        return PreparedQueries(block.vectors, arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCandidates:
    """A block of candidates in the form that compiled code takes, its runs of equal vectors found.

    `first_row` is the number of its first row in the whole index.
    """

    vectors: VectorRows
    arrays: CandidateArrays
    first_row: int

    @staticmethod
    def of(block: Block[CandidateCodes], ids: IdColumn, first_row: int) -> "PreparedCandidates":
        """Prepares a block.

        A run is of rows one after another with equal vectors and ascending ids: its vector is
        scored once. An index is sorted so that equal vectors of a list are one run; rows that are
        not are scored one by one, with the same result.
        """
        codes = block.codes
        data, offsets = _plain(ids.data, np.uint8), _plain(ids.offsets, np.int64)
        starts = np.empty(len(block) + 1, dtype=np.int64)
        runs = _find_runs(block.vectors.arrays, data, offsets, starts)
        norms = _plain(block.squared_norms, np.float64)
        heads = norms[starts[:runs]]
        arrays = CandidateArrays(
            block.vectors.arrays,
            _plain(np.sqrt(heads), np.float32),
            _plain(heads / 2, np.float32),
            _plain(starts[: runs + 1], np.int64),
            norms,
            _plain(codes.same, np.int32),
            _plain(codes.different, np.int32),
            _plain(codes.excluded, np.int32),
            _plain(codes.caps, np.int32),
            _plain(codes.eligible, np.bool_),
            data,
            offsets,
        )
        return PreparedCandidates(block.vectors, arrays, first_row)

    @property
    def distinct(self) -> int:
        """The number of runs."""
        return len(self.arrays.runs) - 1


def _plain(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Returns values contiguous and read-only: one Numba type, whatever they were."""
    return read_only(np.ascontiguousarray(values, dtype=dtype))


@njit(cache=True, nogil=True)
def _find_runs(
    vectors: RowArrays,
    id_data: NDArray[np.uint8],
    id_offsets: NDArray[np.int64],
    starts: NDArray[np.int64],
) -> int:
    """Writes where each run starts, and the number of rows after the last; returns the runs."""
    bits, firsts, dim = vectors
    runs = 0
    for row in range(firsts.shape[0]):
        same = row > 0
        if same:
            above, own = np.uint64(firsts[row - 1]), np.uint64(firsts[row])
            for column in range(np.uint64(dim)):
                if bits[own + column] != bits[above + column]:
                    same = False
                    break
        if same:
            before, start, stop = id_offsets[row - 1], id_offsets[row], id_offsets[row + 1]
            length = min(start - before, stop - start)
            same = start - before < stop - start
            for i in range(length):
                if id_data[before + i] != id_data[start + i]:
                    same = id_data[before + i] < id_data[start + i]
                    break
        if not same:
            starts[runs] = row
            runs += 1
    starts[runs] = firsts.shape[0]
    return runs
