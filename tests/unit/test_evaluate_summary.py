"""The one pass over neighbours: figures against a naive count, and no influence of the order."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.search.neighbors import FILLED, NeighborsSchema
from transforms.evaluate import KINDS, EvaluateSpec, Summary

SCHEMA = NeighborsSchema((("kind", pa.string()), ("group", pa.string()))).arrow()
SPEC = EvaluateSpec(truth="kind", truth_k=3, group_by="group", examples=2, columns=("kind",))

# One row: query id, truth, group, and its neighbours as (id, score, truth).
Row = tuple[str, str | None, str | None, list[tuple[str, float, str | None]]]


def neighbors(rows: list[Row], first_row: int = 0) -> pa.Table:
    columns = {
        "query_id": [row[0] for row in rows],
        "neighbor_ids": [[n[0] for n in row[3]] for row in rows],
        "scores": [[n[1] for n in row[3]] for row in rows],
        "status": [FILLED] * len(rows),
        "query_row": list(range(first_row, first_row + len(rows))),
        "neighbor_rows": [[int(n[0][1:]) for n in row[3]] for row in rows],
        "query_kind": [row[1] for row in rows],
        "neighbor_kind": [[n[2] for n in row[3]] for row in rows],
        "query_group": [row[2] for row in rows],
        "neighbor_group": [[None] * len(row[3]) for row in rows],
    }
    return pa.table(columns, schema=SCHEMA)


def catalogue(n: int, seed: int = 0, k: int = 5) -> list[Row]:
    """Random queries, each with up to k neighbours; some truths and groups are null or alone."""
    rng = np.random.default_rng(seed)
    kinds = [None if i % 11 == 5 else f"k{rng.integers(n // 2 + 1)}" for i in range(n)]
    groups = [(None, "a", "b", "b", "ü")[rng.integers(5)] for _ in range(n)]
    rows: list[Row] = []
    for i in range(n):
        others = rng.permutation([j for j in range(n) if j != i])[: rng.integers(0, k + 1)]
        scores = np.sort(rng.uniform(-0.2, 1, len(others)).astype(np.float32))[::-1]
        found = [(f"i{j}", float(s), kinds[j]) for j, s in zip(others, scores, strict=True)]
        rows.append((f"i{i}", kinds[i], groups[i], found))
    return rows


def summarize(parts: list[list[Row]], spec: EvaluateSpec = SPEC) -> dict[str, Any]:
    """Every part by itself, merged in the given order."""
    merged, first_row = Summary(), 0
    for rows in parts:
        summary = Summary()
        summary.add(neighbors(rows, first_row), spec)
        merged.merge(summary, spec.examples)
        first_row += len(rows)
    return merged.document(spec)


def naive_rates(rows: list[Row], of: list[Row], k: int) -> tuple[int, float, float]:
    """Queries with a right answer, and hits at 1 and k, among `rows` of the catalogue `of`."""
    often = Counter(kind for _, kind, _, _ in of if kind is not None)
    known = [row for row in rows if row[1] is not None and often[row[1]] > 1]
    at_1 = sum(any(n[2] == row[1] for n in row[3][:1]) for row in known)
    at_k = sum(any(n[2] == row[1] for n in row[3][:k]) for row in known)
    share = 1 / len(known) if known else 0.0
    return len(known), at_1 * share, at_k * share


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("truth_k", [1, 3, 5])
def test_hit_rates_are_those_of_a_naive_count(seed: int, truth_k: int) -> None:
    rows = catalogue(60, seed)
    spec = EvaluateSpec(truth="kind", truth_k=truth_k, group_by="group", columns=("kind",))
    document = summarize([rows[:20], rows[20:]], spec)
    queries, at_1, at_k = naive_rates(rows, rows, truth_k)
    assert 0 < queries < 60
    assert document["truth"]["column"] == "kind"
    assert document["truth"]["k"] == truth_k
    assert document["truth"]["queries"] == queries
    assert document["truth"]["hit_rate_at_1"] == pytest.approx(at_1, abs=1e-12)
    assert document["truth"]["hit_rate_at_k"] == pytest.approx(at_k, abs=1e-12)
    for group in document["groups"]:
        own = [row for row in rows if row[2] == group["name"]]
        answerable, at_1, at_k = naive_rates(own, rows, truth_k)
        assert group["queries"] == len(own)
        assert answerable > 0
        assert group["hit_rate_at_1"] == pytest.approx(at_1, abs=1e-12)
        assert group["hit_rate_at_k"] == pytest.approx(at_k, abs=1e-12)
        top = [row[3][0][1] if row[3] else 0.0 for row in own]
        assert group["mean_top_score"] == pytest.approx(sum(top) / len(top), abs=1e-9)
    assert sum(group["queries"] for group in document["groups"]) == 60


def test_a_query_without_a_value_or_alone_with_it_is_not_asked() -> None:
    rows: list[Row] = [
        ("i0", "x", "a", [("i1", 0.9, "x")]),
        ("i1", "x", "a", [("i2", 0.8, None)]),
        ("i2", None, "a", [("i3", 0.8, None)]),
        ("i3", "alone", "b", [("i0", 0.1, "x")]),
    ]
    document = summarize([rows])
    assert document["truth"]["queries"] == 2
    assert document["truth"]["hit_rate_at_1"] == 0.5
    a, b = document["groups"]
    assert (a["name"], a["queries"], a["hit_rate_at_1"]) == ("a", 3, 0.5)
    # Nothing could have been right in this group: no rate, rather than a rate of 0.
    assert (b["name"], b["hit_rate_at_1"], b["hit_rate_at_k"]) == ("b", None, None)


def test_values_are_counted_over_all_parts() -> None:
    rows: list[Row] = [("i0", "x", None, [("i1", 0.9, "x")]), ("i1", "x", None, [("i0", 0.9, "x")])]
    document = summarize([rows[:1], rows[1:]])
    assert document["truth"]["queries"] == 2
    assert document["truth"]["hit_rate_at_1"] == 1.0


def test_groups_come_largest_first_and_then_by_name() -> None:
    groups = ["b", "a", None, "c", "c", None]
    rows: list[Row] = [(f"i{i}", None, group, []) for i, group in enumerate(groups)]
    names = [group["name"] for group in summarize([rows])["groups"]]
    assert names == ["c", None, "a", "b"]


def test_without_truth_and_groups_there_is_one_nameless_group() -> None:
    rows = catalogue(20)
    document = summarize([rows], EvaluateSpec(columns=("kind",)))
    assert document["truth"] is None
    assert document["group_by"] is None
    (group,) = document["groups"]
    assert (group["name"], group["queries"]) == (None, 20)
    assert (group["hit_rate_at_1"], group["hit_rate_at_k"]) == (None, None)


def test_the_histogram_counts_best_scores() -> None:
    scores = [-0.3, 0.0, 0.049, 0.05, 0.5, 0.99, 1.0, 1.0000001]
    rows: list[Row] = [(f"i{i}", None, None, [("i0", s, None)]) for i, s in enumerate(scores)]
    rows.append(("i99", None, None, []))
    histogram = summarize([rows])["scores"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1 == 21
    assert (histogram["edges"][0], histogram["edges"][1], histogram["edges"][-1]) == (0.0, 0.05, 1.0)
    filled = {i: n for i, n in enumerate(histogram["counts"]) if n}
    # Below 0 counts in the first bin; a query without neighbours in none.
    assert filled == {0: 3, 1: 1, 10: 1, 19: 3}


def test_the_order_of_the_parts_changes_nothing() -> None:
    rows = catalogue(50, seed=3)
    cuts = [rows[:7], rows[7:8], rows[8:30], rows[30:]]
    starts = [0, 7, 8, 30]
    documents = set()
    for order in itertools.permutations(range(4)):
        merged = Summary()
        for i in order:
            summary = Summary()
            summary.add(neighbors(cuts[i], starts[i]), SPEC)
            merged.merge(summary, SPEC.examples)
        documents.add(json.dumps(merged.document(SPEC), sort_keys=True))
    whole = Summary()
    whole.add(neighbors(rows), SPEC)
    documents.add(json.dumps(whole.document(SPEC), sort_keys=True))
    assert len(documents) == 1


@given(st.lists(st.integers(0, 30), max_size=5), st.randoms(use_true_random=False))
def test_any_cut_and_any_tree_of_merges_gives_the_same(cuts: list[int], random: Any) -> None:
    rows = catalogue(30, seed=1)
    # Equal scores everywhere: only ids may decide then.
    rows = [(a, b, c, [(i, 0.5, kind) for i, _, kind in found]) for a, b, c, found in rows]
    edges = sorted({0, 30, *cuts})
    summaries = []
    for start, stop in itertools.pairwise(edges):
        summary = Summary()
        summary.add(neighbors(rows[start:stop], start), SPEC)
        summaries.append(summary)
    while len(summaries) > 1:
        random.shuffle(summaries)
        summaries[0].merge(summaries.pop(), SPEC.examples)
    assert json.dumps(summaries[0].document(SPEC)) == json.dumps(summarize([rows]))


@pytest.mark.parametrize("examples", [0, 1, 3])
def test_examples_of_each_kind_are_few_in_each_group(examples: int) -> None:
    rows = catalogue(80, seed=2)
    spec = EvaluateSpec(truth="kind", truth_k=3, group_by="group", examples=examples, columns=("kind",))
    document = summarize([rows[:40], rows[40:]], spec)
    counts = Counter((e["group"], e["kind"]) for e in document["examples"])
    if examples == 0:
        assert counts == {}
    else:
        assert set(counts) == {(g["name"], kind) for g in document["groups"] for kind in KINDS}
        assert set(counts.values()) == {examples}


def test_examples_show_what_is_good_and_what_is_bad() -> None:
    rows: list[Row] = [
        ("i0", "x", "g", [("i1", 0.6, "x")]),
        ("i1", "x", "g", [("i0", 0.9, "x")]),
        ("i2", "x", "g", [("i3", 0.95, "y"), ("i0", 0.9, "x")]),
        ("i3", "y", "g", [("i0", 0.99, "x")]),
        ("i4", "y", "g", [("i0", 0.2, "x")]),
        ("i5", "y", "g", []),
    ]
    found: dict[str, list[str]] = {}
    for example in summarize([rows])["examples"]:
        found.setdefault(example["kind"], []).append(example["query"]["image_id"])
    assert found["best"] == ["i1", "i0"]
    assert found["worst"] == ["i5", "i4"]
    assert len(found["typical"]) == 2


def test_an_example_carries_what_the_page_shows() -> None:
    found = [("i7", 0.5, "x"), ("i8", 0.25, "y"), ("i9", 0.125, None)]
    rows: list[Row] = [("i0", "x", "g", found)]
    example = summarize([rows])["examples"][0]
    assert example["query"] == {"image_id": "i0", "row": 0, "columns": {"kind": "x"}}
    assert [n["right"] for n in example["neighbors"]] == [True, False, False]
    assert example["neighbors"][0] == {
        "image_id": "i7",
        "row": 7,
        "score": 0.5,
        "right": True,
        "columns": {"kind": "x"},
    }


def test_an_example_shows_the_first_ten_neighbours() -> None:
    found = [(f"i{i}", 1 - i / 100, None) for i in range(1, 30)]
    example = summarize([[("i0", None, "g", found)]])["examples"][0]
    assert [n["image_id"] for n in example["neighbors"]] == [f"i{i}" for i in range(1, 11)]
    assert {n["right"] for n in example["neighbors"]} == {None}


def test_the_document_is_plain_json() -> None:
    document = summarize([catalogue(40)])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert all(math.isfinite(group["mean_top_score"]) for group in document["groups"])


def test_nothing_gives_an_empty_document() -> None:
    document = summarize([[]])
    assert document["groups"] == []
    assert document["examples"] == []
    assert sum(document["scores"]["counts"]) == 0
    assert document["truth"]["queries"] == 0


def test_rows_are_counted_by_the_values_that_recall_is_listed_by() -> None:
    rows = catalogue(40)
    spec = dataclasses.replace(SPEC, recall_by="group")
    parts = [Summary(), Summary()]
    for summary, chosen in zip(parts, (rows[:13], rows[13:]), strict=True):
        summary.add(neighbors(chosen), spec)
    parts[0].merge(parts[1], spec.examples)
    assert parts[0].values == Counter(group for _, _, group, _ in rows)
    assert sum(parts[0].values.values()) == 40
