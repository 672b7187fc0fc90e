"""Assigning vectors to inverted lists: which centroids are nearest, exactly and repeatably."""

import os

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.index import coarse_graph
from index_builder.rules.rules import CandidateCodes, QueryCodes
from index_builder.scoring.blocks import Block, IdColumn, PreparedCandidates, PreparedQueries
from index_builder.scoring.list_scan import list_scan
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import Product, fastest_product
from index_builder.scoring.topk import TopK
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.vectors import squared_norms

# Where more than this share of the lists is asked for, they are sorted rather than selected.
_SORTED_SHARE = 0.25
_SORTED_NUMBERS = 1 << 22


def nearest_lists(
    vectors: NDArray[np.float16],
    centroids: NDArray[np.float16],
    nprobe: int,
    metric: Metric = Metric.COSINE,
    threads: int | None = None,
    product: Product | None = None,
) -> NDArray[np.int32]:
    """Returns the nprobe nearest lists of each vector, nearest first, int32 [n, nprobe].

    Nearest as FAISS's coarse quantizer ranks them, but exactly: by distance under the Euclidean
    metric, by inner product under the others, rounded once to float32; ties go to the lower list
    number. `threads` and `product` are as `list_scan` takes them. Above GRAPH_LISTS lists a graph
    proposes the lists whose scores are compared, so that one may be missed (see coarse_graph).
    """
    if len(centroids) > coarse_graph.GRAPH_LISTS:
        return coarse_graph.nearest_by_graph(
            vectors,
            centroids,
            nprobe,
            lambda rows: _all_compared(rows, centroids, nprobe, metric, threads, product),
            euclidean=metric is Metric.EUCLIDEAN,
        )
    return _all_compared(vectors, centroids, nprobe, metric, threads, product)


def places_of_lists(
    vectors: NDArray[np.float16],
    centroids: NDArray[np.float16],
    owners: NDArray[np.int64],
    lists: NDArray[np.int64],
    metric: Metric = Metric.COSINE,
) -> NDArray[np.int64]:
    """Returns the place, from 1, of some lists in the order of lists of their vectors, int64 [pairs].

    The list `lists[i]` is looked up for the vector `owners[i]`, ascending. The order is that of all
    lists by `nearest_lists`, but exact above GRAPH_LISTS, too, and nothing is sorted: a list is
    preceded by those that score better, or as well with a lower number.
    """
    ranked_by = Metric.EUCLIDEAN if metric is Metric.EUCLIDEAN else Metric.INNER_PRODUCT
    wide, norms = centroids.astype(np.float64), squared_norms(centroids)
    places = np.empty(len(lists), dtype=np.int64)
    step = max(1, _SORTED_NUMBERS // len(centroids))
    for start in range(0, len(vectors), step):
        scores = _list_scores(vectors[start : start + step], wide, norms, ranked_by)
        first, last = np.searchsorted(owners, [start, start + step])
        places[first:last] = _count_better(scores, owners[first:last] - start, lists[first:last])
    return places


@njit(cache=True, nogil=True)
def _count_better(
    scores: NDArray[np.float32], owners: NDArray[np.int64], lists: NDArray[np.int64]
) -> NDArray[np.int64]:
    places = np.empty(len(lists), dtype=np.int64)
    for i in range(len(lists)):
        row, number = scores[owners[i]], lists[i]
        own, place = row[number], 1
        for other in range(number):
            place += row[other] >= own
        for other in range(number + 1, len(row)):
            place += row[other] > own
        places[i] = place
    return places


def _list_scores(
    vectors: NDArray[np.float16],
    wide: NDArray[np.float64],
    norms: NDArray[np.float64],
    metric: Metric,
) -> NDArray[np.float32]:
    """Returns the scores of all lists; sums of products of float16 numbers are exact in float64."""
    scores = vectors.astype(np.float64) @ wide.T
    if metric is Metric.EUCLIDEAN:
        scores = 2 * scores - squared_norms(vectors)[:, None] - norms
    return scores.astype(np.float32)


def _all_compared(
    vectors: NDArray[np.float16],
    centroids: NDArray[np.float16],
    nprobe: int,
    metric: Metric,
    threads: int | None,
    product: Product | None,
) -> NDArray[np.int32]:
    ranked_by = Metric.EUCLIDEAN if metric is Metric.EUCLIDEAN else Metric.INNER_PRODUCT
    if nprobe > max(16, _SORTED_SHARE * len(centroids)):
        return _sorted_lists(vectors, centroids, nprobe, ranked_by)
    queries = _as_queries(vectors, squared_norms(vectors))
    return _select(queries, centroids, nprobe, ranked_by, threads, product).rows.astype(np.int32)


def _as_queries(vectors: NDArray[np.float16], norms: NDArray[np.float64]) -> PreparedQueries:
    return PreparedQueries.of(Block(VectorRows.of(vectors), norms, QueryCodes.none(len(vectors))))


def _select(
    queries: PreparedQueries,
    centroids: NDArray[np.float16],
    nprobe: int,
    metric: Metric,
    threads: int | None,
    product: Product | None,
) -> TopK:
    block = Block(
        VectorRows.of(centroids), squared_norms(centroids), CandidateCodes.none(len(centroids))
    )
    candidates = PreparedCandidates.of(block, IdColumn.numbers(len(centroids)), first_row=0)
    count = len(queries.vectors)
    top = TopK(count, nprobe, id_bytes=4, metric=metric)
    probes = np.zeros((count, 1), dtype=np.int32)
    with list_scan(top, queries, probes, threads, product) as scan:
        scan.run(range(1), lambda _: candidates)
    return top


class NearestCentroids:
    """Vectors that are compared with all of one set of centroids after another, as k-means does.

    `threads` and `product` are as `list_scan` takes them; without a product it is the fastest one.
    """

    def __init__(
        self,
        vectors: NDArray[np.float16],
        metric: Metric,
        threads: int | None = None,
        product: Product | None = None,
    ) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        self.squared_norms = squared_norms(vectors)
        self._metric = Metric.EUCLIDEAN if metric is Metric.EUCLIDEAN else Metric.INNER_PRODUCT
        self._queries = _as_queries(vectors, self.squared_norms)
        self._product = product

    def find(self, centroids: NDArray[np.float16]) -> NDArray[np.int64]:
        """Returns the number of each vector's nearest centroid, int64 [n]; the lower one of two."""
        product = self._product or fastest_product()
        top = _select(self._queries, centroids, 1, self._metric, self.threads, product)
        return top.rows[:, 0]


def _sorted_lists(
    vectors: NDArray[np.float16], centroids: NDArray[np.float16], nprobe: int, metric: Metric
) -> NDArray[np.int32]:
    """The same from all scores."""
    wide, norms = centroids.astype(np.float64), squared_norms(centroids)
    found = np.empty((len(vectors), nprobe), dtype=np.int32)
    step = max(1, _SORTED_NUMBERS // len(centroids))
    for start in range(0, len(vectors), step):
        scores = _list_scores(vectors[start : start + step], wide, norms, metric)
        order = np.argsort(-scores, axis=1, kind="stable")
        found[start : start + step] = order[:, :nprobe]
    return found
