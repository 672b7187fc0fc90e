"""PCA and partial whitening: results that repeat, and what happens to small samples."""

import numpy as np
import pytest

from index_builder.errors import DatasetError
from index_builder.index.goals import TransformSpec
from index_builder.index.transform import Transform, learn_transform
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import squared_norms, unit_float16


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


SCALED = [Metric.EUCLIDEAN, Metric.INNER_PRODUCT]


def features(n: int, dim: int = 40, seed: int = 0) -> np.ndarray:
    """Raw features, float32: non-negative, of very different lengths up to some thousands."""
    rng = np.random.default_rng(seed)
    return (rng.gamma(0.5, 50, size=(n, dim)) * rng.uniform(0.01, 10, size=(n, 1))).astype(np.float32)


@pytest.mark.parametrize("metric", SCALED)
@pytest.mark.parametrize("spec", [TransformSpec(), TransformSpec("pca", 24, 0.0)])
def test_features_transform_alike_in_any_company(metric: Metric, spec: TransformSpec) -> None:
    vectors = features(500)
    transform = learn_transform(spec, vectors, metric)
    together = transform.apply(vectors)
    single = np.concatenate([transform.apply(vectors[row : row + 1]) for row in range(500)])
    assert single.tobytes() == together.tobytes()
    assert transform.apply(np.asfortranarray(vectors)).tobytes() == together.tobytes()
    assert 0 < squared_norms(together).max() <= 1 + 2**-9


def test_every_sum_of_a_scaled_transform_is_exact() -> None:
    vectors = features(20, 300)
    transform = learn_transform(TransformSpec("pca", 16, -0.25), vectors, Metric.EUCLIDEAN)
    assert transform.matrix is not None
    assert transform.mean is not None
    ready = transform.prepare(vectors)
    whole = [(values * 2**24).astype(int) for values in (ready, transform.mean, transform.matrix)]
    for values, numbers in zip((ready, transform.mean, transform.matrix), whole, strict=True):
        np.testing.assert_array_equal(numbers, values * 2**24)
    # In whole numbers of Python, which have no rounding, in units of 2^-48.
    x, mean, matrix = (numbers.astype(object) for numbers in whole)
    exact = np.array((x - mean) @ matrix.T, dtype=np.float64) * 2.0 ** (transform.output_exponent - 48)
    np.testing.assert_array_equal(transform.apply(vectors), exact.astype(np.float16))
    assert np.abs(exact).max() < 1


def test_without_a_matrix_features_are_scaled_and_rounded_once() -> None:
    vectors = features(100)
    transform = learn_transform(TransformSpec(), vectors, Metric.EUCLIDEAN)
    largest = np.linalg.norm(vectors.astype(np.float64), axis=1).max()
    assert 0.5 < largest * 2.0**transform.scale_exponent <= 1
    assert transform.unscale == 4.0**-transform.scale_exponent
    scaled = vectors.astype(np.float64) * 2.0**transform.scale_exponent
    codes, worst = transform.apply_and_measure(vectors)
    np.testing.assert_array_equal(codes, scaled.astype(np.float16))
    errors = np.linalg.norm(codes - scaled, axis=1) / np.linalg.norm(scaled, axis=1)
    assert worst == pytest.approx(errors.max(), rel=1e-12)
    assert 1e-5 < worst < 2**-11


def test_the_largest_norm_of_the_corpus_counts_not_that_of_the_sample() -> None:
    vectors = features(100)
    largest = 16 * float(np.linalg.norm(vectors.astype(np.float64), axis=1).max())
    alone = learn_transform(TransformSpec(), vectors, Metric.EUCLIDEAN)
    whole = learn_transform(TransformSpec(), vectors, Metric.EUCLIDEAN, largest)
    assert whole.scale_exponent == alone.scale_exponent - 4
    whole.apply(16 * vectors)
    with pytest.raises(DatasetError, match="longer than those that the index was made for"):
        alone.apply(16 * vectors)


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_plain_pca_keeps_distances_or_products(spread: float) -> None:
    rng = np.random.default_rng(1)
    vectors = (80 + spread * 20 * rng.normal(size=(60, 16))).astype(np.float32)
    wide = vectors.astype(np.float64)
    largest = np.linalg.norm(wide, axis=1).max()
    for metric, direct in (
        (Metric.EUCLIDEAN, lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)),
        (Metric.INNER_PRODUCT, lambda x: np.sqrt(np.maximum(x @ x.T, 0))),
    ):
        transform = learn_transform(TransformSpec("pca", 16, 0.0), vectors, metric)
        codes = transform.apply(vectors).astype(np.float64) * 2.0**-transform.scale_exponent
        errors = np.abs(direct(codes) - direct(wide))
        # What is far from the origin is rounded after it was centred.
        scale = direct(wide).max() if metric is Metric.EUCLIDEAN else largest
        assert errors.max() < 1e-3 * scale
        if metric is Metric.INNER_PRODUCT:
            assert transform.mean is not None
            assert not transform.mean.any()


def test_cosine_over_features_is_that_of_their_unit_vectors() -> None:
    vectors = features(300)
    unit, _ = unit_float16(vectors)
    for spec in (TransformSpec(), TransformSpec("pca", 12)):
        raw, made = learn_transform(spec, vectors), learn_transform(spec, unit)
        assert raw.scale_exponent == 0
        assert raw.apply(vectors).tobytes() == made.apply(unit).tobytes()
    zero = vectors.copy()
    zero[4] = 0
    with pytest.raises(DatasetError, match=r"1 vectors have no direction .* row 4 of its block"):
        Transform().apply(zero)


def test_float16_vectors_that_are_not_unit_vectors_become_so_one_by_one() -> None:
    unit = sample(50)
    mixed = unit.copy()
    mixed[::2] *= np.float16(7)
    found = Transform().apply(mixed)
    np.testing.assert_array_equal(found[1::2], unit[1::2])
    np.testing.assert_array_equal(found[::2], unit_float16(mixed[::2])[0])
    assert Transform().apply(unit) is unit


@pytest.mark.parametrize("metric", SCALED)
def test_what_scaled_metrics_take_and_refuse(metric: Metric) -> None:
    vectors = features(50)
    vectors[7] = 0
    transform = learn_transform(TransformSpec(), vectors, metric)
    assert not transform.apply(vectors)[7].any()
    vectors[9, 3] = np.nan
    vectors[11, 0] = np.inf
    with pytest.raises(DatasetError, match=r"2 vectors are not finite \(first at row 9 of its block"):
        transform.apply(vectors)
    nothing = learn_transform(TransformSpec("pca", 4, 0.0), np.zeros((5, 8), np.float32), metric)
    assert nothing.matrix is None
    assert not nothing.apply(np.zeros((2, 8), np.float32)).any()
