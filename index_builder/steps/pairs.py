"""Pairs of vectors above a score threshold, merged into connected components as they are found.

A fast float32 product proposes, with a computed bound of its error; the exact score decides. What is
kept is a spanning forest, never the pairs: memory is linear in rows however many pairs there are.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from index_builder.errors import ConfigError
from index_builder.index.shards import IndexDataset, IndexShard, open_shard
from index_builder.scoring.metrics import Metric
from index_builder.search.join import probed_shards

# Unit roundoff of float32, and how far the rounding of a score and of a threshold can move them.
_UNIT_ROUNDOFF = 2.0**-24
_SCORE_SLACK = 2.0**-23
_QUERY_TILE_ROWS = 1024
_CORPUS_TILE_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """Which pairs count: their score is at least `threshold`, rounded to float32 as scores are.

    A pair is found when the list of one is among the `nprobe` nearest lists of the other, in either
    direction; None takes all lists that the index keeps for a row.
    """

    threshold: float
    nprobe: int | None = None
    threads: int | None = None

    def resolve(self, metric: Metric, nprobe: int) -> "PairSpec":
        """Returns the spec for an index of a metric that keeps `nprobe` lists for every row.

        Raises ConfigError for a threshold that no score of the metric has, or that all have, and for
        more lists than the index keeps.
        """
        check_threshold(metric, self.threshold)
        if self.nprobe is not None and self.nprobe > nprobe:
            raise ConfigError(
                f"duplicates.nprobe: got {self.nprobe}, wanted at most {nprobe}: so many nearest lists "
                "of every row are kept in the index. Lower it, set it to auto, or raise index.nprobe."
            )
        return dataclasses.replace(self, nprobe=self.nprobe or nprobe)


def check_threshold(metric: Metric, threshold: float) -> None:
    """Raises ConfigError for a threshold that makes no sense for a metric."""
    wanted = {
        Metric.COSINE: ("above 0 and at most 1", 0 < threshold <= 1),
        Metric.EUCLIDEAN: ("at most 0 (minus the largest squared distance)", threshold <= 0),
        Metric.INNER_PRODUCT: ("a number", True),
    }
    text, good = wanted[metric]
    if not (good and math.isfinite(threshold)):
        raise ConfigError(
            f"duplicates.threshold: got {threshold}, wanted {text}, since index.metric is "
            f"{metric.value}. Correct it, or set it to null to look for no duplicates."
        )


def link_shard(index: IndexDataset, number: int, spec: PairSpec) -> NDArray[np.int64]:
    """Links every row of one index shard to the rows it is a pair with, in the whole index.

    Returns a spanning forest, int64 [edges, 2] in rows of the index: the components that the forests
    of all shards have together are those of all pairs. The edges do not depend on the number of
    threads. Raises DatasetError when the shard's files do not match the manifest.

    Memory: one query shard, one corpus shard (mapped), and for each thread 20 bytes a row of both.
    """
    metric = Metric(index.manifest.properties.get("metric", Metric.COSINE.value))
    unscale = 2.0 ** (-2 * int(index.manifest.properties.get("scale_exponent", 0)))
    test = _Test.of(metric, np.float32(spec.threshold), index.trained.dim, unscale)
    with open_shard(index, number, ("squared_norm", "probes"), verify=True) as shard:
        home = _Home.of(shard, test, spec.nprobe)
        first_row = shard.first_row
    rows = len(home.parent)
    attached = [np.empty((0, 2), np.int64)]
    threads = spec.threads or len(os.sched_getaffinity(0))
    bounds = np.linspace(0, len(home.rows), threads + 1).astype(int)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for other in probed_shards(index, home.probes, number):
            with open_shard(index, other, ("squared_norm",)) as shard:
                corpus = _Corpus(shard, shard.squared_norms(), 0 if other == number else rows)
                parent = home.parent
                if other != number:
                    more = np.arange(rows, rows + len(corpus.norms), dtype=np.int32)
                    parent = np.concatenate([parent, more])
                link = functools.partial(_link_range, home, corpus, parent, test)
                edges = np.concatenate(list(pool.map(link, bounds[:-1], bounds[1:])))
                _merge(parent, edges)
                home.parent[:] = parent[:rows]
                # Of all edges to a row elsewhere one is enough: those it is linked to are merged now.
                far, place = np.unique(edges[:, 1], return_index=True)
                near = edges[place[far >= rows], 0]
                far = far[far >= rows] - rows + shard.first_row
                attached.append(np.stack([near, far], axis=1))
    roots = home.parent.astype(np.int64)
    linked = np.flatnonzero(roots != np.arange(rows))
    outside = np.concatenate(attached)
    outside[:, 0] = roots[outside[:, 0]] + first_row
    inside = np.stack([roots[linked], linked], axis=1) + first_row
    return np.concatenate([inside, outside])


@dataclasses.dataclass(frozen=True)
class _Test:
    """The exact test, score >= threshold, and the fast one that never fails what passes it.

    A fast dot product f passes when f >= reach |q| |x| + floor + lift (|q|^2 + |x|^2).
    """

    metric: int
    threshold: float
    unscale: float
    reach: float
    floor: float
    lift: float

    @staticmethod
    def of(metric: Metric, threshold: np.float32, dim: int, unscale: float) -> "_Test":
        """Prepares the tests; `unscale` turns products of stored vectors into those of the input.

        A float32 sum of d exact products is off by gamma_d |q| |x| at most, gamma_d = d u / (1 - d u),
        in any order (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
        """
        bound = dim * _UNIT_ROUNDOFF / (1 - dim * _UNIT_ROUNDOFF)
        lowest = float(threshold) - abs(float(threshold)) * _SCORE_SLACK
        if metric is Metric.COSINE:
            reach, floor, lift = lowest - bound, 0.0, 0.0
        elif metric is Metric.EUCLIDEAN:
            # The sum of the norms is exact; 2^-40 of it covers the roundings of the test itself.
            reach, floor, lift = -bound, lowest / unscale / 2, 0.5 - 2.0**-40
        else:
            reach, floor, lift = -bound, lowest / unscale, 0.0
        return _Test(metric.code, float(threshold), unscale, reach, floor, lift)


@dataclasses.dataclass(frozen=True, eq=False)
class _Home:
    """The query shard: one row of every run of identical vectors, and the components so far.

    `rows` int64 [n] are row numbers in the shard, ascending; `vectors` float32 [n, d], `norms` float64
    [n] and `probes` int32 [n, nprobe] belong to them. `parent` int32 [rows of the shard] is a
    forest whose roots are the smallest rows of their components.
    """

    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]
    norms: NDArray[np.float64]
    probes: NDArray[np.int32]
    parent: NDArray[np.int32]

    @staticmethod
    def of(shard: IndexShard, test: _Test, nprobe: int | None) -> "_Home":
        codes, norms = shard.vectors().matrix(), shard.squared_norms()
        heads = _run_heads(codes.view(np.uint16), norms, test.metric, test.unscale, test.threshold)
        rows = np.flatnonzero(heads)
        parent = rows[np.cumsum(heads) - 1].astype(np.int32)
        vectors = codes[rows].astype(np.float32)
        probes = np.ascontiguousarray(shard.probes()[rows, :nprobe])
        return _Home(rows, vectors, norms[rows], probes, parent)


@dataclasses.dataclass(frozen=True, eq=False)
class _Corpus:
    """A corpus shard; its row j is node `first_node` + j of the components."""

    shard: IndexShard
    norms: NDArray[np.float64]
    first_node: int

    def list_block(
        self, number: int, test: _Test
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
        """Returns nodes, vectors and squared norms of a list, one row of every run of equal ones."""
        start, stop = self.shard.layout.list_rows(self.shard.number, number)
        codes, norms = self.shard.list_codes(number), self.norms[start:stop]
        heads = _run_heads(codes.view(np.uint16), norms, test.metric, test.unscale, test.threshold)
        nodes = np.flatnonzero(heads)
        return nodes + start + self.first_node, codes[nodes].astype(np.float32), norms[nodes]


def _link_range(
    home: _Home, corpus: _Corpus, parent: NDArray[np.int32], test: _Test, start: int, stop: int
) -> NDArray[np.int64]:
    """Links the queries start to stop with one corpus shard; returns the edges that merged any."""
    parent = parent.copy()
    # A merge joins two of the components, so there are fewer merges than nodes.
    edges = np.empty((len(parent), 2), dtype=np.int64)
    count = 0
    for number, places in _queries_by_list(home.probes[start:stop], corpus.shard.lists):
        nodes, vectors, norms = corpus.list_block(number, test)
        queries = places + start
        for q in range(0, len(queries), _QUERY_TILE_ROWS):
            tile = queries[q : q + _QUERY_TILE_ROWS]
            tile_vectors = home.vectors[tile]
            for c in range(0, len(nodes), _CORPUS_TILE_ROWS):
                cut = slice(c, c + _CORPUS_TILE_ROWS)
                count = _link_tile(
                    tile_vectors @ vectors[cut].T,
                    home.rows[tile],
                    tile_vectors,
                    home.norms[tile],
                    nodes[cut],
                    vectors[cut],
                    norms[cut],
                    test.metric,
                    test.unscale,
                    test.threshold,
                    test.reach,
                    test.floor,
                    test.lift,
                    parent,
                    edges,
                    count,
                )
    return edges[:count].copy()


def _queries_by_list(
    probes: NDArray[np.int32], lists: range
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields each list of a range with the rows of `probes` that name it, ascending."""
    flat = probes.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(lists.start, lists.stop + 1))
    for number, first, last in zip(lists, bounds[:-1], bounds[1:], strict=True):
        if last > first:
            yield number, order[first:last] // probes.shape[1]


