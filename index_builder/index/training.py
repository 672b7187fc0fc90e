"""Training: the transform and the coarse quantizer, learned on one seeded random sample."""

import dataclasses
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.datasets import storage
from index_builder.datasets.sampling import sample_rows
from index_builder.errors import DatasetError
from index_builder.index.kmeans import find_centroids
from index_builder.index.product_quantizer import Codebooks, train_codebooks
from index_builder.index.spec import MAX_POINTS_PER_CENTROID, ResolvedSpec
from index_builder.index.transform import Transform, learn_transform, row_blocks
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import squared_norms, unit_float16

# As FAISS trains its inverted lists; with 20 recall was the same within its error.
KMEANS_ITERATIONS = 10
_BLOCK_ROWS = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedIndex:
    """What every row is indexed by: the transform and the centroids, float16 [nlist, dim].

    Centroids are in list order: neighbouring lists have similar centroids. Under euclidean they are
    means, under the other metrics unit vectors. `codebooks` are there where rows have codes.
    """

    transform: Transform
    centroids: NDArray[np.float16]
    codebooks: Codebooks | None = None

    @property
    def metric(self) -> Metric:
        """How vectors are compared, with each other and with centroids."""
        return self.transform.metric

    @property
    def nlist(self) -> int:
        """The number of inverted lists."""
        return int(self.centroids.shape[0])

    @property
    def dim(self) -> int:
        """The numbers of an indexed vector."""
        return int(self.centroids.shape[1])


def train_index(
    spec: ResolvedSpec, sample: NDArray[np.floating[Any]], largest_norm: float | None = None
) -> TrainedIndex:
    """Learns the transform and the centroids on a sample of embeddings, [n, encoder_dim].

    `largest_norm` is that of the whole corpus, from which the scale is chosen where the metric has
    one; None stands for a sample that is the whole corpus.

    K-means is seeded: for euclidean the plain one, else the spherical one, as FAISS does for its inner
    product; its centroids are float16, so assigning a vector to them is exact. A sample with fewer
    distinct vectors than lists yields duplicate centroids; those are dropped, so the trained nlist can
    be smaller than the spec's.
    """
    request = spec.request
    transform = learn_transform(request.transform, sample, request.metric, largest_norm)
    # No more rows are transformed than k-means looks at.
    rows = sample_rows(len(sample), spec.nlist * MAX_POINTS_PER_CENTROID, request.seed)
    vectors = np.empty((len(rows), transform.dim(sample.shape[1])), dtype=np.float16)
    for start in range(0, len(rows), _BLOCK_ROWS):
        taken = slice(start, start + _BLOCK_ROWS)
        vectors[taken] = transform.apply(sample[rows[taken]])
    centroids = _kmeans(vectors, min(spec.nlist, len(vectors)), request.metric, request.seed)
    if request.metric is not Metric.EUCLIDEAN:
        centroids = centroids[centroids.any(axis=1)]
        if not len(centroids):  # none that was drawn has a direction: the first vector that has one
            centroids = unit_float16(vectors[vectors.any(axis=1)][:1])[0]
        if not len(centroids):  # nor has a zero vector a direction: one list for all
            centroids = np.eye(1, vectors.shape[1], dtype=np.float16)
    centroids = np.unique(centroids, axis=0)
    order = _neighbouring_order(centroids, request.metric, request.seed)
    codebooks = train_codebooks(vectors, request.seed) if spec.may_have_codes else None
    return TrainedIndex(transform, centroids[order], codebooks)


def _kmeans(
    vectors: NDArray[np.float16], clusters: int, metric: Metric, seed: int
) -> NDArray[np.float16]:
    return find_centroids(
        vectors,
        clusters,
        metric,
        seed,
        iterations=KMEANS_ITERATIONS,
        most_points=MAX_POINTS_PER_CENTROID,
    )


def _neighbouring_order(centroids: NDArray[np.float16], metric: Metric, seed: int) -> NDArray[np.int64]:
    """Orders lists so that neighbouring lists are similar.

    The centroids are clustered into about sqrt(nlist) groups; the groups are chained from each to
    its most similar unvisited one, and a group's lists follow by similarity to the group's centre.
    """
    count = len(centroids)
    if count < 4:
        return np.arange(count, dtype=np.int64)
    centres = _kmeans(centroids, round(count**0.5), metric, seed)
    similarity = _similarity(centres, centres, metric)
    chain = [0]
    waiting = np.ones(len(centres), dtype=bool)
    waiting[0] = False
    while waiting.any():
        following = int(np.where(waiting, similarity[chain[-1]], -np.inf).argmax())
        chain.append(following)
        waiting[following] = False
    position = np.empty(len(centres), dtype=np.int64)
    position[chain] = np.arange(len(chain))
    affinity = _similarity(centroids, centres, metric)
    group = affinity.argmax(axis=1)
    order: NDArray[np.int64] = np.lexsort((np.arange(count), -affinity.max(axis=1), position[group]))
    return order


def _similarity(
    rows: NDArray[np.float16], centres: NDArray[np.float16], metric: Metric
) -> NDArray[np.float64]:
    """Returns how near rows are to centres, exact, higher is nearer, float64 [rows, centres]."""
    wide = centres.astype(np.float64)
    blocks = [block.astype(np.float64) @ wide.T for block in row_blocks(rows)]
    similarity: NDArray[np.float64] = np.concatenate(blocks)
    if metric is Metric.EUCLIDEAN:
        similarity = 2 * similarity - squared_norms(rows)[:, None] - squared_norms(centres)
    return similarity


def save_trained(path: str, trained: TrainedIndex) -> None:
    """Writes a trained index as one `.npz` file; equal arrays give equal bytes."""
    transform = trained.transform
    arrays: dict[str, NDArray[Any]] = {
        "centroids": trained.centroids,
        "metric": np.asarray(trained.metric.value),
        "exponents": np.asarray([transform.input_exponent, transform.output_exponent], np.int64),
    }
    if transform.matrix is not None and transform.mean is not None:
        arrays |= {"mean": transform.mean, "matrix": transform.matrix}
    if trained.codebooks is not None:
        arrays["codebooks"] = trained.codebooks.values
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(path, buffer.getvalue())


def load_trained(path: str) -> TrainedIndex:
    """Reads what `save_trained` wrote.

    Raises FileNotFoundError, and DatasetError for a file of a version that knew no metric.
    """
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
        missing = {"centroids", "metric", "exponents"} - set(arrays)
        if missing:
            raise DatasetError(
                f"{path} has no {', '.join(sorted(missing))}: another version of Kith wrote it. Build "
                "the index again."
            )
        before, after = (int(number) for number in arrays["exponents"])
        transform = Transform(
            arrays.get("mean"), arrays.get("matrix"), Metric(str(arrays["metric"])), before, after
        )
        centroids = arrays["centroids"]
        codebooks = None
        if "codebooks" in arrays:
            codebooks = Codebooks(arrays["codebooks"], centroids.shape[1])
        return TrainedIndex(transform, centroids, codebooks)
