"""From float16 rows to a tile of fast products, in the form that a product takes them."""

import numpy as np
from numpy.typing import NDArray

from index_builder.scoring.native_products import NativeProduct, Proposer
from index_builder.scoring.products import Product
from index_builder.scoring.scores import error_bound
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.widening import widen_rows


class WideningProposer:
    """Widens rows to float32, for products that take that."""

    def __init__(self, product: Product, most_queries: int, most_corpus: int, dim: int) -> None:
        self._product = product
        self._queries = np.empty((most_queries, dim), dtype=np.float32)
        self._corpus = np.empty((most_corpus, dim), dtype=np.float32)
        self._rows = self._columns = 0
        self._errors = np.full(most_queries, error_bound(dim, product.unit_roundoff), np.float32)

    @property
    def errors(self) -> NDArray[np.float32]:
        """See Proposer."""
        return self._errors[: self._rows]

    def take_queries(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        self._rows = len(rows)
        widen_rows(vectors.arrays, rows, self._queries[: self._rows])

    def take_corpus(self, vectors: VectorRows, rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        self._columns = len(rows)
        widen_rows(vectors.arrays, rows, self._corpus[: self._columns])

    def multiply(self, out: NDArray[np.float32]) -> None:
        """See Proposer."""
        self._product.multiply(self._queries[: self._rows], self._corpus[: self._columns], out)


def best_query_rows(product: Product) -> int:
    """Returns how many queries a tile should have.

    BLAS packs its operands for each call, which pays off over many rows (7 % from 512 to 1,024);
    native products pack rows themselves, and fewer stay in the cache.
    """
    return 512 if isinstance(product, NativeProduct) else 1024


def open_proposer(product: Product, most_queries: int, most_corpus: int, dim: int) -> Proposer:
    """Returns the proposer of a product, for tiles of at most so many rows."""
    if isinstance(product, NativeProduct):
        return product.open(most_queries, most_corpus, dim)
    return WideningProposer(product, most_queries, most_corpus, dim)
