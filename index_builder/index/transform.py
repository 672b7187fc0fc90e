"""The index's linear transform: scale, centring, PCA and partial whitening, with results that repeat.

The matrix and the mean are stored on a grid of 2^-24, and so are the vectors that they meet:

- Under cosine an embedding is taken to unit length and to float16, whose numbers are all multiples
  of 2^-24.
- Under the other metrics it is multiplied by a power of two, which is exact, to a length of at most 1
  and rounded: to float16 where there is no matrix, else to the next multiples of 2^-24.

A product of two such numbers is a multiple of 2^-48. A partial sum of matrix (x - mean) is at most
|x - mean| times the length of a row of the matrix (Cauchy-Schwarz), which is at most 2 times 1, and a
little more for the rounding; anything below 32 would fit the 53 bits of a float64. So every sum is
exact in any order: a transformed vector does not depend on the machine or on how many rows go in. It
is then rounded once to float16, under cosine with its unit length restored, else after another power
of two.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import DatasetError
from index_builder.index.goals import TransformSpec
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import (
    check_scale,
    norms_in_order,
    relative_rounding,
    round_float16,
    scale_exponent,
    squared_norms,
    unit_float16,
)

_GRID = 2.0**24
_BLOCK_ROWS = 4096
# Components whose eigenvalue is below this share of the largest are noise of the arithmetic; dividing
# by a power of them would blow it up.
_RANK_TOLERANCE = 1e-10
# Float16 vectors whose squared length is this close to 1 were made as unit vectors and stay so.
_UNIT_TOLERANCE = 2.0**-6


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """What makes an indexed vector of an embedding x.

    Under cosine: matrix (x / |x| - mean), then unit length. Under the other metrics:
    2^output_exponent matrix (2^input_exponent x - mean). Without a matrix there is only the unit
    length or the scale. `mean` is float64 [encoder_dim], `matrix` float64 [dim, encoder_dim].
    """

    mean: NDArray[np.float64] | None = None
    matrix: NDArray[np.float64] | None = None
    metric: Metric = Metric.COSINE
    input_exponent: int = 0
    output_exponent: int = 0

    def dim(self, encoder_dim: int) -> int:
        """Returns the numbers of a transformed vector."""
        return encoder_dim if self.matrix is None else int(self.matrix.shape[0])

    @property
    def scale_exponent(self) -> int:
        """The e of the power of two, 2^e, by which lengths in the index differ from the embeddings'."""
        return self.input_exponent + self.output_exponent

    @property
    def unscale(self) -> float:
        """What turns squared lengths and dot products of the index into those of the embeddings."""
        return float(2.0 ** (-2 * self.scale_exponent))

    def apply(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
        """Transforms embeddings, float16 or float32 [n, encoder_dim], to float16 [n, dim].

        Raises DatasetError for vectors that are not finite; under cosine also for those without a
        direction (a zero vector, or one that equals the mean of the training sample), under the other
        metrics for those that are longer than the scale allows.
        """
        return self.apply_and_measure(vectors)[0]

    def apply_and_measure(
        self, vectors: NDArray[np.floating[Any]]
    ) -> tuple[NDArray[np.float16], float]:
        """Does what `apply` does and returns beside it what the last rounding cost.

        That is the largest relative error of a row, as `relative_rounding` defines it, against the
        transformed and scaled vector before it was rounded to float16. It is 0 under cosine, where
        nothing depends on a length.
        """
        if not self.metric.is_scaled:
            return self._directions(vectors), 0.0
        exact = self.prepare(vectors)
        if self.matrix is not None and self.mean is not None:
            exact = (exact - self.mean) @ self.matrix.T * 2.0**self.output_exponent
        rounded = round_float16(exact)
        return rounded, relative_rounding(exact, rounded)

    def prepare(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Returns what the matrix is applied to, float64 [n, encoder_dim].

        Unit vectors under cosine; else the scaled vectors, on the grid where there is a matrix.
        Raises DatasetError as `apply` does.
        """
        if not self.metric.is_scaled:
            return _unit_vectors(vectors).astype(np.float64)
        wide = np.ascontiguousarray(vectors, dtype=np.float64)
        norms = norms_in_order(wide)
        bad = ~np.isfinite(norms)
        if bad.any():
            raise DatasetError(
                f"{int(bad.sum())} vectors are not finite (first at row {int(np.argmax(bad))} of its "
                "block), wanted finite numbers. Embed again: such vectors belong in failures."
            )
        check_scale(norms, self.input_exponent)
        scaled: NDArray[np.float64] = wide * 2.0**self.input_exponent
        return scaled if self.matrix is None else _on_grid(scaled)

    def _directions(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
        unit = _unit_vectors(vectors)
        if self.matrix is None or self.mean is None:
            return unit
        codes, valid = unit_float16((unit.astype(np.float64) - self.mean) @ self.matrix.T)
        _require_direction(valid)
        return codes


def _unit_vectors(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """Float16 unit vectors of embeddings; those that were made as such are returned as they are."""
    if vectors.dtype == np.float16:
        norms = squared_norms(vectors.astype(np.float16, copy=False))
        _require_direction(np.isfinite(norms) & (norms > 0))
        if (np.abs(norms - 1) <= _UNIT_TOLERANCE).all():
            return vectors.astype(np.float16, copy=False)
        # Row by row, so that a row does not depend on the others of its block.
        made = np.abs(norms - 1) <= _UNIT_TOLERANCE
        return np.where(made[:, None], vectors, unit_float16(vectors)[0]).astype(np.float16)
    unit, valid = unit_float16(vectors)
    _require_direction(valid)
    return unit


def _require_direction(valid: NDArray[np.bool_]) -> None:
    if not valid.all():
        raise DatasetError(
            f"{int((~valid).sum())} vectors have no direction after the index's transform (first at "
            f"row {int(np.argmin(valid))} of its block): under cosine they cannot be compared. "
            "Embed again: zero vectors belong in failures."
        )


def learn_transform(
    spec: TransformSpec,
    sample: NDArray[np.floating[Any]],
    metric: Metric = Metric.COSINE,
    largest_norm: float | None = None,
) -> Transform:
    """Learns the transform on a sample of embeddings, float16 or float32 [n, encoder_dim].

    PCA by the eigenvectors of the covariance in float64. Components without variance are dropped,
    so a catalogue with fewer images than `spec.dim` gets fewer dimensions; one without any variance
    gets no transform. Without whitening the rows of the matrix are orthonormal, so that euclidean
    distances stay; under inner_product nothing is centred (the mean is zero), so that products stay.

    `largest_norm` is that of the whole corpus, which decides the scale; the sample's where None. The
    scale after the matrix is chosen by a bound: a transformed vector is at most as long as the scaled
    vector and the mean together.
    """
    if largest_norm is None:
        largest_norm = 0.0
        for block in row_blocks(sample):
            norms = norms_in_order(np.ascontiguousarray(block, np.float64))
            largest_norm = max(largest_norm, float(norms.max(initial=0)))
    exponent = scale_exponent(largest_norm) if metric.is_scaled else 0
    plain = Transform(metric=metric, input_exponent=exponent)
    if spec.kind == "none":
        return plain
    mean = np.zeros(sample.shape[1])
    if metric is not Metric.INNER_PRODUCT:
        for block in row_blocks(sample):
            mean += _on_grid(plain.prepare(block)).sum(axis=0)
        mean = _on_grid(mean / len(sample))
    covariance = np.zeros((sample.shape[1], sample.shape[1]))
    for block in row_blocks(sample):
        centred = _on_grid(plain.prepare(block)) - mean
        covariance += centred.T @ centred
    covariance /= len(sample)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    order = np.argsort(eigenvalues)[::-1][: spec.dim]
    order = order[eigenvalues[order] > eigenvalues.max() * _RANK_TOLERANCE]
    if eigenvalues.max() <= 0 or not len(order):
        return plain
    matrix = eigenvectors[:, order].T * eigenvalues[order, None] ** spec.eigen_power
    matrix /= np.linalg.norm(matrix, axis=1).max()
    after = 0
    if metric.is_scaled:
        after = scale_exponent(largest_norm * 2.0**exponent + float(np.linalg.norm(mean)))
    return Transform(mean, _on_grid(matrix), metric, exponent, after)


def row_blocks(vectors: NDArray[np.floating[Any]]) -> Iterator[NDArray[np.floating[Any]]]:
    """Yields the rows of an array in blocks, so that only a block of them is ever widened."""
    for start in range(0, len(vectors), _BLOCK_ROWS):
        yield vectors[start : start + _BLOCK_ROWS]


def _on_grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rounded: NDArray[np.float64] = np.round(values * _GRID) / _GRID
    return rounded
