"""Lists found by a graph over 120,000 centroids, against a comparison with all of them."""

import numpy as np
import pytest

from index_builder.index import coarse_graph
from index_builder.index.assignment import nearest_lists
from tests.unit.test_coarse_graph import made_centroids, shares_found

LISTS, QUERIES, NPROBE = 120_000, 500, 16

pytestmark = pytest.mark.timeout(0)


@pytest.mark.parametrize("clustered", [False, True])
def test_of_a_hundred_thousand_lists_hardly_one_is_missed(clustered: bool) -> None:
    assert LISTS > coarse_graph.GRAPH_LISTS
    centroids, queries = made_centroids(LISTS, clustered, 1), made_centroids(QUERIES, clustered, 2)
    wide = centroids.astype(np.float64).T
    exact = np.concatenate(
        [
            np.argsort(-(row.astype(np.float64) @ wide).astype(np.float32), kind="stable")[
                None, :NPROBE
            ]
            for row in queries
        ]
    )
    recall, whole, nearest = shares_found(nearest_lists(queries, centroids, NPROBE), exact)
    assert recall >= 0.98
    assert whole >= 0.95
    assert nearest >= 0.99
