"""The CPU's own products: their error bound, any shape, threads, and the same neighbours."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from index_builder.index.assignment import nearest_lists
from index_builder.scoring import products
from index_builder.scoring.integer_products import IntegerProduct, integer_products
from index_builder.scoring.integer_rows import MOST_DIM, mean_share
from index_builder.scoring.intrinsics import cpu_features
from index_builder.scoring.metrics import Metric
from index_builder.scoring.native_products import (
    AmxProduct,
    NativeProduct,
    bfloat16_products,
    float32_products,
)
from index_builder.scoring.products import (
    NumpyProduct,
    TimedProduct,
    fastest_product,
    product_for,
    timed_products,
)
from index_builder.scoring.scores import error_bound, split_error_bound
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.vectors import squared_norms, unit_float16
from tests.topk_oracle import spread

NATIVE = (*float32_products(), *bfloat16_products(), *integer_products())
pytestmark = pytest.mark.skipif(not NATIVE, reason="this CPU has no native products")
ROUNDING = pytest.mark.skipif(not bfloat16_products(), reason="this CPU has no bfloat16 products")
INTEGERS = pytest.mark.skipif(not integer_products(), reason="this CPU has no products of integers")
OF_THIS_CPU = pytest.mark.parametrize("product", NATIVE, ids=lambda product: product.name)


def bfloat16(vectors: np.ndarray) -> np.ndarray:
    """Numbers rounded to the nearest bfloat16, ties to even, as float64."""
    bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def integers(vectors: np.ndarray) -> np.ndarray:
    """Rows rounded to 127ths of their largest number, as float64."""
    rows = vectors.astype(np.float32)
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(rows * (1 / scales)).astype(np.float64) * scales


def taken(product: NativeProduct, vectors: np.ndarray) -> np.ndarray:
    """The numbers that a product multiplies, as float64."""
    if isinstance(product, IntegerProduct):
        return integers(vectors)
    return bfloat16(vectors) if product.unit_roundoff else vectors.astype(np.float64)


def sum_error(product: NativeProduct, dim: int) -> float:
    """How far a product is off that of the numbers it takes, of vectors of unit length."""
    split = isinstance(product, AmxProduct) and not product.rounds
    return split_error_bound(dim, 2.0**-8) if split else error_bound(dim)


@OF_THIS_CPU
@pytest.mark.parametrize(
    ("m", "n", "dim"),
    [
        (1, 1, 1),
        (31, 33, 31),
        (32, 32, 32),
        (12, 64, 33),
        (65, 130, 100),
        (25, 49, 700),
        (200, 7, 1280),
    ],
)
def test_multiplies_any_shape(product: NativeProduct, m: int, n: int, dim: int) -> None:
    vectors, _ = unit_float16(np.random.default_rng(dim).normal(size=(m + n, dim)))
    out = np.full((m, n), np.nan, dtype=np.float32)
    wide = vectors.astype(np.float32)
    product.multiply(wide[:m], wide[m:], out)
    rounded = taken(product, vectors)
    # Only sums of float32 are off; a wrong tile, row or pair would be by far more.
    tolerance = 2 * sum_error(product, dim)
    np.testing.assert_allclose(out, rounded[:m] @ rounded[m:].T, rtol=0, atol=tolerance)


@OF_THIS_CPU
def test_multiplies_any_part_of_a_tile(product: NativeProduct) -> None:
    vectors, _ = unit_float16(np.random.default_rng(3).normal(size=(70, 37)))
    wide, rounded = vectors.astype(np.float32), taken(product, vectors)
    wanted = rounded[:25] @ rounded[25:].T
    for m, n in itertools.product((*range(1, 14), 24, 25), (*range(1, 35), 40, 41, 45)):
        out = np.full((m, n), np.nan, dtype=np.float32)
        product.multiply(wide[:m], wide[25 : 25 + n], out)
        np.testing.assert_allclose(out, wanted[:m, :n], rtol=0, atol=2 * sum_error(product, 37))


def errors_of(
    product: NativeProduct, vectors: np.ndarray, queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far products of the first rows by the others are off, relative to lengths; the bounds."""
    count, dim = vectors.shape
    proposer = product.open(queries, count - queries, dim)
    proposer.take_queries(VectorRows.of(vectors), np.arange(queries))
    proposer.take_corpus(VectorRows.of(vectors), np.arange(queries, count))
    out = np.full((queries, count - queries), np.nan, dtype=np.float32)
    proposer.multiply(out)
    wide, lengths = vectors.astype(np.float64), np.sqrt(squared_norms(vectors))
    off = np.abs(out - wide[:queries] @ wide[queries:].T)
    lengths = np.outer(lengths[:queries], lengths[queries:])
    # A product with a zero vector is exactly zero.
    return np.divide(
        off, lengths, out=np.where(off > 0, np.inf, 0.0), where=lengths > 0
    ), proposer.errors


