"""Lloyd's k-means on float16 vectors, with the same centroids on every host.

A round assigns every vector to its nearest centroid, exactly (see `assignment`), and moves each
centroid to the mean of its vectors, under a spherical metric to the mean's direction. Sums of float16
numbers below 1 are multiples of 2^-24 and exact in float64 up to 2^28 of them, so neither the matrix
product that proposes centroids, nor its tiles, nor the number of threads can change a byte. Between
rounds centroids are rounded to float16, which is how the index keeps them.

Of 131,072 vectors of 1280 numbers and 1,024 clusters a round took 0.4 s by AMX on two cores, of which
0.36 s found the nearest centroids (1.3 s in float32). One of FAISS's took 1.2 s, and the vectors got
no nearer to its centroids.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.index.assignment import NearestCentroids
from index_builder.scoring.intrinsics import half_to_float
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import Product
from index_builder.scoring.vectors import norms_in_order, round_float16, unit_float16

# A cluster whose vectors are spread by less than this share of their squared lengths is of equal
# vectors: what is left is the rounding of its own computation.
_NO_SPREAD = 1e-9
# Clusters whose sums are made at once, in float64.
BLOCK_CLUSTERS = 256


def find_centroids(
    vectors: NDArray[np.float16],
    clusters: int,
    metric: Metric,
    seed: int,
    *,
    iterations: int,
    most_points: int,
    threads: int | None = None,
    product: Product | None = None,
) -> NDArray[np.float16]:
    """Returns the centroids of k-means, float16 [clusters, d], of vectors of length 1 at most [n, d].

    It starts from rows drawn with `seed`, and looks at `most_points` drawn rows a cluster at most.
    Under euclidean centroids are means, under the other metrics unit vectors. A cluster that loses all
    of its vectors starts again at a vector far from its centroid, in the cluster with the largest
    squared error, or repeats another centroid where no cluster has two different vectors. A spherical
    one whose vectors cancel out stays where it is (a zero vector has no direction: it is a centroid of
    zeros if it was drawn). `threads` defaults to the cores of this process, `product` to a
    fast one for these vectors; neither changes the result.

    Memory: the rows that are looked at, where they are not all, about 100 bytes a row, two sets of
    centroids, and a block of sums in float64 for each thread.
    """
    rng = np.random.default_rng(seed)
    if len(vectors) > most_points * clusters:
        drawn = rng.choice(len(vectors), most_points * clusters, replace=False, shuffle=False)
        vectors = vectors[np.sort(drawn)]
    first = vectors[np.sort(rng.choice(len(vectors), clusters, replace=False, shuffle=False))]
    euclidean = metric is Metric.EUCLIDEAN
    centroids: NDArray[np.float16] = first if euclidean else unit_float16(first)[0]
    nearest = NearestCentroids(vectors, metric, threads, product)
    with ThreadPoolExecutor(nearest.threads) as pool:
        for _ in range(iterations):
            members = _Members(nearest.find(centroids), clusters)
            moved, errors = centroids.copy(), np.zeros(clusters)
            move = functools.partial(
                _move, vectors, nearest.squared_norms, members, moved, errors, euclidean=euclidean
            )
            for _ in pool.map(move, range(0, clusters, BLOCK_CLUSTERS)):
                pass
            _fill_empty(vectors, members, centroids, moved, errors, euclidean=euclidean)
            centroids = moved
    return centroids


class _Members:
    """The rows of each cluster: those of cluster c are rows[starts[c]:starts[c + 1]], ascending."""

    def __init__(self, nearest: NDArray[np.int64], clusters: int) -> None:
        self.rows = np.argsort(nearest, kind="stable").astype(np.int64)
        self.counts = np.bincount(nearest, minlength=clusters)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def of(self, cluster: int) -> NDArray[np.int64]:
        """Returns the rows of one cluster."""
        return self.rows[self.starts[cluster] : self.starts[cluster + 1]]


def _move(
    vectors: NDArray[np.float16],
    squared_norms: NDArray[np.float64],
    members: _Members,
    moved: NDArray[np.float16],
    errors: NDArray[np.float64],
    first: int,
    *,
    euclidean: bool,
) -> None:
    """Moves a block of centroids to the means of their vectors and sets their squared errors."""
    last = min(first + BLOCK_CLUSTERS, len(moved))
    counts = members.counts[first:last]
    filled = counts > 0
    sums = np.zeros((last - first, vectors.shape[1]))
    lengths = np.zeros(last - first)
    bits = np.ascontiguousarray(vectors).view(np.uint16)
    _add_up(bits, squared_norms, members.rows, members.starts[first : last + 1], sums, lengths)
    some = np.maximum(counts, 1)
    spread = lengths - norms_in_order(sums) ** 2 / some
    errors[first:last] = np.where(spread > _NO_SPREAD * lengths, spread, 0.0)
    if euclidean:
        means = round_float16(sums / some[:, None])
    else:
        means, directed = unit_float16(sums)
        filled &= directed
    moved[first:last][filled] = means[filled]


@njit(cache=True, nogil=True)
def _add_up(
    bits: NDArray[np.uint16],
    squared_norms: NDArray[np.float64],
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    sums: NDArray[np.float64],
    lengths: NDArray[np.float64],
) -> None:
    """Adds up the vectors of some clusters, and their squared norms."""
    for cluster in range(len(starts) - 1):
        for place in range(starts[cluster], starts[cluster + 1]):
            row = np.uint64(rows[place])
            lengths[cluster] += squared_norms[row]
            for j in range(np.uint64(bits.shape[1])):
                sums[cluster, j] += np.float64(half_to_float(bits[row, j]))


def _fill_empty(
    vectors: NDArray[np.float16],
    members: _Members,
    centroids: NDArray[np.float16],
    moved: NDArray[np.float16],
    errors: NDArray[np.float64],
    *,
    euclidean: bool,
) -> None:
    """Moves the centroids of empty clusters to vectors of those with the largest errors.

    The k-th one that a cluster gives away is the k-th farthest from its centroid; each time its error
    counts for half as much. Once no cluster has an error they repeat another centroid.
    """
    given: dict[int, list[int]] = {}
    for empty in np.flatnonzero(members.counts == 0):
        largest = int(errors.argmax())
        if errors[largest] == 0:
            moved[empty] = moved[members.counts.argmax()]
            continue
        if largest not in given:
            rows = members.of(largest)
            near = _nearness(vectors[rows], centroids[largest], euclidean=euclidean)
            given[largest] = rows[np.argsort(near, kind="stable")].tolist()[::-1]
        row = given[largest].pop()
        errors[largest] = errors[largest] / 2 if given[largest] else 0.0
        vector = vectors[row : row + 1]
        found, directed = (vector, np.ones(1, bool)) if euclidean else unit_float16(vector)
        if directed[0]:
            moved[empty] = found[0]


def _nearness(
    rows: NDArray[np.float16], centroid: NDArray[np.float16], *, euclidean: bool
) -> NDArray[np.float64]:
    """Returns how near vectors are to a centroid, exact, float64 [n]: higher is nearer."""
    wide, centre = rows.astype(np.float64), centroid.astype(np.float64)
    near: NDArray[np.float64] = wide @ centre
    return 2 * near - np.square(wide).sum(axis=1) if euclidean else near
