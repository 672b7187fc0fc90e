"""Fast products of 8-bit integers: four times as many numbers an instruction as in float32.

Vectors are scaled and rounded one by one, and how far that takes each is measured, so the error bound
is that of the vectors of a tile. See `integer_rows`.
"""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from index_builder.scoring.integer_kernel import has_integer_kernel, multiply_integers
from index_builder.scoring.integer_rows import (
    LARGEST,
    MOST_DIM,
    UNSIGNED,
    IntegerRows,
    Roundings,
    measure_roundings,
    round_to_integers,
)
from index_builder.scoring.micro_kernel import TILE_COLUMNS, TILE_ROWS, UNROLL
from index_builder.scoring.native_products import NativeProduct, aligned
from index_builder.scoring.panels import LANES, depth_of, interleave_words, panels_size
from index_builder.scoring.scores import error_bound
from index_builder.scoring.vector_rows import VectorRows

_DIMS_A_WORD = 4
# Beside the shares: a sum becomes float32 and is scaled, each time off by 2^-24 of at most 4 |q| |x|.
_ROUNDINGS = 16


@dataclasses.dataclass(frozen=True)
class IntegerProduct(NativeProduct):
    """Products of 8-bit integers by vector instructions.

    `unit_roundoff` is that of the largest number of a vector; proposers tell what rounding really took.
    """

    name: str = f"AVX{'512' if LANES == 16 else '2'} int8"
    unit_roundoff: float = 1 / (2 * LARGEST)

    def open(self, most_queries: int, most_corpus: int, dim: int) -> "IntegerProposer":
        """Returns a proposer for tiles of at most so many rows, of at most MOST_DIM dimensions."""
        return IntegerProposer(most_queries, most_corpus, dim)


@functools.cache
def integer_products() -> tuple[IntegerProduct, ...]:
    """Returns the products of 8-bit integers that this CPU has."""
    return (IntegerProduct(),) if has_integer_kernel() else ()


class IntegerProposer:
    """A Proposer that rounds float16 rows to panels of integers."""

    def __init__(self, most_queries: int, most_corpus: int, dim: int) -> None:
        if dim > MOST_DIM:
            raise ValueError(f"vectors have {dim} dimensions, wanted at most {MOST_DIM}")
        self._depth = depth_of(dim, _DIMS_A_WORD, UNROLL)
        # Rows are interleaved so many words at a time.
        width = _DIMS_A_WORD * LANES * -(-self._depth // LANES)
        query_rows = -(-most_queries // TILE_ROWS) * TILE_ROWS
        self._queries = IntegerRows.of(aligned((query_rows, width), np.int8))
        self._query_panels = aligned((panels_size(query_rows, TILE_ROWS, self._depth),), np.int32)
        # A tile of C is two panels wide, the last one too.
        corpus_rows = -(-most_corpus // TILE_COLUMNS) * TILE_COLUMNS
        self._corpus = IntegerRows.of(aligned((corpus_rows, width), np.int8))
        self._corpus_panels = aligned((panels_size(corpus_rows, LANES, self._depth),), np.int32)
        self._starts = np.zeros(corpus_rows, dtype=np.int32)
        self._edge = aligned((TILE_ROWS, TILE_COLUMNS), np.float32)
        self._rows = self._columns = 0
        self._least = np.float32(error_bound(dim + _ROUNDINGS))
        # Queries come again for every list that they probe.
        self._known: tuple[VectorRows, Roundings] | None = None

    @property
    def errors(self) -> NDArray[np.float32]:
        """See Proposer."""
        shares = self._queries.shares[: self._rows]
        most = self._corpus.shares[: self._columns].max(initial=0.0)
        errors: NDArray[np.float32] = shares + (1 + shares) * most + self._least
        return errors

    def take_queries(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        if self._known is None or self._known[0] is not vectors:
            self._known = vectors, Roundings.unmeasured(len(vectors))
        self._rows = len(rows)
        _round(vectors, rows, self._known[1], UNSIGNED, self._queries)
        words = self._queries.numbers.view(np.int32)
        interleave_words(words, self._rows, TILE_ROWS, self._depth, self._query_panels)

    def take_corpus(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        self._columns = len(rows)
        _round(vectors, rows, Roundings.unmeasured(len(vectors)), np.float32(0), self._corpus)
        words = self._corpus.numbers.view(np.int32)
        interleave_words(words, self._columns, LANES, self._depth, self._corpus_panels)
        np.multiply(self._corpus.sums, -int(UNSIGNED), out=self._starts)

    def multiply(self, out: NDArray[np.float32]) -> None:
        """See Proposer."""
        multiply_integers(
            self._query_panels,
            self._corpus_panels,
            self._depth,
            self._queries.scales,
            self._corpus.scales,
            self._starts,
            self._edge,
            out,
        )


def _round(
    vectors: VectorRows,
    rows: NDArray[np.int64],
    roundings: Roundings,
    added: np.float32,
    out: IntegerRows,
) -> None:
    measure_roundings(vectors.arrays, rows, roundings)
    round_to_integers(vectors.arrays, rows, roundings, added, out)