@njit(cache=True, nogil=True, fastmath=True)
def _exact_dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Dot product in float64; exact in any order of summation, so reordering is harmless here."""
    total = 0.0
    for i in range(a.shape[0]):
        total += float(a[i]) * float(b[i])
    return total


@njit(cache=True, nogil=True)
def _score(metric: int, dot: float, q_norm: float, x_norm: float, unscale: float) -> np.float32:
    """The score of a pair from its exact dot product and squared norms; no pair has a zero cosine."""
    if metric == 0:
        square = q_norm * x_norm
        return np.float32(dot / np.sqrt(square)) if square > 0 else np.float32(-np.inf)
    if metric == 1:
        return np.float32(-(q_norm + x_norm - 2.0 * dot) * unscale)
    return np.float32(dot * unscale)


@njit(cache=True, nogil=True)
def _root(parent: NDArray[np.int32], node: int) -> int:
    """The root of a node; every second step of the way is shortened."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True, nogil=True)
def _merge(parent: NDArray[np.int32], edges: NDArray[np.int64]) -> None:
    """Merges components along edges, then points every node at its root, the smallest node."""
    for e in range(edges.shape[0]):
        a, b = _root(parent, edges[e, 0]), _root(parent, edges[e, 1])
        parent[max(a, b)] = min(a, b)
    for node in range(parent.shape[0]):
        parent[node] = parent[parent[node]]


