"""Recall, its lower bound, and hits on known right answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.evaluation import Recall, TruthHits, lower_bound, measure_recall, truth_ranks
from index_builder.join import JoinSpec, join_shard
from index_builder.rules import JoinRules
from index_builder.sampling import sample_rows
from index_builder.shards import IndexDataset
from index_builder.spec import IndexSpec
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
) -> Recall:
    tables = [damage(join_shard(index, number, spec)) for number in range(index.layout.shards)]
    parts = write_neighbors(folder, tables)
    return measure_recall(index, str(folder), parts, spec, sample, seed)


RULES = [JoinRules(), JoinRules(same=("brand",)), JoinRules(different=("brand", "size"))]


@pytest.mark.parametrize("rules", RULES)
def test_an_exact_join_has_recall_one(exact: IndexDataset, rules: JoinRules, tmp_path: Path) -> None:
    recall = measure(exact, tmp_path / "n", JoinSpec(10, rules))
    assert recall.estimate == 1.0
    assert 0.97 < recall.lower_bound < 1.0
    assert (recall.queries, recall.rows, recall.k, recall.seed) == (150, 400, 10, 0)
    census = measure(exact, tmp_path / "all", JoinSpec(10, rules), sample=400)
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


def test_the_sample_is_the_one_of_the_seed(exact: IndexDataset, tmp_path: Path) -> None:
    spoilt = set(sample_rows(400, 40, seed=5)[::2].tolist())

    def spoil(table: pa.Table) -> pa.Table:
        lost = keep_first(table, 5)
        rows = [
            (lost if row in spoilt else table).slice(place, 1)
            for place, row in enumerate(table["query_row"].to_pylist())
        ]
        return pa.concat_tables(rows)

    recall = measure(exact, tmp_path / "n", JoinSpec(10), sample=40, seed=5, damage=spoil)
    assert recall.estimate == pytest.approx(0.75)
    again = measure(exact, tmp_path / "a", JoinSpec(10), sample=40, seed=6, damage=spoil)
    assert again.estimate > 0.9


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=60), st.integers(0, 10**6))
def test_bound_lies_between_zero_and_the_mean(values: list[float], more: int) -> None:
    sample = np.asarray(values)
    bound = lower_bound(sample, len(sample) + more)
    assert 0 <= bound <= sample.mean()
    if more == 0:
        assert bound == sample.mean()


def test_bound_of_a_thousand_perfect_queries() -> None:
    assert 0.996 < lower_bound(np.ones(1000), 10**6) < 0.997
    # The fewer are left unseen, the less can be wrong.
    bounds = [lower_bound(np.ones(1000), rows) for rows in (10**6, 1890, 1100, 1001)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 0.999


def test_bound_is_not_far_from_the_mean() -> None:
    sample = np.random.default_rng(0).random(2000) < 0.95
    assert 0.93 < lower_bound(sample.astype(float), 10**6) < sample.mean()
    # Little variance, little doubt.
    steady = np.random.default_rng(1).uniform(0.94, 0.96, size=2000)
    assert lower_bound(steady, 10**6) > 0.94 - 0.005


def test_bound_does_not_trust_the_order_of_the_sample() -> None:
    # Failures in the last lists of an index come last in a sample that is sorted by row. Betting
    # in that order would stop, satisfied, before it had seen any of them.
    sample = np.ones(1000)
    sample[-30:] = 0
    bound = lower_bound(sample, 10**6)
    assert bound < 0.965
    assert abs(bound - lower_bound(sample[::-1], 10**6)) < 0.01


@pytest.mark.parametrize(
    ("mean", "n", "population"),
    [(0.99, 1000, 10**9), (0.5, 100, 10**9), (0.99, 300, 1000)],
)
def test_coverage(mean: float, n: int, population: int) -> None:
    """The bound is below the truth in 95 % of runs, also where few queries fail."""
    rng = np.random.default_rng(0)
    covered = 0
    failing = round(population * (1 - mean))
    for _ in range(300):
        failures = rng.hypergeometric(failing, population - failing, n)
        # Sorted, as clustered failures may come.
        sample = np.concatenate([np.ones(n - failures), np.zeros(failures)])
        covered += lower_bound(sample, population) <= mean
    assert covered >= 0.95 * 300


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
