"""The bfloat16 product by OpenVINO: its error bound, any shape, threads, and the same neighbours."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("openvino")

from index_builder.assignment import nearest_lists
from index_builder.metrics import Metric
from index_builder.tiles import error_bound
from index_builder.vectors import squared_norms, unit_float16
from transforms.bf16_product import Bfloat16Product


@pytest.mark.parametrize(("m", "n", "dim"), [(1, 1, 3), (65, 130, 32), (200, 7, 1280)])
def test_keeps_the_bound_of_bfloat16_inputs(m: int, n: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    vectors, _ = unit_float16(rng.uniform(0.5, 1.0, size=(m + n, dim)))
    wide, norms = vectors.astype(np.float32), np.sqrt(squared_norms(vectors))
    out = np.full((m, n), np.nan, dtype=np.float32)
    product = Bfloat16Product()
    product.multiply(wide[:m], wide[m:], out)
    off = np.abs(out - wide[:m].astype(np.float64) @ wide[m:].astype(np.float64).T)
    assert (off <= error_bound(dim, product.unit_roundoff) * np.outer(norms[:m], norms[m:])).all()


def test_threads_do_not_share_their_tiles() -> None:
    rng = np.random.default_rng(0)
    sides = [rng.normal(size=(2, 90, 64)).astype(np.float32) for _ in range(4)]
    product = Bfloat16Product()

    def multiply(pair: np.ndarray) -> np.ndarray:
        out = np.empty((90, 90), dtype=np.float32)
        for _ in range(20):
            product.multiply(pair[0], pair[1], out)
        return out

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(multiply, sides))
    for pair, out in zip(sides, found, strict=True):
        np.testing.assert_allclose(out, pair[0] @ pair[1].T, atol=0.5)


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLIDEAN])
def test_proposes_the_same_neighbours(metric: Metric) -> None:
    vectors, _ = unit_float16(np.random.default_rng(1).normal(size=(700, 48)))
    usual = nearest_lists(vectors, vectors, 20, metric)
    found = nearest_lists(vectors, vectors, 20, metric, 2, Bfloat16Product())
    np.testing.assert_array_equal(found, usual)
