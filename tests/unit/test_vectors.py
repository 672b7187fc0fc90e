"""Unit vectors in float16, sums without rounding error, and the scale of vectors with a length."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from index_builder.errors import DatasetError
from index_builder.scoring.vectors import (
    check_scale,
    norms_in_order,
    relative_rounding,
    round_float16,
    scale_exponent,
    squared_norms,
    unit_float16,
)


def length_errors(vectors: np.ndarray) -> np.ndarray:
    """How far each row is from unit length."""
    return np.abs(np.sqrt(squared_norms(vectors)) - 1)


@pytest.mark.parametrize("dim", [64, 256, 1280, 4096])
@pytest.mark.parametrize("kind", ["gaussian", "sparse", "constant"])
def test_length_is_within_two_ten_millionths(dim: int, kind: str) -> None:
    rng = np.random.default_rng(dim)
    vectors = {
        "gaussian": rng.normal(size=(200, dim)),
        "sparse": np.maximum(rng.normal(size=(200, dim)), 0) ** 2,
        # All roundings have one sign here, the furthest from unit length before it is restored.
        "constant": np.full((3, dim), 7.0),
    }[kind]
    unit, valid = unit_float16(vectors.astype(np.float32))
    assert unit.dtype == np.float16
    assert valid.all()
    assert length_errors(unit).max() <= 2e-7


def test_rounding_alone_would_miss_the_length() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 256))
    rounded = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert length_errors(rounded.astype(np.float16)).max() > 1e-6


def test_restoring_the_length_hardly_turns_a_vector() -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 256))
    unit, _ = unit_float16(vectors)
    exact = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    spacing = np.spacing(np.abs(unit)).astype(np.float64)
    moved = np.abs(unit.astype(np.float64) - exact) / spacing
    # Rounding alone is half a unit in the last place; few numbers are moved, and not far.
    assert np.quantile(moved, 0.95) <= 0.5
    assert moved.max() < 10
    assert (np.sign(unit) * np.sign(exact) >= 0).all()
    cosine = (unit.astype(np.float64) * exact).sum(axis=1)
    assert cosine.min() > 1 - 5e-7


def test_rows_without_a_direction_are_masked() -> None:
    vectors = np.random.default_rng(2).normal(size=(6, 32)).astype(np.float32)
    vectors[1] = 0
    vectors[2, 5] = np.nan
    vectors[3, 7] = np.inf
    vectors[4, 0] = -np.inf
    unit, valid = unit_float16(vectors)
    assert valid.tolist() == [True, False, False, False, False, True]
    assert not unit[1:5].any()
    np.testing.assert_array_equal(unit[[0, 5]], unit_float16(vectors[[0, 5]])[0])


def test_no_rows() -> None:
    unit, valid = unit_float16(np.empty((0, 8)))
    assert unit.shape == (0, 8)
    assert valid.shape == (0,)


FLOATS = st.floats(-(2.0**100), 2.0**100, allow_nan=False, width=32)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 20)), elements=FLOATS))
def test_a_row_does_not_depend_on_its_company(vectors: np.ndarray) -> None:
    unit, valid = unit_float16(vectors)
    for row in range(len(vectors)):
        alone, has_direction = unit_float16(vectors[row : row + 1])
        assert alone.tobytes() == unit[row : row + 1].tobytes()
        assert has_direction[0] == valid[row] == vectors[row].any()
    backwards, _ = unit_float16(vectors[::-1])
    assert backwards[::-1].tobytes() == unit.tobytes()
    strided, _ = unit_float16(np.asfortranarray(vectors))
    assert strided.tobytes() == unit.tobytes()
    # In few dimensions float16 has no vector of exactly unit length nearby.
    assert (length_errors(unit[valid]) < 1e-3).all()


def test_many_rows_at_a_call_equal_one_at_a_call() -> None:
    vectors = np.random.default_rng(3).normal(size=(2000, 96))
    together, _ = unit_float16(vectors)
    single = np.concatenate([unit_float16(vectors[row : row + 1])[0] for row in range(2000)])
    assert single.tobytes() == together.tobytes()


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float16,
        st.tuples(st.integers(1, 4), st.integers(0, 40)),
        elements=st.floats(-0.75, 0.75, width=16, allow_subnormal=True),
    )
)
def test_squared_norms_are_exact(vectors: np.ndarray) -> None:
    exact = [math.fsum(float(x) * float(x) for x in row) for row in vectors]
    assert squared_norms(vectors).tolist() == exact


@pytest.mark.parametrize("dim", [256, 1280, 25_088])
def test_squared_norms_of_unit_vectors_are_exact_in_any_order(dim: int) -> None:
    rng = np.random.default_rng(dim)
    unit, _ = unit_float16(np.abs(rng.normal(size=(3, dim))))
    exact = [math.fsum(float(x) * float(x) for x in row) for row in unit]
    assert squared_norms(unit).tolist() == exact
    assert squared_norms(unit[:, rng.permutation(dim)]).tolist() == exact


@pytest.mark.parametrize(
    ("norm", "exponent"),
    [(0.0, 0), (1.0, 0), (np.nextafter(1.0, 2), -1), (0.5, 1), (0.75, 0), (300.0, -9), (1024.0, -10)],
)
def test_the_scale_brings_the_longest_vector_to_at_most_one(norm: float, exponent: int) -> None:
    assert scale_exponent(norm) == exponent
    assert norm * 2.0**exponent <= 1
    assert norm == 0 or norm * 2.0 ** (exponent + 1) > 1


@pytest.mark.parametrize("norm", [1e-12, 1e19, math.inf, math.nan])
def test_lengths_whose_squares_do_not_fit_float32_are_refused(norm: float) -> None:
    with pytest.raises(DatasetError, match=r"norm of .*, wanted 3\.6e-12 to 4\.6e\+18: .* Multiply"):
        scale_exponent(norm)


def test_vectors_that_outgrow_the_scale_are_refused() -> None:
    norms = np.array([0.5, 256.0, 256.0 * (1 + 2**-11), 0.0])
    check_scale(norms, -8)
    norms[[0, 3]] = 257, 300
    message = r"2 vectors are longer .* the norm at row 3 of its block is 300, wanted at most 256, .*"
    with pytest.raises(DatasetError, match=message + "Build the index again"):
        check_scale(norms, -8)


def test_rounding_to_float16() -> None:
    tiny = 2.0**-24
    values = np.array([[1.0, -0.0, tiny * 0.49, tiny * 1.5, tiny * 2.5, 1 + 2**-11, -tiny * 700.5]])
    rounded = round_float16(values)
    # Nearest, ties to even, also below 2^-14, where there is nothing between multiples of 2^-24.
    assert rounded.astype(np.float64).tolist() == [[1, 0, 0, 2 * tiny, 2 * tiny, 1, -700 * tiny]]
    assert not np.signbit(rounded[0, 1])


def test_relative_rounding_is_the_worst_row() -> None:
    exact = np.array([[0.6, 0.8], [0.0, 0.0], [3 * 2.0**-25, 0.0], [0.5, 0.25]])
    rounded = round_float16(exact)
    errors = rounded.astype(np.float64) - exact
    first = np.linalg.norm(errors[0])
    assert relative_rounding(exact[:2], rounded[:2]) == pytest.approx(first)
    assert 0 < first < 2**-11
    assert relative_rounding(exact, rounded) == pytest.approx(1 / 3)
    assert relative_rounding(exact[3:], rounded[3:]) == 0
    assert relative_rounding(exact[:0], rounded[:0]) == 0
    # Nothing is left of a vector that is too short.
    short = np.array([[2.0**-30, 0.0]])
    assert relative_rounding(short, round_float16(short)) == 1


def test_norms_tell_what_is_finite_and_what_is_zero() -> None:
    extremes = [[3e38, 3e38], [1e-45, 0], [0, -0.0], [np.inf, 1], [np.nan, 1], [-np.inf, 1]]
    vectors = np.array(extremes, np.float32)
    norms = norms_in_order(vectors.astype(np.float64))
    assert np.isfinite(norms).tolist() == [True, True, True, False, False, False]
    assert (norms == 0).tolist() == [False, False, True, False, False, False]
