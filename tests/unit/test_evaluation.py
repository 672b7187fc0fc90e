"""Recall, its lower bound, and hits on known right answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index_builder.errors import DatasetError
from index_builder.index.shards import IndexDataset
from index_builder.index.spec import IndexSpec
from index_builder.recall.evaluation import TruthHits, measure_recall, truth_ranks
from index_builder.recall.recall import Certificate, Promise
from index_builder.rules.conditions import Condition
from index_builder.rules.rules import JoinRules
from index_builder.search.join import JoinSpec, join_shard
from tests.index_fixtures import (
    Catalogue,
    brute_force,
    build_index,
    found_neighbors,
    gaussian_catalogue,
    scattered_ids,
    write_neighbors,
)

CATALOGUE = gaussian_catalogue(400, 24)
Damage = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    spec = IndexSpec(nlist=10, nprobe=10, shards=3)
    return build_index(tmp_path_factory.mktemp("exact"), CATALOGUE, spec)


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    spec = IndexSpec(nlist=10, nprobe=2, shards=3)
    return build_index(tmp_path_factory.mktemp("partial"), CATALOGUE, spec)


def measure(
    index: IndexDataset,
    folder: Path,
    spec: JoinSpec,
    sample: int = 150,
    seed: int = 0,
    damage: Damage = lambda table: table,
) -> Certificate:
    tables = [damage(join_shard(index, number, spec)) for number in range(index.layout.shards)]
    parts = write_neighbors(folder, tables)
    return measure_recall(index, str(folder), parts, spec, Promise(0.9, sample, seed))


RULES = [JoinRules(), JoinRules(same=("brand",)), JoinRules(different=("brand", "size"))]


@pytest.mark.parametrize("rules", RULES)
def test_an_exact_join_has_recall_one(exact: IndexDataset, rules: JoinRules, tmp_path: Path) -> None:
    recall = measure(exact, tmp_path / "n", JoinSpec(10, rules))
    assert recall.estimate == 1.0
    assert 0.97 < recall.lower_bound < 1.0
    assert (recall.queries, recall.rows, recall.k, recall.seed) == (150, 400, 10, 0)
    assert (recall.target, recall.confidence, recall.attempt) == (0.9, 0.95, 1)
    assert (recall.nprobe, recall.nlist) == (10, 10)
    # A catalogue of two samples is measured whole, which leaves nothing to chance.
    census = measure(exact, tmp_path / "all", JoinSpec(10, rules), sample=200)
    assert census.queries == 400
    assert census.lower_bound == census.estimate == 1.0


@pytest.mark.parametrize("rules", RULES)
def test_a_partial_join_is_measured_against_brute_force(
    partial: IndexDataset, rules: JoinRules, tmp_path: Path
) -> None:
    spec = JoinSpec(10, rules)
    recall = measure(partial, tmp_path / "n", spec, sample=400)
    exact = brute_force(partial, CATALOGUE, rules).neighbors(10)
    probed = brute_force(partial, CATALOGUE, rules, nprobe=2).neighbors(10)
    wanted = [
        len(set(exact[query][0]) & set(probed[query][0])) / len(exact[query][0])
        if exact[query][0]
        else 1
        for query in exact
    ]
    assert recall.estimate == pytest.approx(np.mean(wanted), abs=1e-12)
    assert recall.estimate < 0.9
    sampled = measure(partial, tmp_path / "s", spec)
    assert sampled.lower_bound < sampled.estimate
    assert abs(sampled.estimate - recall.estimate) < 0.1


def keep_first(table: pa.Table, kept: int) -> pa.Table:
    """A join that lost all but the first neighbours of every row."""
    for name in ("neighbor_ids", "scores", "neighbor_rows"):
        column = [values[:kept] for values in table[name].to_pylist()]
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(name), pa.array(column, table[name].type))
    return table


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_lost_neighbors_are_counted(exact: IndexDataset, kept: int, tmp_path: Path) -> None:
    recall = measure(exact, tmp_path / "n", JoinSpec(10), damage=lambda t: keep_first(t, kept))
    assert recall.estimate == pytest.approx(kept / 10)
    assert recall.lower_bound <= recall.estimate


def test_each_seed_has_a_sample_of_its_own(exact: IndexDataset, tmp_path: Path) -> None:
    spoilt = set(list(CATALOGUE.image_ids)[::2])

    def spoil(table: pa.Table) -> pa.Table:
        lost = keep_first(table, 5)
        rows = [
            (lost if name in spoilt else table).slice(place, 1)
            for place, name in enumerate(table["query_id"].to_pylist())
        ]
        return pa.concat_tables(rows)

    found = [
        measure(exact, tmp_path / f"{i}", JoinSpec(10), sample=40, seed=seed, damage=spoil).estimate
        for i, seed in enumerate([5, 5, 6, 7, 8])
    ]
    assert found[0] == found[1]
    assert len(set(found)) > 2
    assert all(0.6 < estimate < 0.9 for estimate in found)


def test_wrong_rows_and_lost_queries_are_not_right(exact: IndexDataset, tmp_path: Path) -> None:
    def shift(table: pa.Table) -> pa.Table:
        # Rows that are not the neighbours, under the scores of those that are.
        wrong = [[row + 400 for row in rows] for rows in table["neighbor_rows"].to_pylist()]
        position = table.schema.get_field_index("neighbor_rows")
        return table.set_column(
            position, table.schema.field(position), pa.array(wrong, table["neighbor_rows"].type)
        )

    recall = measure(exact, tmp_path / "wrong", JoinSpec(10), sample=400, damage=shift)
    # Only the last place passes: its score ties with that of the right one.
    assert recall.estimate == pytest.approx(0.1)
    lost = measure(exact, tmp_path / "lost", JoinSpec(10), sample=400, damage=lambda t: t.slice(1))
    assert lost.estimate == pytest.approx(1 - exact.layout.shards / 400)


def test_rules_say_who_is_a_query(exact: IndexDataset, tmp_path: Path) -> None:
    rules = JoinRules(queries=(Condition("brand", equals="a"),))
    recall = measure(exact, tmp_path / "n", JoinSpec(10, rules), sample=400)
    assert CATALOGUE.brands is not None
    assert recall.queries == recall.rows == CATALOGUE.brands.count("a")
    assert recall.estimate == recall.lower_bound == 1.0
    nobody = JoinRules(queries=(Condition("brand", equals="zzz"),))
    with pytest.raises(DatasetError, match=r"no recall to measure: join\.rules\.queries let none"):
        measure(exact, tmp_path / "none", JoinSpec(10, nobody))


def test_another_neighbor_of_the_same_score_is_right(tmp_path: Path) -> None:
    # Signs of 8 numbers: many rows tie for the last place, and the damage swaps them.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(120, 8))
    catalogue = Catalogue(signs, scattered_ids(120))
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=4, nprobe=4, shards=2))
    query = catalogue.image_ids[0]
    ids, scores = brute_force(index, catalogue).neighbors(119)[query]
    last_tied = [image_id for image_id, score in zip(ids, scores, strict=True) if score == scores[9]][
        -1
    ]

    def swap(table: pa.Table) -> pa.Table:
        rows = zip(table["query_id"].to_pylist(), table["neighbor_ids"].to_pylist(), strict=True)
        swapped = [[*found[:9], last_tied] if name == query else found for name, found in rows]
        place = table.schema.get_field_index("neighbor_ids")
        column = pa.array(swapped, table["neighbor_ids"].type)
        return table.set_column(place, table.schema.field(place), column)

    tables = [join_shard(index, number, JoinSpec(10)) for number in range(2)]
    assert found_neighbors(pa.concat_tables(tables))[query][0][9] != last_tied
    recall = measure(index, tmp_path / "n", JoinSpec(10), sample=120, damage=swap)
    assert recall.estimate == 1.0


def test_a_query_without_eligible_neighbors_counts_as_right(tmp_path: Path) -> None:
    base = gaussian_catalogue(30, 16)
    brands: list[str | None] = [None] * 15 + ["a"] * 15
    catalogue = Catalogue(base.vectors, base.image_ids, brands=brands)
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=2, nprobe=2, shards=2))
    spec = JoinSpec(20, JoinRules(same=("brand",)))
    recall = measure(index, tmp_path / "n", spec, sample=30)
    assert recall.estimate == 1.0
    # Fewer than k are eligible for the others; losing half of those counts.
    halved = measure(index, tmp_path / "h", spec, sample=30, damage=lambda t: keep_first(t, 7))
    assert halved.estimate == pytest.approx(0.5 + 0.5 * 7 / 14)


def test_truth_ranks() -> None:
    table = pa.table(
        {
            "query_object": ["a", "a", "b", None, "c"],
            "neighbor_object": [["a", "a"], ["b", "a"], ["a", None], [None, "a"], []],
        }
    )
    assert truth_ranks(table, "object").tolist() == [1, 2, 0, 0, 0]


def test_rates_of_hits() -> None:
    hits = TruthHits(queries=8, hits_at_1=2, hits_at_k=6, k=10)
    assert (hits.rate_at_1, hits.rate_at_k) == (0.25, 0.75)
    none = TruthHits(0, 0, 0, 10)
    assert (none.rate_at_1, none.rate_at_k) == (0.0, 0.0)
