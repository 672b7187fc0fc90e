"""PCA and partial whitening: results that repeat, and what happens to small samples."""

import numpy as np
import pytest

from index_builder.errors import DatasetError
from index_builder.spec import TransformSpec
from index_builder.transform import Transform, learn_transform
from index_builder.vectors import squared_norms, unit_float16


def sample(n: int, dim: int = 40, seed: int = 0) -> np.ndarray:
    """Unit vectors with very different variances by component, away from the origin."""
    rng = np.random.default_rng(seed)
    scales = np.linspace(1, 0.05, dim)
    return unit_float16(rng.normal(size=(n, dim)) * scales + 0.2)[0]


def test_one_row_or_two_thousand_at_a_call() -> None:
    vectors = sample(2000, 96)
    transform = learn_transform(TransformSpec("pca", 48), vectors)
    together = transform.apply(vectors)
    assert together.shape == (2000, 48)
    single = np.concatenate([transform.apply(vectors[row : row + 1]) for row in range(2000)])
    assert single.tobytes() == together.tobytes()
    odd = np.concatenate([transform.apply(vectors[start : start + 37]) for start in
                          range(0, 2000, 37)])  # fmt: skip
    assert odd.tobytes() == together.tobytes()
    assert np.abs(np.sqrt(squared_norms(together)) - 1).max() < 1e-6


def test_matrix_and_mean_lie_on_the_grid_and_rows_are_short() -> None:
    transform = learn_transform(TransformSpec("pca", 12), sample(500))
    assert transform.matrix is not None
    assert transform.mean is not None
    for values in (transform.matrix, transform.mean):
        np.testing.assert_array_equal(values * 2**24, np.round(values * 2**24))
    assert np.linalg.norm(transform.matrix, axis=1).max() <= 1 + 1e-6


@pytest.mark.parametrize(("power", "kept"), [(0.0, 1.0), (-0.25, 0.5), (-0.5, 0.0)])
def test_component_variances_before_normalising(power: float, kept: float) -> None:
    vectors = sample(3000)
    transform = learn_transform(TransformSpec("pca", 20, power), vectors)
    assert transform.matrix is not None
    wide = vectors.astype(np.float64)
    components = (wide - wide.mean(axis=0)) @ transform.matrix.T
    eigenvalues = np.linalg.eigvalsh(np.cov(wide.T, bias=True))[::-1][:20]
    wanted = eigenvalues**kept
    variances = components.var(axis=0)
    np.testing.assert_allclose(variances / variances[0], wanted / wanted[0], rtol=1e-4)
    # Components are uncorrelated, largest eigenvalue first.
    covariance = np.cov(components.T, bias=True)
    off_diagonal = covariance - np.diag(np.diag(covariance))
    assert np.abs(off_diagonal).max() < 1e-5 * variances.max()
    assert eigenvalues[0] > 3 * eigenvalues[-1]


def test_apply_is_the_stated_formula() -> None:
    vectors = sample(300)
    transform = learn_transform(TransformSpec("pca", 10), vectors)
    assert transform.matrix is not None
    direct = (vectors.astype(np.float64) - transform.mean) @ transform.matrix.T
    direct /= np.linalg.norm(direct, axis=1, keepdims=True)
    np.testing.assert_allclose(transform.apply(vectors).astype(np.float64), direct, atol=1e-3)


def test_plain_pca_of_full_rank_keeps_distances() -> None:
    vectors = sample(400, 16)
    transform = learn_transform(TransformSpec("pca", 16, 0.0), vectors)
    assert transform.matrix is not None
    identity = transform.matrix @ transform.matrix.T
    np.testing.assert_allclose(identity / identity[0, 0], np.eye(16), atol=1e-5)


def test_fewer_dimensions_where_the_sample_has_no_more() -> None:
    assert learn_transform(TransformSpec("pca", 32), sample(9)).dim(40) == 8
    line = unit_float16(np.outer([1.0, 2.0, -1.0, 3.0], np.ones(40)) + np.eye(40)[0])[0]
    assert learn_transform(TransformSpec("pca", 32), line).dim(40) <= 3


def test_nothing_to_learn_gives_no_transform() -> None:
    one = sample(1)
    for vectors in (one, np.repeat(one, 50, axis=0)):
        transform = learn_transform(TransformSpec("pca", 32), vectors)
        assert transform.matrix is None
        assert transform.dim(40) == 40
        np.testing.assert_array_equal(transform.apply(vectors), vectors)
    none = learn_transform(TransformSpec("none"), sample(100))
    assert none.matrix is None


def test_two_vectors_become_opposite() -> None:
    vectors = sample(2)
    coded = learn_transform(TransformSpec("pca", 32), vectors).apply(vectors)
    np.testing.assert_array_equal(np.sort(coded.ravel()), [-1, 1])


def test_vectors_without_a_direction_are_refused() -> None:
    vectors = sample(100)
    zero = vectors.copy()
    zero[[17, 30]] = 0
    message = r"2 vectors have no direction after the index's transform \(first at row 17 of its"
    with pytest.raises(DatasetError, match=message):
        Transform().apply(zero)
    broken = vectors.copy()
    broken[3, 4] = np.nan
    with pytest.raises(DatasetError, match=r"1 vectors .* row 3 of its block"):
        Transform().apply(broken)
    learned = learn_transform(TransformSpec("pca", 8), vectors)
    with pytest.raises(DatasetError, match="row 3 of its block"):
        learned.apply(broken)
    at_mean = Transform(mean=vectors[5].astype(np.float64), matrix=learned.matrix)
    with pytest.raises(DatasetError, match="row 5 of its block"):
        at_mean.apply(vectors)
