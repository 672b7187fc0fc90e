"""Exact top-k: a fast product proposes, an exact score decides, ties are ordered by id bytes.

A pair is scored exactly only when its fast product comes within a computed error bound of the query's
current k-th score, so the result is the true top-k of all pairs that were offered, bit for bit,
whatever the product, its tiles, the number of threads or the order of the offers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index_builder.rules.rules import CandidateCodes, QueryCodes
from index_builder.scoring.blocks import Block, IdColumn, PreparedCandidates, PreparedQueries
from index_builder.scoring.intrinsics import WIDE
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import Product, product_for, timed_products
from index_builder.scoring.proposers import best_query_rows, open_proposer
from index_builder.scoring.scores import Scoring
from index_builder.scoring.tiles import GROUP, Heaps, offer_tile

# At most; a product may want fewer queries.
QUERY_TILE_ROWS = 1024
CORPUS_TILE_ROWS = 1024
# Scoring a pair exactly takes about as long as 20 of its products: a product that rounds gives way to
# one in float32 when more than this share of the pairs, and of so many at least, are scored in vain.
_WORTH_SCORING = 0.04
_LEAST_JUDGED = 1 << 18


class TopK:
    """The k best neighbours so far of n queries, best first.

    Ordered by score descending, then id bytes ascending. `counts` int64 [n] says how many of
    `scores` float32 [n, k] and `rows` int64 [n, k] there are; beyond they are 0. Of candidates that
    share a value of capped column c, at most `caps[c]` are kept; an item's group must be within one
    group of the next cap. `cap_codes` int32 [c, n, k] are the values kept (-1: none), in no order.

    Memory: n k (16 + id_bytes + 4 c) bytes.
    """

    def __init__(
        self,
        queries: int,
        k: int,
        id_bytes: int,
        metric: Metric = Metric.COSINE,
        unscale: float = 1.0,
        caps: Sequence[int] = (),
    ) -> None:
        self.k = k
        self.metric = metric
        self.unscale = unscale
        # Zeros are pages that nobody has touched yet: those who write them first are several threads.
        self.scores = np.zeros((queries, k), dtype=np.float32)
        self.rows = np.zeros((queries, k), dtype=np.int64)
        self.counts = np.zeros(queries, dtype=np.int64)
        self.cap_codes = np.full((len(caps), queries, k), -1, dtype=np.int32)
        self.caps = np.asarray(caps, dtype=np.int64)
        self.heaps = Heaps(
            self.scores,
            self.rows,
            self.counts,
            np.zeros((queries, k), dtype=np.int32),
            np.zeros((queries, k, id_bytes), dtype=np.uint8),
            np.zeros((queries, k), dtype=np.int32),
            self.cap_codes,
            np.tile(np.asarray([0.0, -np.inf], dtype=np.float32), (queries, 1)),
        )
        # Fast products made, and pairs scored exactly, for whoever measures.
        self.proposed = 0
        self.rescored = 0

    def offer(
        self,
        slots: NDArray[np.int64],
        queries: Block[QueryCodes],
        corpus: Block[CandidateCodes],
        ids: IdColumn,
        first_row: int,
        product: Product | None = None,
    ) -> None:
        """Offers every row of `corpus` to every one of `queries`.

        `slots` [m] says which of the n queries each row of `queries` is; `ids` and `first_row`
        belong to the corpus rows. No pair may be offered twice.
        """
        scorer = Scorer(queries.vectors.dim, product or product_for(queries.vectors))
        candidates = PreparedCandidates.of(corpus, ids, first_row)
        rows = np.arange(len(queries), dtype=np.int64)
        scorer.offer(self, slots, PreparedQueries.of(queries), rows, candidates)
        self.proposed += scorer.proposed
        self.rescored += scorer.rescored


class Scorer:
    """One thread's way to score: its product, and scratch memory that is used for every tile.

    A product whose error lets too many pairs through, as among vectors that are nearly alike, gives way
    to the fastest one in float32. Memory: a tile of queries and one of the corpus as the product takes
    them, and one of products.
    """

    def __init__(self, dim: int, product: Product) -> None:
        self._dim = dim
        self._query_rows = min(QUERY_TILE_ROWS, best_query_rows(product))
        self._take(product)
        self._fast = np.empty(self._query_rows * CORPUS_TILE_ROWS, dtype=np.float32)
        self._found = np.empty((GROUP + 1) * CORPUS_TILE_ROWS, dtype=np.int32)
        self._keys = np.empty(-(-CORPUS_TILE_ROWS // WIDE) * WIDE, dtype=np.float32)
        self._no_offsets = np.zeros(CORPUS_TILE_ROWS, dtype=np.float32)
        self.proposed = 0
        self.rescored = 0
        self._needed = 0

    def offer(
        self,
        top: TopK,
        slots: NDArray[np.int64],
        queries: PreparedQueries,
        rows: NDArray[np.int64],
        candidates: PreparedCandidates,
    ) -> None:
        """Offers every candidate to some rows of `queries`, whose heaps in `top` are `slots`.

        No pair may be offered twice. Different threads may offer to different slots at the same
        time, each with its own scorer.
        """
        scoring = Scoring(top.metric.code, top.unscale)
        query_tiles = _even_tiles(len(rows), self._query_rows)
        arrays = candidates.arrays
        offsets = arrays.halves if top.metric is Metric.EUCLIDEAN else None
        queries_taken = False
        for first, last in _even_tiles(candidates.distinct, CORPUS_TILE_ROWS):
            corpus_taken = False
            for start, stop in query_tiles:
                if self._lets_too_many_through():
                    self._take(timed_products()[0].product)
                    queries_taken = corpus_taken = False
                if not corpus_taken:
                    self._proposer.take_corpus(candidates.vectors, arrays.runs[first:last])
                if not queries_taken or len(query_tiles) > 1:
                    self._proposer.take_queries(queries.vectors, rows[start:stop])
                queries_taken = corpus_taken = True
                fast = self._fast[: (stop - start) * (last - first)].reshape(stop - start, last - first)
                self._proposer.multiply(fast)
                self.proposed += fast.size
                rescored, needed = offer_tile(
                    fast,
                    self._proposer.errors,
                    scoring,
                    slots[start:stop],
                    rows[start:stop],
                    queries.arrays,
                    arrays.lengths[first:last],
                    self._no_offsets[: last - first] if offsets is None else offsets[first:last],
                    first,
                    candidates.first_row,
                    arrays,
                    top.caps,
                    top.heaps,
                    self._found,
                    self._keys,
                )
                self.rescored += rescored
                self._needed += needed

    def _take(self, product: Product) -> None:
        self._product = product
        self._proposer = open_proposer(product, self._query_rows, CORPUS_TILE_ROWS, self._dim)

    def _lets_too_many_through(self) -> bool:
        if self._product.unit_roundoff == 0 or self.proposed < _LEAST_JUDGED:
            return False
        return self.rescored - self._needed > _WORTH_SCORING * self.proposed


def _even_tiles(count: int, most: int) -> list[tuple[int, int]]:
    """Cuts a count into ranges of about equal length, none longer than `most`."""
    tiles = -(-count // most)
    return [(count * tile // tiles, count * (tile + 1) // tiles) for tile in range(tiles)]
