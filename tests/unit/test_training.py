"""The coarse quantizer: repeatable, seeded, without duplicates, similar lists side by side."""

from pathlib import Path

import numpy as np
import pytest

from index_builder.errors import ConfigError, DatasetError
from index_builder.index.assignment import nearest_lists
from index_builder.index.goals import TransformSpec
from index_builder.index.memory import readable_memory
from index_builder.index.spec import IndexSpec, check_training_memory
from index_builder.index.training import TrainedIndex, load_trained, save_trained, train_index
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import squared_norms, unit_float16
from tests.index_fixtures import clustered_catalogue


def train(vectors: np.ndarray, request: IndexSpec) -> TrainedIndex:
    unit, _ = unit_float16(vectors)
    return train_index(request.resolve(*unit.shape), unit)


CLUSTERED = clustered_catalogue(1500, 32, centres=16).vectors
PCA = TransformSpec("pca", 24)


@pytest.mark.parametrize("transform", [TransformSpec(), PCA])
def test_the_same_seed_gives_the_same_index(transform: TransformSpec, tmp_path: Path) -> None:
    files, centroids = [], []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        trained = train(CLUSTERED, IndexSpec(transform=transform, nlist=30, seed=seed))
        save_trained(str(tmp_path / name), trained)
        files.append((tmp_path / name).read_bytes())
        centroids.append(np.sort(trained.centroids, axis=0))
    assert files[0] == files[1]
    # Not only their order: other centroids.
    assert not np.array_equal(centroids[0], centroids[2])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for transform in (TransformSpec(), PCA):
        trained = train(CLUSTERED, IndexSpec(transform=transform, nlist=20))
        save_trained(str(tmp_path / "trained.npz"), trained)
        loaded = load_trained(str(tmp_path / "trained.npz"))
        np.testing.assert_array_equal(loaded.centroids, trained.centroids)
        unit, _ = unit_float16(CLUSTERED)
        before, after = trained.transform.apply(unit), loaded.transform.apply(unit)
        assert after.tobytes() == before.tobytes()
    np.savez(tmp_path / "old.npz", centroids=np.eye(2, dtype=np.float16))
    with pytest.raises(
        DatasetError, match=r"old\.npz has no exponents, metric: another version of Kith"
    ):
        load_trained(str(tmp_path / "old.npz"))
    with pytest.raises(FileNotFoundError):
        load_trained(str(tmp_path / "missing.npz"))


def test_centroids_are_unit_vectors_of_the_transformed_space() -> None:
    trained = train(CLUSTERED, IndexSpec(transform=PCA, nlist=30))
    assert (trained.nlist, trained.dim) == trained.centroids.shape == (30, 24)
    assert trained.centroids.dtype == np.float16
    assert np.abs(np.sqrt(squared_norms(trained.centroids)) - 1).max() < 1e-5


def test_training_finds_the_clusters() -> None:
    trained = train(CLUSTERED, IndexSpec(nlist=16))
    unit, _ = unit_float16(CLUSTERED)
    best = (unit.astype(np.float64) @ trained.centroids.astype(np.float64).T).max(axis=1)
    rng = np.random.default_rng(0)
    arbitrary = unit[rng.choice(len(unit), 16, replace=False)].astype(np.float64)
    assert best.mean() > (unit.astype(np.float64) @ arbitrary.T).max(axis=1).mean() + 0.02


def test_neighbouring_lists_are_similar() -> None:
    trained = train(CLUSTERED, IndexSpec(nlist=64))
    wide = trained.centroids.astype(np.float64)
    following = (wide[:-1] * wide[1:]).sum(axis=1).mean()
    shuffled = wide[np.random.default_rng(0).permutation(64)]
    assert following > (shuffled[:-1] * shuffled[1:]).sum(axis=1).mean() + 0.1


def test_duplicate_centroids_are_dropped() -> None:
    vectors = CLUSTERED.copy()
    vectors[100:] = vectors[0]
    trained = train(vectors, IndexSpec(nlist=150))
    assert len(np.unique(trained.centroids, axis=0)) == trained.nlist < 150


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("transform", [TransformSpec(), PCA])
def test_as_many_lists_as_rows(rows: int, transform: TransformSpec) -> None:
    trained = train(CLUSTERED[:rows], IndexSpec(transform=transform, nlist=rows))
    assert 1 <= trained.nlist <= rows
    assert np.isfinite(trained.centroids).all()


