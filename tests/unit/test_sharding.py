"""The layout: every row in one shard, shards of about equal size, small lists whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.index.sharding import IndexLayout, load_layout, plan_layout, save_layout

SIZES = st.lists(
    st.one_of(st.integers(0, 5), st.integers(0, 200), st.integers(0, 3000)), min_size=1, max_size=60
).filter(any)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 40))
def test_a_layout_agrees_with_a_naive_one(sizes: list[int], shards: int) -> None:
    layout = plan_layout(np.asarray(sizes), shards)
    list_of_row = np.repeat(np.arange(len(sizes)), sizes)
    owner = layout.shard_of_rows(np.arange(len(list_of_row)))

    # Shards partition the rows, in order; none is empty.
    assert layout.rows == sum(sizes)
    assert 1 <= layout.shards <= shards
    assert (np.diff(owner) >= 0).all()
    assert set(owner.tolist()) == set(range(layout.shards))
    for shard in range(layout.shards):
        start, stop = layout.shard_rows(shard)
        rows = np.flatnonzero(owner == shard)
        assert (rows[0], rows[-1] + 1) == (start, stop)
        first, last = layout.shard_lists(shard)
        owned = set(list_of_row[rows].tolist())
        assert (first, last - 1) == (min(owned), max(owned))
        for number in range(len(sizes)):
            begin, end = layout.list_rows(shard, number)
            naive = (np.flatnonzero(list_of_row[rows] == number)).tolist()
            assert list(range(begin, end)) == naive


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 40))
def test_only_lists_above_a_tenth_of_a_shard_are_split(sizes: list[int], shards: int) -> None:
    layout = plan_layout(np.asarray(sizes), shards)
    target = sum(sizes) / shards
    inner = layout.shard_offsets[1:-1]
    for number, size in enumerate(sizes):
        start, stop = layout.list_offsets[number : number + 2]
        if ((inner > start) & (inner < stop)).any():
            assert size > target / 10


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 40))
def test_shards_are_of_about_equal_size(sizes: list[int], shards: int) -> None:
    layout = plan_layout(np.asarray(sizes), shards)
    target = sum(sizes) / shards
    # A cut moves by a twentieth at most at either end, and by one for whole rows.
    assert np.diff(layout.shard_offsets).max() <= 1.1 * target + 1
    if target >= 20:
        assert layout.shards == shards
        assert np.diff(layout.shard_offsets).min() >= 0.9 * target - 1


@pytest.mark.parametrize("shards", [2, 7, 40])
@pytest.mark.parametrize("power", [1.1, 1.5, 3.0])
def test_heavily_skewed_lists_make_even_shards(power: float, shards: int) -> None:
    # A few lists hold most of the rows: at power 3 the first one has more than four fifths of them.
    sizes = (1_000_000 / np.arange(1, 2001) ** power).astype(np.int64)
    sizes = np.random.default_rng(0).permutation(sizes)
    rows = np.diff(plan_layout(sizes, shards).shard_offsets)
    assert len(rows) == shards
    assert rows.max() / rows.mean() <= 1.2
    if power == 3.0:
        assert sizes.max() > 0.8 * sizes.sum()


def test_cuts_fall_between_small_lists() -> None:
    sizes = np.full(100, 7)
    layout = plan_layout(sizes, 4)
    assert set(layout.shard_offsets.tolist()) <= set(layout.list_offsets.tolist())
    assert layout.shard_offsets.tolist() == [0, 175, 350, 525, 700]


def test_a_large_list_is_split_evenly() -> None:
    layout = plan_layout(np.asarray([10, 980, 10]), 4)
    assert layout.shard_offsets.tolist() == [0, 250, 500, 750, 1000]
    assert [layout.shard_lists(shard) for shard in range(4)] == [(0, 2), (1, 2), (1, 2), (1, 3)]
    assert [layout.list_rows(shard, 1) for shard in range(4)] == [
        (10, 250),
        (0, 250),
        (0, 250),
        (0, 240),
    ]


@pytest.mark.parametrize(("rows", "shards", "expected"), [(1, 5, 1), (3, 5, 3), (5, 5, 5)])
def test_fewer_rows_than_shards(rows: int, shards: int, expected: int) -> None:
    layout = plan_layout(np.asarray([0, rows, 0, 0]), shards)
    assert layout.shards == expected
    assert np.diff(layout.shard_offsets).tolist() == [1] * expected


def test_row_numbers_do_not_depend_on_the_number_of_shards() -> None:
    sizes = np.random.default_rng(0).integers(0, 90, size=40)
    for shards in (1, 2, 7):
        layout = plan_layout(sizes, shards)
        np.testing.assert_array_equal(layout.list_offsets, np.cumsum([0, *sizes]))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    layout = plan_layout(np.asarray([3, 0, 500, 20]), 3)
    for name in ("one", "two"):
        save_layout(str(tmp_path / name), layout)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_layout(str(tmp_path / "one"))
    assert isinstance(loaded, IndexLayout)
    np.testing.assert_array_equal(loaded.list_offsets, layout.list_offsets)
    np.testing.assert_array_equal(loaded.shard_offsets, layout.shard_offsets)
