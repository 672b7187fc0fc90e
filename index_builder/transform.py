"""The index's linear transform: centring, PCA and partial whitening, with results that repeat.

The matrix and the mean are stored on a grid of 2^-24, like the float16 vectors that they meet, so
every product and partial sum of the transform is exact in float64 (the rows of the matrix are at most
of unit length): the transformed vector does not depend on the machine or on how many rows go in.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import DatasetError
from index_builder.spec import TransformSpec
from index_builder.vectors import unit_float16

_GRID = 2.0**24
# Components whose eigenvalue is below this share of the largest are noise of the arithmetic; dividing
# by a power of them would blow it up.
_RANK_TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """x -> matrix (x - mean), then unit length; without a matrix, x stays as it is.

    `mean` is float64 [encoder_dim], `matrix` float64 [dim, encoder_dim].
    """

    mean: NDArray[np.float64] | None = None
    matrix: NDArray[np.float64] | None = None

    def dim(self, encoder_dim: int) -> int:
        """Returns the numbers of a transformed vector."""
        return encoder_dim if self.matrix is None else int(self.matrix.shape[0])

    def apply(self, vectors: NDArray[np.float16]) -> NDArray[np.float16]:
        """Transforms float16 unit vectors [n, encoder_dim] to float16 unit vectors [n, dim].

        Raises DatasetError for a vector without a direction: a zero vector, or one that equals the
        mean of the training sample.
        """
        if self.matrix is None or self.mean is None:
            wide = vectors.astype(np.float64)
            bad = ~(np.isfinite(wide).all(axis=1) & wide.any(axis=1))
            result = vectors
        else:
            centred = vectors.astype(np.float64) - self.mean
            result, valid = unit_float16(centred @ self.matrix.T)
            bad = ~valid
        if bad.any():
            raise DatasetError(
                f"{int(bad.sum())} vectors have no direction after the index's transform (first at "
                f"row {int(np.argmax(bad))} of its block): under cosine they cannot be compared. "
                "Embed again: zero vectors belong in failures."
            )
        return result


def learn_transform(spec: TransformSpec, sample: NDArray[np.float16]) -> Transform:
    """Learns the transform on a sample of embeddings, float16 [n, encoder_dim].

    PCA by the eigenvectors of the covariance in float64. Components without variance are dropped,
    so a catalogue with fewer images than `spec.dim` gets fewer dimensions; one without any variance
    gets no transform.
    """
    if spec.kind == "none":
        return Transform()
    wide = sample.astype(np.float64)
    mean = _on_grid(wide.mean(axis=0))
    wide -= mean
    eigenvalues, eigenvectors = np.linalg.eigh(wide.T @ wide / len(wide))
    order = np.argsort(eigenvalues)[::-1][: spec.dim]
    order = order[eigenvalues[order] > eigenvalues.max() * _RANK_TOLERANCE]
    if eigenvalues.max() <= 0 or not len(order):
        return Transform()
    matrix = eigenvectors[:, order].T * eigenvalues[order, None] ** spec.eigen_power
    matrix /= np.linalg.norm(matrix, axis=1).max()
    return Transform(mean=mean, matrix=_on_grid(matrix))


def _on_grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rounded: NDArray[np.float64] = np.round(values * _GRID) / _GRID
    return rounded
