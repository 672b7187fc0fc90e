"""A graph over the centroids, at a lowered threshold."""

import faiss
import numpy as np
import pytest

from index_builder.index import coarse_graph
from index_builder.index.assignment import nearest_lists
from index_builder.index.coarse_graph import build_graph, nearest_by_graph
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import unit_float16


def vectors(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(30, 24))
    unit, _ = unit_float16(centres[rng.integers(30, size=rows)] + 0.6 * rng.normal(size=(rows, 24)))
    return unit


def made_centroids(rows: int, clustered: bool, seed: int) -> np.ndarray:
    """Directions in 32 dimensions, independent ones or around 300 centres."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(rows, 32))
    if clustered:
        centres = np.random.default_rng(9).normal(size=(300, 32))
        found = centres[rng.integers(300, size=rows)] + 0.6 * found
    return unit_float16(found)[0]


def shares_found(found: np.ndarray, exact: np.ndarray) -> tuple[float, float, float]:
    """The share of the exact lists that were found, of rows with all of them, and with the nearest."""
    right = (found[:, :, None] == exact[:, None, :]).any(axis=1)
    return float(right.mean()), float(right.all(axis=1).mean()), float(right[:, 0].mean())


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLIDEAN, Metric.INNER_PRODUCT])
def test_the_graph_finds_the_lists_that_are_found_by_comparing_all(
    monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    queries, centroids = vectors(400, 0), vectors(900, 1)
    wanted = nearest_lists(queries, centroids, 8, metric)
    monkeypatch.setattr(coarse_graph, "GRAPH_LISTS", 899)
    built = []
    monkeypatch.setattr(
        coarse_graph, "build_graph", lambda given: built.append(1) or build_graph(given)
    )
    found = nearest_lists(queries, centroids, 8, metric)
    again = nearest_lists(queries[::-1], centroids, 8, metric)[::-1]
    # One graph for all blocks; what is found of a vector does not depend on the others.
    assert built == [1]
    np.testing.assert_array_equal(found, again)
    assert found.dtype == np.int32
    right = [len(set(row) & set(other)) for row, other in zip(found, wanted, strict=True)]
    assert sum(right) >= 0.99 * wanted.size
    # Whatever lists are found, they are in the exact order: by score, then by number.
    for row, other in zip(found, wanted, strict=True):
        if set(row) == set(other):
            assert row.tolist() == other.tolist()


@pytest.mark.parametrize("clustered", [False, True])
def test_of_many_lists_hardly_one_is_missed(clustered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small version of tests/torture/test_many_lists.py."""
    centroids, queries = made_centroids(12_000, clustered, 1), made_centroids(300, clustered, 2)
    exact = nearest_lists(queries, centroids, 16)
    monkeypatch.setattr(coarse_graph, "GRAPH_LISTS", 11_999)
    recall, whole, nearest = shares_found(nearest_lists(queries, centroids, 16), exact)
    assert recall >= 0.995
    assert whole >= 0.95
    assert nearest >= 0.995


def test_up_to_the_threshold_all_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    centroids = vectors(50, 1)
    monkeypatch.setattr(coarse_graph, "GRAPH_LISTS", 50)
    monkeypatch.setattr(coarse_graph, "build_graph", None)
    assert nearest_lists(vectors(5, 0), centroids, 3).shape == (5, 3)


def test_the_graph_does_not_depend_on_the_threads() -> None:
    centroids = vectors(600, 1)
    before = faiss.omp_get_max_threads()
    graphs = []
    try:
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            graphs.append(faiss.serialize_index(build_graph(centroids)).tobytes())
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    assert graphs[0] == graphs[1]


def test_what_the_graph_does_not_reach_is_compared_in_full() -> None:
    centroids, queries = vectors(40, 1), vectors(6, 0)
    asked = []

    class Blind:
        def search(self, rows: np.ndarray, count: int, params: object) -> tuple[None, np.ndarray]:
            found = np.full((len(rows), count), -1, dtype=np.int64)
            found[:4, :5] = np.arange(5)
            return None, found

    def exact(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return np.full((len(rows), 5), 39, dtype=np.int32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse_graph, "build_graph", lambda given: Blind())
        found = nearest_by_graph(queries, centroids.copy(), 5, exact)
    assert asked == [2]
    assert (found[4:] == 39).all()
    assert (np.sort(found[:4], axis=1) == np.arange(5)).all()
