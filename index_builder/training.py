"""Training: the transform and the coarse quantizer, learned on one seeded random sample."""

import dataclasses
import io
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from index_builder import storage
from index_builder.spec import MAX_POINTS_PER_CENTROID, ResolvedSpec
from index_builder.transform import Transform, learn_transform
from index_builder.vectors import unit_float16

_KMEANS_ITERATIONS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedIndex:
    """What every row is indexed by: the transform and the centroids, float16 [nlist, dim].

    Centroids are in list order: neighbouring lists have similar centroids.
    """

    transform: Transform
    centroids: NDArray[np.float16]

    @property
    def nlist(self) -> int:
        """The number of inverted lists."""
        return int(self.centroids.shape[0])

    @property
    def dim(self) -> int:
        """The numbers of an indexed vector."""
        return int(self.centroids.shape[1])


def train_index(spec: ResolvedSpec, sample: NDArray[np.float16]) -> TrainedIndex:
    """Learns the transform and the centroids on a sample of embeddings, float16 [n, encoder_dim].

    Spherical k-means by FAISS, seeded. The centroids are rounded to float16, so assigning a vector
    to them is exact. A sample with fewer distinct vectors than lists yields duplicate centroids;
    those are dropped, so the trained nlist can be smaller than the spec's. (FAISS tells some of them
    apart by a small random shift: those stay, as empty lists.)
    """
    transform = learn_transform(spec.request.transform, sample)
    seed = spec.request.seed
    vectors = transform.apply(sample).astype(np.float32)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        spec.nlist,
        niter=_KMEANS_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MAX_POINTS_PER_CENTROID,
    )
    kmeans.train(vectors)
    centroids, valid = unit_float16(kmeans.centroids)
    if not valid.any():  # opposite vectors cancel out
        centroids, valid = unit_float16(vectors[:1])
    centroids = np.unique(centroids[valid], axis=0)
    return TrainedIndex(transform, centroids[_neighbouring_order(centroids, seed)])


def _neighbouring_order(centroids: NDArray[np.float16], seed: int) -> NDArray[np.int64]:
    """Orders lists so that neighbouring lists are similar.

    The centroids are clustered into about sqrt(nlist) groups; the groups are chained from each to
    its most similar unvisited one, and a group's lists follow by similarity to the group's centre.
    """
    count = len(centroids)
    wide = centroids.astype(np.float32)
    if count < 4:
        return np.arange(count, dtype=np.int64)
    groups = faiss.Kmeans(
        wide.shape[1], round(count**0.5), niter=10, seed=seed, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=MAX_POINTS_PER_CENTROID,
    )  # fmt: skip
    groups.train(wide)
    centres = np.asarray(groups.centroids)
    similarity = centres @ centres.T
    chain = [0]
    waiting = np.ones(len(centres), dtype=bool)
    waiting[0] = False
    while waiting.any():
        following = int(np.where(waiting, similarity[chain[-1]], -np.inf).argmax())
        chain.append(following)
        waiting[following] = False
    position = np.empty(len(centres), dtype=np.int64)
    position[chain] = np.arange(len(chain))
    affinity = wide @ centres.T
    group = affinity.argmax(axis=1)
    order: NDArray[np.int64] = np.lexsort((np.arange(count), -affinity.max(axis=1), position[group]))
    return order


def save_trained(path: str, trained: TrainedIndex) -> None:
    """Writes a trained index as one `.npz` file; equal arrays give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {"centroids": trained.centroids}
    if trained.transform.matrix is not None and trained.transform.mean is not None:
        arrays |= {"mean": trained.transform.mean, "matrix": trained.transform.matrix}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    storage.write_bytes(path, buffer.getvalue())


def load_trained(path: str) -> TrainedIndex:
    """Reads what `save_trained` wrote. Raises FileNotFoundError."""
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
        transform = Transform(arrays["mean"], arrays["matrix"]) if "matrix" in arrays else Transform()
        return TrainedIndex(transform, arrays["centroids"])
