"""K-means: its bytes depend on the vectors and the seed alone, and odd vectors do not upset it."""

import numpy as np
import pytest

from index_builder.index.assignment import nearest_lists
from index_builder.index.kmeans import find_centroids
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import NumpyProduct, Product, timed_bfloat16_products
from index_builder.scoring.vectors import squared_norms, unit_float16
from tests.index_fixtures import clustered_catalogue
from tests.topk_oracle import RoundedProduct

# More rows than one range of a scan, and a dim that no width of a kernel divides.
VECTORS = unit_float16(clustered_catalogue(5000, 37, centres=20).vectors)[0]


def centroids(
    vectors: np.ndarray, clusters: int, metric: Metric = Metric.COSINE, seed: int = 0, **options: object
) -> np.ndarray:
    found = find_centroids(
        vectors, clusters, metric, seed, **{"iterations": 5, "most_points": 100, **options}
    )
    assert found.shape == (clusters, vectors.shape[1])
    assert found.dtype == np.float16
    assert np.isfinite(found).all()
    return found


@pytest.mark.parametrize("metric", Metric)
def test_neither_threads_nor_products_change_a_byte(metric: Metric) -> None:
    vectors = VECTORS
    if metric is not Metric.COSINE:
        lengths = np.random.default_rng(1).uniform(0.1, 1, (len(vectors), 1))
        vectors = (vectors * lengths).astype(np.float16)
    native = [one.product for one in timed_bfloat16_products()]
    products: list[Product] = [NumpyProduct(), RoundedProduct(), *native]
    wanted = centroids(vectors, 40, metric, threads=1, product=NumpyProduct())
    assert len(np.unique(wanted, axis=0)) == 40
    for threads in (1, 2, 3):
        for product in (None, *products):
            found = centroids(vectors, 40, metric, threads=threads, product=product)
            assert found.tobytes() == wanted.tobytes()
    assert centroids(vectors, 40, metric, seed=1).tobytes() != wanted.tobytes()


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLIDEAN])
def test_a_round_is_lloyds(metric: Metric) -> None:
    vectors = VECTORS[:900]
    before = centroids(vectors, 12, metric, iterations=3)
    after = centroids(vectors, 12, metric, iterations=4)
    nearest = nearest_lists(vectors, before, 1, metric)[:, 0]
    wide = vectors.astype(np.float64)
    means = np.stack([wide[nearest == cluster].mean(axis=0) for cluster in range(12)])
    if metric is Metric.COSINE:
        means /= np.linalg.norm(means, axis=1)[:, None]
    np.testing.assert_allclose(after, means, atol=6e-4)
    assert not np.array_equal(before, after)


def test_the_rounds_bring_vectors_nearer_to_their_centroids() -> None:
    errors = []
    for iterations in (0, 1, 5):
        found = centroids(VECTORS, 60, iterations=iterations).astype(np.float64)
        errors.append(-(VECTORS.astype(np.float64) @ found.T).max(axis=1).mean())
    assert errors[0] > errors[1] + 0.01 > errors[2] + 0.01


def test_vectors_near_each_other_have_the_same_centroids_with_any_product() -> None:
    # All in a narrow cone: an error of 2^-7 lets every pair through.
    rng = np.random.default_rng(0)
    cone = np.ones(64) + 0.01 * rng.normal(size=(8000, 64))
    vectors = unit_float16(cone)[0]
    wanted = centroids(vectors, 80, product=NumpyProduct()).tobytes()
    for product in (None, RoundedProduct()):
        assert centroids(vectors, 80, product=product).tobytes() == wanted


def test_at_most_so_many_points_are_looked_at() -> None:
    few = centroids(VECTORS, 10, most_points=20)
    assert few.tobytes() != centroids(VECTORS, 10, most_points=500).tobytes()
    assert (
        centroids(VECTORS, 10, most_points=500).tobytes()
        == centroids(VECTORS, 10, most_points=10_000).tobytes()
    )


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLIDEAN])
def test_empty_clusters_start_again_where_the_error_is(metric: Metric) -> None:
    # 1,000 equal vectors, of which nearly all first centroids are drawn, and 30 others.
    vectors = np.repeat(VECTORS[:1], 1030, axis=0)
    vectors[1000:] = VECTORS[1:31]
    found = centroids(vectors, 40, metric, iterations=8)
    distinct = np.unique(found, axis=0)
    assert len(distinct) == 31
    np.testing.assert_array_equal(distinct, np.unique(VECTORS[:31], axis=0))


@pytest.mark.parametrize("metric", Metric)
def test_fewer_distinct_vectors_than_clusters(metric: Metric) -> None:
    vectors = np.repeat(VECTORS[:3], 20, axis=0)
    found = np.unique(centroids(vectors, 12, metric), axis=0)
    np.testing.assert_array_equal(found, np.unique(VECTORS[:3], axis=0))


@pytest.mark.parametrize("metric", [Metric.EUCLIDEAN, Metric.INNER_PRODUCT])
def test_zero_vectors_are_vectors_like_others(metric: Metric) -> None:
    vectors = np.repeat(VECTORS[:4], 10, axis=0)
    vectors[::4] = 0
    found = centroids(vectors, 6, metric)
    assert found[found.any(axis=1)].size
    zeros = centroids(np.zeros((9, 5), np.float16), 3, metric)
    assert not zeros.any()


def test_vectors_that_cancel_out_leave_their_centroid() -> None:
    vectors = np.asarray([[1, 0], [-1, 0]], dtype=np.float16)
    found = centroids(vectors, 1)
    assert squared_norms(found).tolist() == [1.0]


def test_as_many_clusters_as_vectors() -> None:
    found = centroids(VECTORS[:7], 7)
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(VECTORS[:7], axis=0))