@njit(cache=True, nogil=True)
def _run_heads(
    codes: NDArray[np.uint16],
    norms: NDArray[np.float64],
    metric: int,
    unscale: float,
    threshold: float,
) -> NDArray[np.bool_]:
    """Marks the rows that have to be compared: all but those whose bytes are those of the row before.

    Equal rows are a pair, unless their score with themselves is below the threshold, as an inner
    product's may be; such rows are all marked.
    """
    heads = np.ones(codes.shape[0], dtype=np.bool_)
    for i in range(1, codes.shape[0]):
        if _score(metric, norms[i], norms[i], norms[i], unscale) < threshold:
            continue
        for j in range(codes.shape[1]):
            if codes[i, j] != codes[i - 1, j]:
                break
        else:
            heads[i] = False
    return heads


@njit(cache=True, nogil=True)
def _link_tile(
    fast: NDArray[np.float32],
    q_nodes: NDArray[np.int64],
    q_vectors: NDArray[np.float32],
    q_norms: NDArray[np.float64],
    x_nodes: NDArray[np.int64],
    x_vectors: NDArray[np.float32],
    x_norms: NDArray[np.float64],
    metric: int,
    unscale: float,
    threshold: float,
    reach: float,
    floor: float,
    lift: float,
    parent: NDArray[np.int32],
    edges: NDArray[np.int64],
    count: int,
) -> int:
    """Merges the pairs of one tile; appends to `edges` from `count` on and returns the new count.

    A pair whose rows are in one component already is not scored, so that many pairs within one group
    cost no more than their fast products.
    """
    slopes = reach * np.sqrt(x_norms)
    lifts = lift * x_norms
    for i in range(fast.shape[0]):
        length = np.sqrt(q_norms[i])
        least = floor + lift * q_norms[i]
        near = 0
        for j in range(fast.shape[1]):
            if np.float64(fast[i, j]) >= length * slopes[j] + least + lifts[j]:
                near += 1
        if near == 0:
            continue
        root = _root(parent, q_nodes[i])
        for j in range(fast.shape[1]):
            if np.float64(fast[i, j]) >= length * slopes[j] + least + lifts[j]:
                other = _root(parent, x_nodes[j])
                if other == root:
                    continue
                dot = _exact_dot(q_vectors[i], x_vectors[j])
                if _score(metric, dot, q_norms[i], x_norms[j], unscale) >= threshold:
                    edges[count, 0] = q_nodes[i]
                    edges[count, 1] = x_nodes[j]
                    count += 1
                    parent[max(root, other)] = min(root, other)
                    root = min(root, other)
    return count
