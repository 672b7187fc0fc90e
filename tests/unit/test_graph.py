"""Mutual and reverse neighbours against plain dictionaries."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from index_builder.errors import DatasetError
from index_builder.steps.graph import (
    EDGE_SCHEMA,
    GraphSpec,
    NeighborLists,
    ReverseSide,
    evidence_table,
    graph_figures,
    part_figures,
    reverse_side,
    split_edges,
)
from tests.index_fixtures import scattered_ids

STARTS = np.array([0, 70, 70, 71, 200])
TOTAL = 200
K = 14


def random_tables(seed: int = 0) -> list[pa.Table]:
    """Neighbours parts with ties, hubs, rows that do not ask, and an empty shard; scores symmetric."""
    rng = np.random.default_rng(seed)
    ids = scattered_ids(TOTAL)
    values = np.round(rng.uniform(size=(TOTAL, TOTAL)), 2).astype(np.float32)
    scores = np.maximum(values, values.T)
    scores[:, :3] = 1.5
    scores[:3] = 1.5
    rows: list[dict[str, object]] = []
    for query in range(TOTAL):
        others = [row for row in range(TOTAL) if row != query and row % 9 != 4]
        best = sorted(others, key=lambda row: (-scores[query, row], ids[row].encode()))
        best = best[: query % (K + 1)]
        rows.append(
            {
                "query_id": ids[query],
                "query_row": query,
                "neighbor_rows": best,
                "scores": [float(scores[query, row]) for row in best],
                "neighbor_ids": [ids[row] for row in best],
            }
        )
    schema = pa.schema(
        [
            ("query_id", pa.string()),
            ("query_row", pa.int64()),
            ("neighbor_rows", pa.list_(pa.int64())),
            ("scores", pa.list_(pa.float32())),
            ("neighbor_ids", pa.list_(pa.string())),
        ]
    )
    return [
        pa.Table.from_pylist([row for row in rows[start:stop] if row["query_row"] % 5 != 3], schema)
        for start, stop in itertools.pairwise(STARTS)
    ]


def read_lists(tables: list[pa.Table]) -> list[NeighborLists]:
    ranges = [(int(start), int(stop)) for start, stop in itertools.pairwise(STARTS)]
    return [
        NeighborLists.of(table, own, TOTAL, "part") for table, own in zip(tables, ranges, strict=True)
    ]


def turn(lists: list[NeighborLists], most: int) -> list[ReverseSide]:
    """Sends all edges to the shards of their targets, last part first, and turns them around."""
    arrived: list[list[pa.RecordBatch]] = [[] for _ in lists]
    for part in reversed(lists):
        for target, batch in split_edges(part, STARTS):
            arrived[target].append(batch)
    ids = scattered_ids(TOTAL)
    return [
        reverse_side(
            part,
            pa.chunked_array([ids[start:stop]], pa.string()),
            pa.Table.from_batches(batches, EDGE_SCHEMA),
            TOTAL,
            GraphSpec(most),
        )
        for part, batches, (start, stop) in zip(lists, arrived, itertools.pairwise(STARTS), strict=True)
    ]


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_both_sides_are_those_of_the_lists(most: int) -> None:
    tables = random_tables()
    lists = read_lists(tables)
    sides = turn(lists, most)
    queries = pa.concat_tables(tables).to_pylist()
    ids = scattered_ids(TOTAL)
    holders: dict[str, list[tuple[float, bytes]]] = {name: [] for name in ids}
    edges = {}
    for query in queries:
        for name, score in zip(query["neighbor_ids"], query["scores"], strict=True):
            holders[name].append((-score, query["query_id"].encode()))
            edges[query["query_id"], name] = score
    degrees = {name: len(found) for name, found in holders.items()}
    reverse = pa.concat_tables([side.reverse for side in sides]).to_pylist()
    assert reverse == [
        {
            "image_id": name,
            "reverse_degree": degrees[name],
            "reverse_ids": [holder.decode() for _, holder in sorted(holders[name])[:most]],
            "reverse_scores": [-score for score, _ in sorted(holders[name])[:most]],
        }
        for name in ids
    ]
    row = {name: place for place, name in enumerate(ids)}
    mutual = [
        (row[a], row[b], a, b, score)
        for (a, b), score in edges.items()
        if (b, a) in edges and row[a] < row[b]
    ]
    assert len(mutual) > 20
    found = pa.concat_tables([side.mutual_edges for side in sides])
    assert [(e["a_row"], e["b_row"], e["a"], e["b"], e["score"]) for e in found.to_pylist()] == sorted(
        mutual
    )
    all_degrees = np.concatenate([side.degrees for side in sides])
    evidence = pa.concat_tables(
        [
            evidence_table(part, side.degrees, side.mutual, all_degrees[part.rows])
            for part, side in zip(lists, sides, strict=True)
        ]
    )
    assert evidence.to_pylist() == [
        {
            "query_id": query["query_id"],
            "reverse_degree": degrees[query["query_id"]],
            "mutual": [(name, query["query_id"]) in edges for name in query["neighbor_ids"]],
            "neighbor_reverse_degrees": [degrees[name] for name in query["neighbor_ids"]],
        }
        for query in queries
    ]
    figures = graph_figures([part_figures(side) for side in sides], TOTAL)
    counts = np.array(list(degrees.values()), dtype=np.float64)
    centred = counts - counts.mean()
    assert figures.pop("reverse_degree_skewness") == pytest.approx(
        (centred**3).mean() / (centred**2).mean() ** 1.5
    )
    assert figures == {
        "edges": len(edges),
        "mutual_edges": len(mutual),
        "mutual_share": 2 * len(mutual) / len(edges),
        "unreached": int((counts == 0).sum()),
        "unreached_share": (counts == 0).mean(),
        "max_reverse_degree": counts.max(),
    }


def test_figures_of_lists_that_hold_nobody_and_of_a_ring() -> None:
    empty = {"edges": 0, "mutual": 0, "mutual_edges": 0, "unreached": 3, "max_reverse_degree": 0}
    empty |= {f"degree_power_{power}": 0 for power in (1, 2, 3)}
    figures = graph_figures([empty], 3)
    assert figures["mutual_share"] == figures["reverse_degree_skewness"] == 0.0
    assert figures["unreached_share"] == 1.0
    ring = {"edges": 3, "mutual": 0, "mutual_edges": 0, "unreached": 0, "max_reverse_degree": 1}
    ring |= {f"degree_power_{power}": 3 for power in (1, 2, 3)}
    assert graph_figures([ring], 3)["reverse_degree_skewness"] == 0.0


@pytest.mark.parametrize("wrong", ["order", "range", "neighbour"])
def test_lists_that_are_not_of_the_shard_are_refused(wrong: str) -> None:
    table = random_tables()[0]
    own = (0, 70)
    if wrong == "order":
        table = table.take(pa.array([1, 0]))
    elif wrong == "range":
        own = (1, 70)
    else:
        far = pa.array([[TOTAL]] * len(table), pa.list_(pa.int64()))
        table = table.set_column(2, "neighbor_rows", far)
    with pytest.raises(DatasetError, match=f"part x does not hold neighbours of the rows {own[0]} to"):
        NeighborLists.of(table, own, TOTAL, "x")
