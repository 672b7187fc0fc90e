"""The rows of the neighbours dataset, from a finished top-k."""

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from index_builder.scoring.topk import TopK
from index_builder.search.neighbors import MARGIN, NeighborsSchema, neighbors_table, slots
from tests.unit.rules_for_tests import margins

CORPUS = pa.table(
    {
        "image_id": [f"id{row}" for row in range(10)],
        "brand": [None if row == 4 else f"brand{row}" for row in range(10)],
        "price": pa.array(range(10), pa.int64()),
    }
)
SCHEMA = NeighborsSchema((("brand", pa.string()), ("price", pa.int64())))


def lookup(rows: NDArray[np.int64]) -> pa.Table:
    return CORPUS.take(rows)


def finished(found: list[list[tuple[int, float]]], k: int) -> TopK:
    top = TopK(len(found), k, id_bytes=8)
    for query, pairs in enumerate(found):
        top.counts[query] = len(pairs)
        for place, (row, score) in enumerate(pairs):
            top.rows[query, place], top.scores[query, place] = row, score
    return top


@pytest.mark.parametrize(("all_probed", "short"), [(True, "exhausted"), (False, "capped")])
def test_rows_carry_ids_scores_status_and_columns(all_probed: bool, short: str) -> None:
    top = finished([[(7, 0.5), (4, 0.25)], [], [(0, 1.0)]], k=2)
    rows = np.asarray([3, 4, 5])
    table = neighbors_table(
        SCHEMA, CORPUS.slice(3, 3), rows, top, lookup, k=2, all_lists_probed=all_probed
    )
    assert table.schema.equals(SCHEMA.arrow())
    assert table.to_pylist() == [
        {
            "query_id": "id3",
            "neighbor_ids": ["id7", "id4"],
            "scores": [0.5, 0.25],
            "status": "filled",
            "query_row": 3,
            "neighbor_rows": [7, 4],
            "query_brand": "brand3",
            "neighbor_brand": ["brand7", None],
            "query_price": 3,
            "neighbor_price": [7, 4],
        },
        {
            "query_id": "id4",
            "neighbor_ids": [],
            "scores": [],
            "status": short,
            "query_row": 4,
            "neighbor_rows": [],
            "query_brand": None,
            "neighbor_brand": [],
            "query_price": 4,
            "neighbor_price": [],
        },
        {
            "query_id": "id5",
            "neighbor_ids": ["id0"],
            "scores": [1.0],
            "status": short,
            "query_row": 5,
            "neighbor_rows": [0],
            "query_brand": "brand5",
            "neighbor_brand": ["brand0"],
            "query_price": 5,
            "neighbor_price": [0],
        },
    ]


def test_no_neighbors_at_all() -> None:
    top = finished([[], []], k=3)
    table = neighbors_table(
        SCHEMA, CORPUS.slice(0, 2), np.arange(2), top, lookup, k=3, all_lists_probed=True
    )
    assert table["neighbor_ids"].to_pylist() == [[], []]
    assert table["neighbor_brand"].to_pylist() == [[], []]


def test_names_of_the_carried_columns() -> None:
    assert SCHEMA.names == ["brand", "price"]
    assert NeighborsSchema().arrow().names == [
        "query_id",
        "neighbor_ids",
        "scores",
        "status",
        "query_row",
        "neighbor_rows",
    ]


@pytest.mark.parametrize("k", [2, 3])
def test_margins_are_to_the_next_score_and_null_at_the_end(k: int) -> None:
    found = [[(7, 0.5), (4, 0.25), (1, -0.5)], [(0, 1.0), (2, 1.0)], [(3, 0.1)], []]
    top = finished(found, k=slots(k, (MARGIN,)))
    schema = NeighborsSchema(evidence=(MARGIN,))
    table = neighbors_table(
        schema, CORPUS.slice(0, 4), np.arange(4), top, lookup, k=k, all_lists_probed=True
    )
    assert table.schema.equals(schema.arrow())
    wanted = [
        margins([score for _, score in row[:k]], row[k][1] if len(row) > k else None) for row in found
    ]
    assert table["margins"].to_pylist() == wanted
    assert table["status"].to_pylist()[:2] == ["filled", "filled" if k == 2 else "exhausted"]


def test_without_margins_no_slot_is_spent_on_them() -> None:
    assert slots(5, ()) == 5
    assert slots(5, (MARGIN,)) == 6
    assert NeighborsSchema(evidence=(MARGIN,)).arrow().names[-1] == "margins"
