"""Sums over 4-bit codes: every way of looking up against plain NumPy."""

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.index.code_sums import (
    BLOCK_ROWS,
    LOOKUP,
    Lookup,
    PreparedCodes,
    supported_lookups,
    table_bytes,
)


def _case(rows: int, subspaces: int, queries: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes uint8 [rows, subspaces] and padded tables of the queries."""
    rng = np.random.default_rng(rows * 1000 + subspaces)
    codes = rng.integers(16, size=(rows, subspaces), dtype=np.uint8)
    tables = np.zeros((queries, table_bytes(subspaces)), dtype=np.uint8)
    tables[:, : 16 * subspaces] = rng.integers(256, size=(queries, 16 * subspaces), dtype=np.uint8)
    return codes, tables


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] | even[:, 1::2] << 4).astype(np.uint8)


def _oracle(codes: NDArray[np.uint8], tables: NDArray[np.uint8]) -> NDArray[np.int64]:
    subspaces = codes.shape[1]
    wide = tables[:, : 16 * subspaces].reshape(len(tables), subspaces, 16).astype(np.int64)
    return wide[:, np.arange(subspaces)[None, :], codes].sum(axis=2)


@pytest.mark.parametrize("lookup", supported_lookups())
@pytest.mark.parametrize(
    ("rows", "subspaces"), [(1, 1), (16, 2), (64, 4), (65, 7), (130, 64), (33, 321), (64, 1031)]
)
def test_sums_are_those_of_numpy(lookup: Lookup, rows: int, subspaces: int) -> None:
    codes, tables = _case(rows, subspaces, 3)
    prepared = PreparedCodes(_packed(codes), subspaces, lookup)
    slots = np.asarray([2, 0, 2, 1])
    scratch = np.full(len(slots) * prepared.blocks * BLOCK_ROWS, -7, dtype=np.int32)
    sums = prepared.sums(tables, slots, scratch)
    np.testing.assert_array_equal(sums, _oracle(codes, tables)[slots])


@pytest.mark.parametrize("lookup", supported_lookups())
def test_the_largest_sums_do_not_overflow(lookup: Lookup) -> None:
    subspaces = 1200
    packed = np.full((70, subspaces // 2), 255, dtype=np.uint8)
    tables = np.full((1, table_bytes(subspaces)), 255, dtype=np.uint8)
    prepared = PreparedCodes(packed, subspaces, lookup)
    sums = prepared.sums(tables, np.zeros(1, np.int64), np.empty(128, np.int32))
    assert (sums == 255 * subspaces).all()


def test_plain_is_always_there_and_the_first_is_taken() -> None:
    found = supported_lookups()
    assert found[-1] is Lookup.PLAIN
    assert found[0] is LOOKUP


def test_no_rows_have_no_sums() -> None:
    prepared = PreparedCodes(np.empty((0, 2), np.uint8), 4)
    tables, scratch = np.zeros((1, table_bytes(4)), np.uint8), np.empty(0, np.int32)
    assert prepared.sums(tables, np.zeros(1, np.int64), scratch).shape == (1, 0)
