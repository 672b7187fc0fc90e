"""The exact search that recall is held against: naive scoring, ties, rules, metrics, parts."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from index_builder.datasets.table_files import TableSpec, open_table
from index_builder.index.transform import Transform
from index_builder.rules.conditions import Condition
from index_builder.rules.rules import ExclusionRule, JoinRules
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import round_float16, unit_float16
from index_builder.search.corpus import Corpus
from index_builder.search.exact_search import ExactSearch, merge_found, search_part, searchable_rules
from tests.index_fixtures import gaussian_catalogue, scattered_ids, write_embeddings

N, DIM, K = 700, 12, 6


def vectors(metric: Metric) -> NDArray[np.float16]:
    """Rows of small whole numbers: many copies and many ties; under cosine of unit length."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, size=(N, DIM)).astype(np.float64)
    rows[:, 0] += 0.5
    rows[50:60] = rows[40]
    return unit_float16(rows)[0] if metric is Metric.COSINE else round_float16(rows / 16)


def rule_table() -> pa.Table:
    ids = scattered_ids(N)
    return pa.table(
        {
            "image_id": ids,
            "item_id": [ids[row - row % 2] for row in range(N)],
            "brand": [(None, "a", "b", "c")[row // 2 % 4] for row in range(N)],
            "stock": [row % 3 for row in range(N)],
        }
    )


def naive_scores(codes: NDArray[np.float16], metric: Metric, unscale: float) -> NDArray[np.float32]:
    wide = codes.astype(np.float64)
    dots, norms = wide @ wide.T, (wide * wide).sum(axis=1)
    if metric is Metric.COSINE:
        return np.asarray(dots / np.sqrt(norms[:, None] * norms), dtype=np.float32)
    if metric is Metric.EUCLIDEAN:
        dots = 2 * dots - norms[:, None] - norms
    return np.asarray(dots * unscale, dtype=np.float32)


def naive(
    codes: NDArray[np.float16],
    table: pa.Table,
    rules: JoinRules,
    queries: range,
    metric: Metric,
    unscale: float,
    excluded: set[tuple[str, str]],
) -> list[list[tuple[str, float]]]:
    rows, scores = table.to_pylist(), naive_scores(codes, metric, unscale)
    found = []
    for q in queries:
        kept: list[tuple[str, float]] = []
        seen: dict[Any, int] = {}
        for x in sorted(range(N), key=lambda x: (-scores[q, x], rows[x]["image_id"].encode())):
            query, row = rows[q], rows[x]
            allowed = query["item_id"] != row["item_id"]
            allowed &= all(query[c] is not None and query[c] == row[c] for c in rules.same)
            allowed &= all(query[c] is None or query[c] != row[c] for c in rules.different)
            allowed &= all(row[c.column] >= c.at_least for c in rules.candidates)
            allowed &= (query["image_id"], row["image_id"]) not in excluded
            counted = [("item", row["item_id"], 1)]
            counted += [
                (name, row[name], most) for name, most in rules.max_per if row[name] is not None
            ]
            if not allowed or any(seen.get((n, v), 0) >= most for n, v, most in counted):
                continue
            for name, value, _ in counted:
                seen[name, value] = seen.get((name, value), 0) + 1
            kept.append((row["image_id"], float(scores[q, x])))
            if len(kept) == K:
                break
        found.append(kept)
    return found


RULES = [
    JoinRules(),
    JoinRules(same=("brand",), candidates=(Condition("stock", at_least=1),)),
    JoinRules(different=("brand",)),
    JoinRules(max_per=(("brand", 2),)),
    JoinRules(exclude=ExclusionRule(("token",))),
]


@pytest.mark.parametrize("rules", RULES, ids=["none", "same", "different", "cap", "excluded"])
@pytest.mark.parametrize("metric", list(Metric))
def test_it_finds_what_naive_scoring_finds(metric: Metric, rules: JoinRules) -> None:
    codes, table, unscale = vectors(metric), rule_table(), 1.0 if metric is Metric.COSINE else 256.0
    queries = range(30, 90)
    ids = table["image_id"].to_pylist()
    pairs = [(ids[q], ids[x]) for q in queries for x in range(0, N, 3)] if rules.exclude else []
    excluded = pa.table({"query_id": [q for q, _ in pairs], "neighbor_id": [x for _, x in pairs]})
    search = ExactSearch(
        codes[queries.start : queries.stop],
        table.slice(queries.start, len(queries)),
        K,
        rules,
        metric,
        unscale,
        excluded if pairs else None,
    )
    wanted = naive(codes, table, rules, queries, metric, unscale, set(pairs))
    order = np.random.default_rng(1).permutation(N)
    whole = search.search([(table, codes)])
    shuffled = search.search([(table.take(pa.array(order)), codes[order])])
    parts = [
        search.search([(table.slice(a, b - a), codes[a:b])])
        for a, b in itertools.pairwise([0, 1, 300, 650, N])
    ]
    merged = merge_found([merge_found(parts[2:], K, rules), *parts[:2]], K, rules)
    for found in (whole, shuffled, merged):
        lists: list[list[tuple[str, float]]] = [[] for _ in queries]
        for row in found.to_pylist():
            lists[row["query"]].append((row["image_id"], row["score"]))
        assert lists == wanted


def test_a_part_is_searched_with_the_columns_of_a_table(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(240, 8, duplicates=0.1)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=3)
    stock = {"id": catalogue.image_ids[::2], "shop": [("x", "y")[row % 2] for row in range(120)]}
    pq.write_table(pa.table(stock), tmp_path / "stock.parquet")
    spec = TableSpec((str(tmp_path / "stock.parquet"),), "image_id", "id", (("shop", "string"),))
    corpus = Corpus(str(tmp_path / "e"), tuple(parts), open_table(spec))
    assert {"image_id", "brand", "shop"} <= set(corpus.columns)
    rules = JoinRules(same=("shop",), different=("group",), exclude=ExclusionRule(("token",)))
    kept = searchable_rules(rules, corpus.columns)
    assert kept == JoinRules(same=("shop",))
    queries = corpus.read_rows(0, np.asarray([0, 2, 3]), kept.query_columns)
    assert queries["shop"].to_pylist() == ["x", "y", None]
    tables = [search_part(corpus, n, queries, 5, kept, Transform()) for n in range(3)]
    found = merge_found(tables, 5, kept)
    assert np.bincount(found["query"].to_numpy(), minlength=3).tolist() == [5, 5, 0]
    shops = dict(zip(stock["id"], stock["shop"], strict=True))
    assert {shops[row["image_id"]] for row in found.to_pylist() if row["query"] == 1} == {"y"}
    for row in found.to_pylist():
        taken = corpus.read_rows(row["part"], np.asarray([row["row"]]), ())
        assert taken["image_id"].to_pylist() == [row["image_id"]]


def test_a_part_without_rows_has_no_neighbours(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(2, 8)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=3)
    assert [part.rows for part in parts].count(0) == 1
    corpus = Corpus(str(tmp_path / "e"), tuple(parts))
    queries = pa.concat_tables(
        corpus.read_rows(n, np.arange(part.rows), ("item_id",)) for n, part in enumerate(parts)
    )
    rules = JoinRules()
    tables = [search_part(corpus, n, queries, 5, rules, Transform()) for n in range(3)]
    found = merge_found(tables, 5, rules)
    assert found["image_id"].to_pylist() == catalogue.image_ids[::-1]
