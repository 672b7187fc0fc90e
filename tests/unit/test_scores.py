"""Exact scores, the error bound of products, and the test that decides which pairs are scored."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring import products
from index_builder.scoring.intrinsics import half_dot
from index_builder.scoring.metrics import Metric
from index_builder.scoring.native_products import bfloat16_products, float32_products
from index_builder.scoring.products import NumpyProduct, fastest_product, timed_products
from index_builder.scoring.scores import (
    Scoring,
    error_bound,
    exact_score,
    least_key,
    slack,
    split_error_bound,
    threshold,
)
from index_builder.scoring.vectors import squared_norms, unit_float16

METRICS = list(Metric)


def exact(metric: Metric, unscale: float, q: NDArray[np.float16], x: NDArray[np.float16]) -> float:
    """A pair's score from sums without any rounding (math.fsum)."""

    def total(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
        return math.fsum(float(i) * float(j) for i, j in zip(a, b, strict=True))

    dot, q_norm, x_norm = total(q, x), total(q, q), total(x, x)
    if metric is Metric.COSINE:
        return float(np.float32(dot / np.sqrt(q_norm * x_norm)))
    if metric is Metric.EUCLIDEAN:
        return -float(np.float32((q_norm + x_norm - 2 * dot) * unscale))
    return float(np.float32(dot * unscale))


@njit
def dot_product(q, x):  # type: ignore[no-untyped-def]
    return half_dot(q.ctypes.data, x.ctypes.data, q.shape[0])


def scored(metric: Metric, unscale: float, q: NDArray[np.float16], x: NDArray[np.float16]) -> float:
    """The same by the join's own code."""
    norms = squared_norms(np.stack([q, x]))
    dot = dot_product(q.view(np.uint16), x.view(np.uint16))
    return float(exact_score(metric.code, unscale, dot, norms[0], norms[1]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 3, 256, 1280])
def test_scores_have_the_bits_of_sums_without_rounding(metric: Metric, dim: int) -> None:
    rng = np.random.default_rng(dim)
    vectors, _ = unit_float16(rng.uniform(-0.2, 1.0, size=(40, dim)))
    for q, x in zip(vectors[:20], vectors[20:], strict=True):
        assert scored(metric, 2.0**6, q, x) == exact(metric, 2.0**6, q, x)
        order = rng.permutation(dim)
        assert scored(metric, 1.0, q[order], x[order]) == scored(metric, 1.0, q, x)


@pytest.mark.parametrize("metric", METRICS)
def test_a_copy_scores_best_and_no_score_is_minus_zero(metric: Metric) -> None:
    vectors, _ = unit_float16(np.random.default_rng(0).normal(size=(5, 30)))
    best = {Metric.COSINE: 1.0, Metric.EUCLIDEAN: 0.0}
    if metric in best:
        assert {scored(metric, 1.0, row, row) for row in vectors} == {best[metric]}
    zero, one = np.zeros(4, np.float16), np.asarray([0, 0, 1, 0], np.float16)
    for q, x in ((zero, zero), (zero, -one), (one, np.asarray([-1, -1, 0, 0], np.float16))):
        score = scored(metric, 1.0, q, x)
        assert math.isfinite(score)
        assert score != 0 or math.copysign(1.0, score) == 1.0


@pytest.mark.parametrize("dim", [256, 1280])
def test_error_bound_holds_for_sequential_float32_on_positive_vectors(dim: int) -> None:
    rng = np.random.default_rng(0)
    vectors, _ = unit_float16(rng.uniform(0.5, 1.0, size=(300, dim)))
    q, x = vectors[:150].astype(np.float32), vectors[150:].astype(np.float32)
    # np.cumsum adds one number after another, which loses the most.
    fast = np.cumsum(q * x, axis=1, dtype=np.float32)[:, -1]
    dots = (q.astype(np.float64) * x.astype(np.float64)).sum(axis=1)
    lengths = np.sqrt(squared_norms(vectors[:150]) * squared_norms(vectors[150:]))
    worst = (np.abs(fast - dots) / lengths).max()
    assert worst <= error_bound(dim)
    # Neither side of the comparison is empty: errors are real, and the bound is of their order.
    assert worst > 2.0**-24
    assert error_bound(dim) == pytest.approx(dim * 2.0**-24, rel=1e-3)


def bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def test_error_bound_holds_for_inputs_rounded_to_bfloat16() -> None:
    rng = np.random.default_rng(1)
    # Just above a power of two, where half a unit is the largest share of the number.
    vectors = ((1 + rng.uniform(2.0**-9, 2.0**-8, size=(200, 256))) / 16).astype(np.float16)
    wide = vectors.astype(np.float32)
    fast = bfloat16(wide) @ bfloat16(wide).T
    dots = wide.astype(np.float64) @ wide.astype(np.float64).T
    norms = np.sqrt(squared_norms(vectors))
    worst = (np.abs(fast - dots) / np.outer(norms, norms)).max()
    assert 100 * error_bound(256) < worst <= error_bound(256, 2.0**-8)


@pytest.mark.parametrize("dim", [1, 256, 1280])
def test_error_bound_holds_for_numbers_in_two_parts(dim: int) -> None:
    rng = np.random.default_rng(3)
    # What rounding leaves is largest here: the product that is left out counts most.
    vectors = ((1 + rng.uniform(2.0**-9, 2.0**-8, size=(60, dim))) / 64).astype(np.float16)
    wide = vectors.astype(np.float32)
    high = bfloat16(wide)
    low = wide - high
    # A float16 number is the sum of two bfloat16 ones.
    assert (bfloat16(low) == low).all()
    q, p, x, y = high[:30], low[:30], high[30:], low[30:]
    terms = np.concatenate([q * x, q * y, p * x], axis=1)
    fast = np.cumsum(terms, axis=1, dtype=np.float32)[:, -1]
    dots = (wide[:30].astype(np.float64) * wide[30:].astype(np.float64)).sum(axis=1)
    lengths = np.sqrt(squared_norms(vectors[:30]) * squared_norms(vectors[30:]))
    worst = (np.abs(fast - dots) / lengths).max()
    assert 2.0**-19 < worst <= split_error_bound(dim, 2.0**-8)
    assert split_error_bound(dim, 2.0**-8) < error_bound(dim, 2.0**-8) / 20


def test_products_of_this_machine_keep_the_bound() -> None:
    # A loop, no parameters: they stand in the order of their times, which differ between processes.
    vectors, _ = unit_float16(np.random.default_rng(1).uniform(0.1, 1.0, size=(130, 1280)))
    wide = vectors.astype(np.float32)
    norms = np.sqrt(squared_norms(vectors))
    dots = wide[:50].astype(np.float64) @ wide[50:].astype(np.float64).T
    bound = error_bound(1280) * np.outer(norms[:50], norms[50:])
    found = [one.product for one in timed_products()]
    assert found
    for product in found:
        fast = np.full((50, 80), np.nan, dtype=np.float32)
        with products.single_threaded():
            product.multiply(wide[:50], wide[50:], fast)
        assert (np.abs(fast - dots) <= bound).all(), product.name


def test_the_fastest_product_is_measured_once_and_is_one_of_several() -> None:
    timed = timed_products()
    assert fastest_product() in (timed[0].product, *bfloat16_products())
    assert timed_products() is timed
    rates = [one.flops for one in timed]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 1e8
    # NumPy, and the libraries of NumPy and SciPy by themselves.
    assert any(isinstance(one.product, NumpyProduct) for one in timed)
    assert len(timed) >= 3 + len(float32_products())


def test_single_threaded_blocks_may_overlap() -> None:
    def threads() -> set[int]:
        info = products.threadpool_info()
        return {library["num_threads"] for library in info if library["user_api"] == "blas"}

    before = threads()
    first, second = products.single_threaded(), products.single_threaded()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert threads() == {1}
    second.__exit__(None, None, None)
    assert threads() == before


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_pair_that_is_good_enough_fails_the_test(data: st.DataObject) -> None:
    """However the product is off within its bound; and pairs that are clearly worse do fail."""
    metric = data.draw(st.sampled_from(METRICS))
    unscale = 1.0
    if metric is not Metric.COSINE:
        unscale = data.draw(st.sampled_from([1.0, 2.0**20, 2.0**-20]))
    error = data.draw(st.sampled_from([0.0, 1e-5, 0.008]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors, _ = unit_float16(rng.normal(size=(40, 3)))
    if metric is not Metric.COSINE:
        vectors = (vectors * rng.choice([0.0, 0.01, 0.5, 1.0], size=(40, 1))).astype(np.float16)
    q, corpus = vectors[0], vectors[1:]
    scores = np.asarray([scored(metric, unscale, q, x) for x in corpus], dtype=np.float32)
    norms = squared_norms(corpus)
    lengths = np.sqrt(norms).astype(np.float32)
    offsets = (norms / 2 * (metric is Metric.EUCLIDEAN)).astype(np.float32)
    q_norm = float(squared_norms(q[None])[0])
    scoring, length = Scoring(metric.code, unscale), np.float32(np.sqrt(q_norm))
    dots = corpus.astype(np.float64) @ q.astype(np.float64)
    off = error * np.sqrt(q_norm * norms)
    for worst in scores:
        a, b = threshold(scoring, float(worst), q_norm)
        a = np.float32(a - np.float32(error) * length)
        least, most, offset = lengths.min(), lengths.max(), offsets.max()
        room = slack(a, b, length, most, offset)
        floor = least_key(metric is Metric.COSINE, a, b, room, least, most, offset)
        b = np.float32(b - room)
        for sign in (-1.0, 0.0, 1.0):
            fast = (dots + sign * off * (1 - 2.0**-20)).astype(np.float32)
            passes = ~(fast - a * lengths - offsets < b)
            assert passes[scores >= worst].all()
            key = fast / lengths if metric is Metric.COSINE else fast - offsets
            assert (key[scores >= worst] >= floor).all()
            assert not (key[passes] < floor).any()
            # In units of the product, a score that is worse by more than twice the error fails.
            unit = 2.0 if metric is Metric.EUCLIDEAN else 1.0
            far = (worst - scores) / unscale / unit > 2.1 * error + 1e-5
            assert not passes[far].any()
