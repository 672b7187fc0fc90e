"""The order of rows inside a list."""

import numpy as np
import pytest

from index_builder.index.row_order import row_order, vector_keys


def split_mix(i: int) -> int:
    """The i-th number of SplitMix64 with the seed 0, made odd."""
    z = i * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) | 1


def test_equal_vectors_have_equal_keys_and_others_do_not() -> None:
    codes = np.random.default_rng(0).normal(size=(20_000, 7)).astype(np.float16)
    codes[10_000:] = codes[:10_000]
    keys = vector_keys(codes)
    assert keys.dtype == np.uint64
    np.testing.assert_array_equal(keys[:10_000], keys[10_000:])
    distinct = len(np.unique(codes, axis=0))
    assert len(np.unique(keys)) == distinct > 9_000
    # Vectors that differ by one bit, or in the order of their numbers, have other keys.
    one = np.zeros((17, 16), dtype=np.uint16)
    one[np.arange(1, 17), np.arange(16)] = 1
    assert len(np.unique(vector_keys(one.view(np.float16)))) == 17
    # Nothing of it may change: it decides the order of the rows of an index.
    assert vector_keys(np.ones((1, 3), dtype=np.float16))[0] == 17465017373984093184
    words = codes[0].view(np.uint16).tolist()
    assert int(keys[0]) == sum(word * split_mix(i + 1) for i, word in enumerate(words)) % 2**64


def test_rows_are_sorted_by_list_then_key_then_id_bytes() -> None:
    rng = np.random.default_rng(1)
    lists = rng.integers(5, size=500).astype(np.int32)
    keys = rng.integers(40, size=500).astype(np.uint64)
    names = [f"{'ü' if row % 3 else 'z'}{row * 7919 % 500}" for row in range(500)]
    asked: list[int] = []

    def ids(rows: np.ndarray) -> list[str]:
        asked.extend(rows.tolist())
        return [names[row] for row in rows]

    order = row_order(lists, keys, ids)
    naive = sorted(range(500), key=lambda row: (lists[row], keys[row], names[row].encode()))
    assert order.tolist() == naive
    pairs = list(zip(lists.tolist(), keys.tolist(), strict=True))
    assert sorted(asked) == [row for row in range(500) if pairs.count(pairs[row]) > 1]


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(count: int) -> None:
    def ids(rows: np.ndarray) -> list[str]:
        raise AssertionError("no row shares its list and key with another")

    order = row_order(np.zeros(count, np.int32), np.zeros(count, np.uint64), ids)
    assert order.tolist() == list(range(count))
