"""Rows of float16 vectors in a matrix, or spread over memory as in a mapped file."""

import numpy as np
import pytest

from index_builder.scoring.vector_rows import VectorRows
from tests.topk_oracle import spread

MATRIX = np.random.default_rng(1).normal(size=(40, 19)).astype(np.float16)


@pytest.mark.parametrize("rows", [VectorRows.of(MATRIX), spread(MATRIX)], ids=["matrix", "spread"])
def test_rows_are_those_of_the_matrix(rows: VectorRows) -> None:
    chosen = np.asarray([7, 0, 39, 7])
    assert (len(rows), rows.dim) == MATRIX.shape
    assert rows.matrix().tobytes() == MATRIX.tobytes()
    assert rows.slice(3, 30).matrix().tobytes() == MATRIX[3:30].tobytes()
    assert rows.take(chosen).matrix().tobytes() == MATRIX[chosen].tobytes()
    assert rows.slice(3, 30).take(chosen[:2]).matrix().tobytes() == MATRIX[[10, 3]].tobytes()
    assert rows.slice(5, 5).matrix().shape == (0, 19)


def test_taking_rows_copies_no_vector() -> None:
    rows = VectorRows.of(MATRIX)
    for some in (rows.slice(3, 30), rows.take(np.asarray([7, 0]))):
        assert np.shares_memory(some.arrays.bits, rows.arrays.bits)
    assert np.shares_memory(rows.arrays.bits, MATRIX)


def test_a_matrix_of_another_type_or_order_is_converted() -> None:
    for matrix in (MATRIX.astype(np.float64), np.asfortranarray(MATRIX), MATRIX[::-1][::-1]):
        assert VectorRows.of(matrix).matrix().tobytes() == MATRIX.tobytes()
    assert len(VectorRows.of(np.empty((0, 8), dtype=np.float16))) == 0
