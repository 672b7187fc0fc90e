"""Instructions that compiled code takes: float16 to float32, exact dot products, comparisons."""

import math

import numpy as np
import pytest
from numba import njit

from index_builder.scoring import intrinsics
from index_builder.scoring.widening import widen_rows
from tests.topk_oracle import spread

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)
CONVERTERS = {
    "of this CPU": (intrinsics.half_to_float, intrinsics.half_dot),
    "by arithmetic": (intrinsics.half_to_float_by_arithmetic, intrinsics.half_dot_by_arithmetic),
}


@pytest.mark.parametrize("kind", CONVERTERS)
def test_converts_every_finite_float16_exactly(kind: str) -> None:
    convert = CONVERTERS[kind][0]

    @njit
    def widen(bits, out):  # type: ignore[no-untyped-def]
        for i in range(len(bits)):
            out[i] = convert(bits[i])

    finite = EVERY_HALF[np.isfinite(EVERY_HALF.view(np.float16))]
    out = np.empty(len(finite), dtype=np.float32)
    widen(finite, out)
    wanted = finite.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", CONVERTERS)
def test_dot_products_are_those_of_sums_without_rounding(kind: str) -> None:
    dot = CONVERTERS[kind][1]

    @njit
    def call(a, b):  # type: ignore[no-untyped-def]
        return dot(a.ctypes.data, b.ctypes.data, a.shape[0])

    rng = np.random.default_rng(0)
    for count in (0, 1, 15, 16, 17, 37, 48, 1280):
        a, b = (rng.uniform(-0.1, 0.3, size=count).astype(np.float16) for _ in range(2))
        exact = math.fsum(float(i) * float(j) for i, j in zip(a, b, strict=True))
        assert call(a.view(np.uint16), b.view(np.uint16)) == exact


def test_gathers_rows() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 19)).astype(np.float16)
    rows = np.random.default_rng(1).permutation(50)[:33]
    out = np.empty((33, 19), dtype=np.float32)
    widen_rows(spread(vectors).arrays, rows, out)
    np.testing.assert_array_equal(out, vectors[rows].astype(np.float32))


def test_a_mask_has_a_bit_for_each_product_that_passes() -> None:
    @njit
    def call(f, u, v, a, b):  # type: ignore[no-untyped-def]
        mask = intrinsics.passing_mask(f.ctypes.data, u.ctypes.data, v.ctypes.data, a, b)
        lowest = intrinsics.trailing_zeros(mask) if mask != 0 else -1
        return mask, lowest

    rng = np.random.default_rng(0)
    for _ in range(200):
        f, u, v = rng.normal(size=(3, intrinsics.WIDE)).astype(np.float32)
        a, b = rng.normal(size=2).astype(np.float32)
        # Equality passes.
        f[3] = np.float32(a * u[3]) + np.float32(b + v[3])
        passes = f - a * u >= b + v
        mask, lowest = call(f, u, v, a, b)
        assert [bool(mask >> bit & 1) for bit in range(intrinsics.WIDE)] == passes.tolist()
        assert mask >> intrinsics.WIDE == 0
        assert lowest == (int(np.flatnonzero(passes)[0]) if passes.any() else -1)