@OF_THIS_CPU
@settings(max_examples=60)
@given(
    arrays(
        np.float16,
        st.tuples(st.integers(2, 12), st.integers(1, 40)),
        elements=st.floats(-1, 1, width=16),
    ),
    st.integers(-13, 0),
)
def test_keeps_the_bound_of_any_vectors(
    product: NativeProduct, vectors: np.ndarray, exponent: int
) -> None:
    # Tiny numbers too: they lose what is below the smallest float16.
    vectors = (vectors * np.float16(2.0**exponent)).astype(np.float16) + np.float16(0)
    off, errors = errors_of(product, vectors, len(vectors) // 2)
    assert (off <= errors[:, None]).all()


@OF_THIS_CPU
def test_keeps_the_bound_of_inputs_that_lose_the_most(product: NativeProduct) -> None:
    rng = np.random.default_rng(1)
    # Just above a power of two, where half a unit is the largest share of the number.
    vectors = ((1 + rng.uniform(2.0**-9, 2.0**-8, size=(100, 256))) / 16).astype(np.float16)
    off, errors = errors_of(product, vectors, 40)
    assert (off <= errors[:, None]).all()
    worst = off.max()
    if product.unit_roundoff == 0:
        assert worst <= sum_error(product, 256)
    elif not isinstance(product, IntegerProduct):
        assert worst <= error_bound(256, product.unit_roundoff)
    assert (worst > 100 * error_bound(256)) == (product.unit_roundoff > 0)


@OF_THIS_CPU
def test_a_proposer_gathers_rows_and_forgets_larger_tiles(product: NativeProduct) -> None:
    vectors, _ = unit_float16(np.random.default_rng(2).normal(size=(300, 40)))
    proposer, mapped = product.open(128, 256, 40), spread(vectors)
    rounded = taken(product, vectors)
    for queries, corpus in ((128, 256), (3, 250), (90, 5)):
        rows = np.random.default_rng(queries).permutation(300)[:queries]
        columns = np.random.default_rng(corpus).permutation(300)[:corpus]
        proposer.take_queries(mapped, rows)
        proposer.take_corpus(VectorRows.of(vectors), columns)
        out = np.full((queries, corpus), np.nan, dtype=np.float32)
        proposer.multiply(out)
        np.testing.assert_allclose(out, rounded[rows] @ rounded[columns].T, rtol=0, atol=1e-5)


@OF_THIS_CPU
def test_threads_do_not_share_their_tiles(product: NativeProduct) -> None:
    pairs = [unit_float16(np.random.default_rng(n).normal(size=(180, 64)))[0] for n in range(4)]

    def multiply(pair: np.ndarray) -> np.ndarray:
        out = np.empty((90, 90), dtype=np.float32)
        wide = pair.astype(np.float32)
        for _ in range(50):
            product.multiply(wide[:90], wide[90:], out)
        return out

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(multiply, pairs))
    for pair, out in zip(pairs, found, strict=True):
        wanted = taken(product, pair[:90]) @ taken(product, pair[90:]).T
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


@OF_THIS_CPU
@pytest.mark.parametrize("metric", Metric)
def test_proposes_the_same_neighbours(metric: Metric, product: NativeProduct) -> None:
    vectors, _ = unit_float16(np.random.default_rng(1).normal(size=(700, 48)))
    usual = nearest_lists(vectors, vectors, 20, metric, 2, NumpyProduct())
    found = nearest_lists(vectors, vectors, 20, metric, 2, product)
    np.testing.assert_array_equal(found, usual)


