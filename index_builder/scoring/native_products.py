"""Fast products by the CPU's own instructions: float32 and bfloat16, by vectors and by AMX tiles.

They take float16 rows as they lie, gather and pack them once a tile or block, and sum in float32.
The join scores exactly whatever comes near the threshold, so its result is the same bytes with any of
them.
"""

import abc
import dataclasses
import functools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from index_builder.scoring.amx_kernel import (
    BLOCK,
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    STEP,
    amx_allowed,
    multiply_tiles,
    tile_configuration,
)
from index_builder.scoring.micro_kernel import (
    TILE_COLUMNS,
    TILE_ROWS,
    UNROLL,
    has_bfloat16_kernel,
    has_float32_kernel,
    multiply_panels,
)
from index_builder.scoring.panels import LANES, depth_of, pack_panels, panels_size
from index_builder.scoring.scores import error_bound, split_error_bound
from index_builder.scoring.vector_rows import RowArrays, VectorRows

_CACHE_LINE = 64
_BFLOAT16_ROUNDOFF = 2.0**-8


class Proposer(Protocol):
    """One thread's tiles: some queries, some corpus rows, and the product of the two."""

    @property
    def errors(self) -> NDArray[np.float32]:
        """How far the products of each query may be off, relative to the lengths of their vectors."""
        ...

    def take_queries(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """Takes some rows of `vectors` as the tile of queries."""
        ...

    def take_corpus(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """Takes some rows of `vectors` as the tile of the corpus."""
        ...

    def multiply(self, out: NDArray[np.float32]) -> None:
        """Writes the products of the two tiles [m, n]."""
        ...


class NativeProduct(abc.ABC):
    """What the native products share; see index_builder.scoring.products.Product."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What a log calls it."""

    @property
    @abc.abstractmethod
    def unit_roundoff(self) -> float:
        """See Product."""

    @abc.abstractmethod
    def open(self, most_queries: int, most_corpus: int, dim: int) -> Proposer:
        """Returns a proposer for tiles of at most so many rows."""

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Writes queries [m, d] times corpus [n, d] transposed to out [m, n].

        Both hold float16 numbers. For one tile: a join keeps a proposer.
        """
        proposer = self.open(len(queries), len(corpus), queries.shape[1])
        proposer.take_queries(VectorRows.of(queries), np.arange(len(queries)))
        proposer.take_corpus(VectorRows.of(corpus), np.arange(len(corpus)))
        proposer.multiply(out)


@dataclasses.dataclass(frozen=True)
class VectorProduct(NativeProduct):
    """Products by vector instructions, of float32 numbers or of pairs of bfloat16 ones."""

    rounds: bool

    @property
    def name(self) -> str:
        """What a log calls it."""
        return f"AVX{'512' if LANES == 16 else '2'} {'bfloat16' if self.rounds else 'float32'}"

    @property
    def unit_roundoff(self) -> float:
        """See Product."""
        return _BFLOAT16_ROUNDOFF if self.rounds else 0.0

    def open(self, most_queries: int, most_corpus: int, dim: int) -> "PanelProposer":
        """Returns a proposer for tiles of at most so many rows."""
        return PanelProposer(self, most_queries, most_corpus, dim)


@dataclasses.dataclass(frozen=True)
class AmxProduct(NativeProduct):
    """Products by AMX tiles of bfloat16, of rounded numbers or of both halves of each.

    A float16 number is the sum of two bfloat16 ones, q = q' + q". Three of the four products of halves
    are summed; the fourth, of the two lower ones, is at most u^2 |q| |x| (G. Henry, P. Tang and
    A. Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
    computations", 2019).
    """

    rounds: bool

    @property
    def name(self) -> str:
        """What a log calls it."""
        return f"AMX {'bfloat16' if self.rounds else 'float32 of three bfloat16'}"

    @property
    def unit_roundoff(self) -> float:
        """See Product."""
        return _BFLOAT16_ROUNDOFF if self.rounds else 0.0

    def open(self, most_queries: int, most_corpus: int, dim: int) -> "AmxProposer":
        """Returns a proposer for tiles of at most so many rows."""
        return AmxProposer(self, most_queries, most_corpus, dim)


@functools.cache
def float32_products() -> tuple[NativeProduct, ...]:
    """Returns the native products of float32 numbers that this CPU has."""
    found: list[NativeProduct] = [AmxProduct(rounds=False)] if amx_allowed() else []
    if has_float32_kernel():
        found.append(VectorProduct(rounds=False))
    return tuple(found)


@functools.cache
def bfloat16_products() -> tuple[NativeProduct, ...]:
    """Returns the bfloat16 products that this CPU has, the best first."""
    found: list[NativeProduct] = [AmxProduct(rounds=True)] if amx_allowed() else []
    if has_bfloat16_kernel():
        found.append(VectorProduct(rounds=True))
    return tuple(found)


class _RoundingProposer:
    """What proposers share whose error follows from the type that they round to."""

    def __init__(self, unit_roundoff: float, most_queries: int, dim: int) -> None:
        self._errors = np.full(most_queries, error_bound(dim, unit_roundoff), dtype=np.float32)
        self._taken = 0

    @property
    def errors(self) -> NDArray[np.float32]:
        """See Proposer."""
        return self._errors[: self._taken]


class PanelProposer(_RoundingProposer):
    """A Proposer that packs float16 rows into panels of float32 numbers or of pairs of bfloat16."""

    def __init__(self, product: VectorProduct, most_queries: int, most_corpus: int, dim: int) -> None:
        super().__init__(product.unit_roundoff, most_queries, dim)
        kind, self._dims_a_word = (np.uint32, 2) if product.rounds else (np.float32, 1)
        self._depth = depth_of(dim, self._dims_a_word, UNROLL)
        self._queries = aligned((1, panels_size(most_queries, TILE_ROWS, self._depth)), kind)
        # A tile of C is two panels wide, the last one too.
        corpus_rows = -(-most_corpus // TILE_COLUMNS) * TILE_COLUMNS
        self._corpus = aligned((1, panels_size(corpus_rows, LANES, self._depth)), kind)
        self._edge = aligned((TILE_ROWS, TILE_COLUMNS), np.float32)

    def take_queries(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        self._taken = len(rows)
        pack_panels(vectors.arrays, rows, TILE_ROWS, self._depth, self._dims_a_word, self._queries)

    def take_corpus(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        pack_panels(vectors.arrays, rows, LANES, self._depth, self._dims_a_word, self._corpus)

    def multiply(self, out: NDArray[np.float32]) -> None:
        """See Proposer."""
        multiply_panels(self._queries[0], self._corpus[0], self._depth, self._edge, out)


class AmxProposer(_RoundingProposer):
    """A Proposer that rounds float16 rows straight to tiles of bfloat16, or splits them into two."""

    def __init__(self, product: AmxProduct, most_queries: int, most_corpus: int, dim: int) -> None:
        super().__init__(product.unit_roundoff, most_queries, dim)
        parts = 1
        if not product.rounds:
            parts = 2
            self._errors[:] = split_error_bound(dim, _BFLOAT16_ROUNDOFF)
        self._depth = depth_of(dim, 2, STEP // 2)
        self._block = aligned((parts, BLOCK_ROWS, 2 * self._depth), np.uint16)
        corpus_rows = -(-most_corpus // BLOCK_COLUMNS) * BLOCK_COLUMNS
        self._corpus = aligned((parts, panels_size(corpus_rows, BLOCK, self._depth)), np.uint32)
        self._edge = aligned((BLOCK_ROWS, BLOCK_COLUMNS), np.float32)
        self._configuration = tile_configuration()
        self._queries: tuple[RowArrays, NDArray[np.int64]]

    def take_queries(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        self._taken = len(rows)
        self._queries = vectors.arrays, rows

    def take_corpus(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        pack_panels(vectors.arrays, rows, BLOCK, self._depth, 2, self._corpus)

    def multiply(self, out: NDArray[np.float32]) -> None:
        """See Proposer."""
        vectors, rows = self._queries
        multiply_tiles(vectors, rows, self._block, self._corpus, out, self._edge, self._configuration)


def aligned(shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """Zeros that begin on a cache line: loads of a whole line are then of one."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    buffer = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    start = -buffer.ctypes.data % _CACHE_LINE
    aligned: NDArray[Any] = buffer[start : start + size].view(kind).reshape(shape)
    return aligned