def test_vectors_that_cancel_out_still_get_a_list() -> None:
    # The mean of two opposite vectors has no direction.
    trained = train(np.asarray([[1.0, 0.0], [-1.0, 0.0]]), IndexSpec(nlist=1))
    assert trained.nlist == 1
    assert squared_norms(trained.centroids).tolist() == [1.0]


def test_every_row_of_the_sample_falls_into_its_nearest_list() -> None:
    trained = train(CLUSTERED, IndexSpec(nlist=30))
    unit, _ = unit_float16(CLUSTERED)
    affinity = unit.astype(np.float64) @ trained.centroids.astype(np.float64).T
    nearest = nearest_lists(unit, trained.centroids, 1)[:, 0]
    chosen = affinity[np.arange(len(unit)), nearest]
    np.testing.assert_allclose(chosen, affinity.max(axis=1), atol=1e-7)
    assert np.bincount(nearest, minlength=30).min() > 0


def long_and_short(seed: int = 0) -> np.ndarray:
    """Features in three groups: two in one direction with lengths 1 and 10, one across them."""
    rng = np.random.default_rng(seed)
    base = np.zeros((3, 8))
    base[0, 0], base[1, 0], base[2, 1] = 1, 10, 1
    return (base[np.arange(300) % 3] + 0.01 * rng.normal(size=(300, 8))).astype(np.float32)


@pytest.mark.parametrize("metric", [Metric.EUCLIDEAN, Metric.INNER_PRODUCT])
def test_the_kind_of_k_means_is_that_of_the_metric(metric: Metric, tmp_path: Path) -> None:
    vectors = long_and_short()
    spec = IndexSpec(metric, nlist=12).resolve(300, 8)
    trained = train_index(spec, vectors)
    assert trained.metric is metric
    lengths = np.sort(np.sqrt(squared_norms(trained.centroids)))
    if metric is Metric.EUCLIDEAN:
        # Means: each lies in the middle of a group.
        unscaled = lengths * 2.0**-trained.transform.scale_exponent
        assert set(np.round(unscaled, 1)) == {1.0, 10.0}
    else:
        np.testing.assert_allclose(lengths, 1, atol=1e-3)
    again = train_index(spec, vectors)
    for name, one in (("one", trained), ("two", again)):
        save_trained(str(tmp_path / name), one)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_trained(str(tmp_path / "one")).transform
    assert loaded.metric is metric
    assert loaded.scale_exponent == trained.transform.scale_exponent != 0
    assert loaded.apply(vectors).tobytes() == trained.transform.apply(vectors).tobytes()


def test_exponents_before_and_after_the_matrix_are_kept(tmp_path: Path) -> None:
    request = IndexSpec(Metric.EUCLIDEAN, TransformSpec("pca", 4, 0.0), nlist=2)
    trained = train_index(request.resolve(300, 8), long_and_short() + 5)
    save_trained(str(tmp_path / "trained.npz"), trained)
    loaded = load_trained(str(tmp_path / "trained.npz")).transform
    assert (loaded.input_exponent, loaded.output_exponent) == (
        trained.transform.input_exponent,
        trained.transform.output_exponent,
    )
    assert loaded.output_exponent == -1
    assert loaded.scale_exponent == loaded.input_exponent - 1


@pytest.mark.parametrize("metric", [Metric.EUCLIDEAN, Metric.INNER_PRODUCT])
def test_a_corpus_of_zeros_gets_one_list(metric: Metric) -> None:
    trained = train_index(IndexSpec(metric, nlist=3).resolve(9, 4), np.zeros((9, 4), np.float32))
    assert trained.nlist == 1
    assert np.isfinite(trained.centroids).all()


def test_a_sample_without_the_evaluation_rows_may_have_fewer_vectors_than_lists() -> None:
    spec = IndexSpec(nlist=100).resolve(100, 32)
    assert train_index(spec, unit_float16(CLUSTERED[:60])[0]).nlist <= 60


def test_a_pca_that_does_not_fit_is_refused_with_the_figure() -> None:
    # A flattened VGG16: its covariance and what is made of it, matrices of 25,088 x 25,088 in float64.
    spec = IndexSpec(transform=TransformSpec("pca", 256)).resolve(2000, 25_088)
    assert spec.training_bytes > 3 * 25_088**2 * 8
    figure = f"{readable_memory(spec.training_bytes)}"
    with pytest.raises(ConfigError, match=f"would take {figure} .*25088 numbers, transform pca"):
        check_training_memory(spec, 8 << 30)
    check_training_memory(spec, spec.training_bytes)