@ROUNDING
def test_joins_take_bfloat16_only_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = timed_products()[0]
    for share, taken in ((1.2, False), (3.0, True)):
        rounded = TimedProduct(bfloat16_products()[0], exact.flops * share)
        monkeypatch.setattr(products, "timed_bfloat16_products", lambda rounded=rounded: (rounded,))
        assert (fastest_product() is rounded.product) == taken
    monkeypatch.setattr(products, "timed_bfloat16_products", lambda: ())
    assert fastest_product() is exact.product


@INTEGERS
def test_joins_take_integers_only_where_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = TimedProduct(NumpyProduct(), 100e9)
    monkeypatch.setattr(products, "timed_products", lambda: (usual,))
    monkeypatch.setattr(products, "timed_bfloat16_products", lambda: ())
    of_integers = integer_products()[0]

    def chosen(vectors: np.ndarray, rate: float) -> object:
        rated = (TimedProduct(of_integers, rate),)
        monkeypatch.setattr(products, "timed_integer_products", lambda: rated)
        return product_for(VectorRows.of(vectors))

    normal = np.random.default_rng(0).normal(size=(300, 1280)).astype(np.float16)
    assert chosen(normal, 200e9) is of_integers
    assert chosen(normal, 120e9) is usual.product
    assert chosen(normal[:, :256], 200e9) is usual.product
    assert chosen(normal[:0], 200e9) is usual.product
    # One number far beyond the others leaves few integers for these.
    spiked = normal.copy()
    spiked[:, 7] = 60
    assert mean_share(VectorRows.of(spiked)) > 5 * mean_share(VectorRows.of(normal))
    assert chosen(spiked, 200e9) is usual.product


@INTEGERS
def test_sums_of_integers_do_not_overflow() -> None:
    # All numbers as large as can be: the largest sum.
    vectors = np.full((4, MOST_DIM), 2.0**-8, dtype=np.float16)
    vectors[3] *= -1
    off, errors = errors_of(integer_products()[0], vectors, 2)
    assert (off <= errors[:, None]).all()
    with pytest.raises(ValueError, match=f"wanted at most {MOST_DIM}"):
        integer_products()[0].open(1, 1, MOST_DIM + 1)


@pytest.mark.skipif(not cpu_features().get("avx512f"), reason="the vectors of this CPU are not wider")
@pytest.mark.parametrize("vnni", [False, True])
def test_cpus_without_wide_vectors_get_narrower_ones(vnni: bool, tmp_path) -> None:
    if vnni and not cpu_features().get("avxvnni"):
        pytest.skip("this CPU has no VNNI for narrower vectors")
    # Numba's own setting says what it compiles for; its cache is one a CPU.
    code = f"""
import numpy as np
from index_builder.scoring.integer_products import integer_products
from index_builder.scoring.native_products import bfloat16_products, float32_products
from tests.topk_oracle import spread
found = (*float32_products(), *integer_products())
assert [product.name for product in found] == ["AVX2 float32", "AVX2 int8"][: {1 + vnni}]
assert not bfloat16_products()
rng = np.random.default_rng(0)
for product, error in zip(found, (1e-6, 0.05)):
    for m, n, dim in ((1, 1, 1), (13, 33, 31), (50, 70, 700)):
        vectors = rng.normal(size=(m + n, dim)).astype(np.float16).astype(np.float32)
        out = np.full((m, n), np.nan, dtype=np.float32)
        product.multiply(vectors[:m], vectors[m:], out)
        lengths = np.linalg.norm(vectors, axis=1)
        off = np.abs(out - vectors[:m] @ vectors[m:].T) / np.outer(lengths[:m], lengths[m:])
        assert off.max() < error, (product.name, off.max())
"""
    features = "+avx,+avx2,+fma,+f16c,+sse4.2,+popcnt,+bmi,+bmi2" + ",+avxvnni" * vnni
    settings = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **settings})
