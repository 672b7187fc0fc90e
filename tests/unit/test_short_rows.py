"""Rows with too few neighbours: settled by counting, or searched again over more lists."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import manifests
from index_builder.index.shards import IndexDataset
from index_builder.index.spec import IndexSpec
from index_builder.rules.conditions import Condition
from index_builder.rules.rules import JoinRules
from index_builder.search.join import JoinSpec, find_neighbors, join_queries, read_index_queries
from index_builder.search.neighbors import MARGIN
from index_builder.search.short_rows import (
    count_all,
    lists_at_most,
    merge_counts,
    most_possible,
    needs_counts,
    search_again,
    with_first_probes,
)
from index_builder.steps import joining
from index_builder.steps.joining import JoinTask, finish_part, first_pass, join_part
from tests.index_fixtures import (
    Catalogue,
    build_index,
    found_neighbors,
    gaussian_catalogue,
    join_all,
)
from tests.unit.rules_for_tests import expected, several_images

LISTS = 12
NPROBE = 2


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """Items of one to three images; of brand `c` and of size 4 there are few."""
    return several_images(140, 16, seed=1)


@pytest.fixture(scope="module")
def index(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    """Two lists of twelve are probed."""
    request = IndexSpec(nlist=LISTS, nprobe=NPROBE, shards=3)
    return build_index(tmp_path_factory.mktemp("index"), catalogue, request)


def joined(index: IndexDataset, folder: Path, spec: JoinSpec) -> tuple[pa.Table, list[manifests.Part]]:
    """Runs both passes of all tasks; returns the rows and the parts."""
    task = JoinTask(index.folder, spec, str(folder), "key")
    counts = count_all(index, spec.rules)
    parts = [join_part(task, number, counts) for number in range(index.layout.shards)]
    return read(folder, parts), parts


def read(folder: Path, parts: list[manifests.Part]) -> pa.Table:
    return pa.concat_tables([pq.read_table(folder / f"{part.name}.parquet") for part in parts])


RULES = [
    JoinRules(),
    JoinRules(candidates=(Condition("size", equals=4),)),
    JoinRules(same=("brand",)),
    JoinRules(same=("size",), candidates=(Condition("brand", one_of=("a", "b")),)),
    JoinRules(candidates=(Condition("size", at_most=2),), max_per=(("brand", 2),)),
    JoinRules(queries=(Condition("brand", equals="c"),), same=("brand",), different=("size",)),
    JoinRules(max_per=(("brand", 1),), different=("brand",)),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("max_probe", [None, 0, 5, 100])
def test_short_rows_are_searched_again_and_say_why_they_stay_short(
    rules: JoinRules, max_probe: int | None, index: IndexDataset, catalogue: Catalogue, tmp_path: Path
) -> None:
    k = 14
    spec = JoinSpec(k, rules, max_probe=max_probe)
    table, parts = joined(index, tmp_path, spec)
    first = expected(index, catalogue, rules, k, NPROBE)
    lists = {None: 4 * NPROBE, 0: NPROBE, 5: 5, 100: LISTS}[max_probe]
    wider = expected(index, catalogue, rules, k, lists)
    whole = expected(index, catalogue, rules, k)
    assert table["query_id"].to_pylist() == join_all(index, spec)["query_id"].to_pylist()
    found = found_neighbors(table)
    assert set(found) == set(first)
    statuses = dict(zip(table["query_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    for query, row in found.items():
        # A row that was short is that of the wider search, unless it has all there can be already.
        if len(first[query][0]) == k:
            assert row == first[query]
        else:
            assert row in ((first[query], wider[query]) if row == whole[query] else (wider[query],))
        filled, complete = len(row[0]) == k, len(row[0]) == len(whole[query][0])
        assert statuses[query] == ("filled" if filled else "exhausted" if complete else "capped")
    totals = {name: sum(part.properties[name] for part in parts) for name in ("filtered", "widened")}
    assert totals["filtered"] == len(catalogue) - len(found)
    short = sum(len(row[0]) < k for row in first.values())
    assert totals["widened"] <= short
    assert max_probe != 0 or totals["widened"] == 0


def test_single_images_and_equal_values_are_counted_exactly(tmp_path: Path) -> None:
    base = gaussian_catalogue(90, 12, seed=2)
    brands: list[str | None] = [f"b{row % 9}" if row % 10 else None for row in range(90)]
    catalogue = Catalogue(base.vectors, base.image_ids, brands=brands, sizes=base.sizes)
    index = build_index(tmp_path / "i", catalogue, IndexSpec(nlist=8, nprobe=7, shards=3))
    rules = JoinRules(same=("brand",), candidates=(Condition("size", is_null=False),))
    spec = JoinSpec(20, rules)
    table, parts = joined(index, tmp_path / "n", spec)
    whole = expected(index, catalogue, rules, 20)
    rows = found_neighbors(table)
    probed = found_neighbors(join_all(index, spec))
    # Nobody has twenty. Only a row that lacks some is searched again.
    assert set(table["status"].to_pylist()) == {"exhausted"}
    assert rows == whole
    lacking = sum(len(probed[query][0]) < len(whole[query][0]) for query in whole)
    assert 0 < lacking == sum(part.properties["widened"] for part in parts) < 90


@pytest.mark.parametrize(
    "rules", [JoinRules(same=("brand",)), JoinRules(candidates=(Condition("brand", equals="b0"),))]
)
def test_the_best_image_of_an_item_is_looked_for_though_another_was_found(
    rules: JoinRules, tmp_path: Path
) -> None:
    # Eight items of ten images each that lie anywhere, four items a brand: in one shard the sums of
    # items are what there is, but not of images.
    base = gaussian_catalogue(80, 12, seed=3)
    items = [f"item{row % 8}" for row in range(80)]
    brands: list[str | None] = [f"b{row % 2}" for row in range(80)]
    catalogue = Catalogue(base.vectors, base.image_ids, item_ids=items, brands=brands, sizes=base.sizes)
    index = build_index(tmp_path / "i", catalogue, IndexSpec(nlist=8, nprobe=4, shards=1))
    table, parts = joined(index, tmp_path / "n", JoinSpec(20, rules, max_probe=8))
    whole, probed = (expected(index, catalogue, rules, 20, lists) for lists in (None, 4))
    complete = [name for name in whole if len(probed[name][0]) == len(whole[name][0])]
    assert any(probed[name] != whole[name] for name in complete)
    assert found_neighbors(table) == whole
    assert set(table["status"].to_pylist()) == {"exhausted"}
    assert sum(part.properties["widened"] for part in parts) == 80


def test_counts_are_upper_bounds_for_items_with_several_images(
    index: IndexDataset, catalogue: Catalogue
) -> None:
    for rules in RULES:
        counts = count_all(index, rules)
        assert (counts is not None) == needs_counts(rules)
        whole = expected(index, catalogue, dataclasses.replace(rules, queries=()), 1000)
        for number in range(index.layout.shards):
            stored = read_index_queries(index, number, JoinSpec(1, rules))
            most = most_possible(index, stored.table, rules, counts, indexed=True)
            ids = stored.table["image_id"].to_pylist()
            assert all(len(whole[name][0]) <= bound for name, bound in zip(ids, most, strict=True))
            assert (most < len(catalogue)).all()


def test_counts_of_shards_add_up_in_any_order() -> None:
    blocks = [
        pa.table({"brand": ["a", "b"], "candidates": [2, 3]}),
        pa.table({"brand": pa.array([], pa.string()), "candidates": pa.array([], pa.int64())}),
        pa.table({"brand": ["b"], "candidates": [5]}),
    ]
    for order in ((0, 1, 2), (2, 1, 0)):
        merged = merge_counts([merge_counts([blocks[i]]) for i in order])
        found = dict(zip(*(merged[name].to_pylist() for name in ("brand", "candidates")), strict=True))
        assert found == {"a": 2, "b": 8}
    assert merge_counts([pa.table({"candidates": [2]}), pa.table({"candidates": [3]})]).to_pylist() == [
        {"candidates": 5}
    ]


def test_how_many_lists_a_second_search_probes(index: IndexDataset) -> None:
    wanted = {None: 8, 0: 0, 1: 0, 2: 0, 3: 3, 12: 12, 500: 12}
    assert {given: lists_at_most(index, JoinSpec(1, max_probe=given)) for given in wanted} == wanted


def test_a_part_that_was_interrupted_between_the_passes_gets_the_same_bytes(
    index: IndexDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JoinSpec(14, RULES[4], ("brand",), evidence=(MARGIN,))
    _, parts = joined(index, tmp_path / "whole", spec)
    assert any(part.properties["widened"] for part in parts)
    task = JoinTask(index.folder, spec, str(tmp_path / "killed"), "key")
    counts = count_all(index, spec.rules)
    for number in range(3):
        assert first_pass(task, number) == number
    scratch = sorted(path.name for path in (tmp_path / "killed" / "_work").iterdir())
    assert scratch == [f"first-part-{number:05d}-key.parquet" for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(joining, "join_queries", None)  # The first search is not repeated.
        again = [finish_part(task, first_pass(task, number), counts) for number in range(3)]
        assert again == parts
    with monkeypatch.context() as patch:
        patch.setattr(joining, "search_again", None)  # Nor is the second.
        assert [join_part(task, number, counts) for number in range(3)] == parts
    for part in parts:
        name = f"{part.name}.parquet"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_rows_that_were_filled_and_their_order_stay(index: IndexDataset) -> None:
    spec = JoinSpec(4, JoinRules(same=("size",)), ("brand",))
    stored = read_index_queries(index, 1, spec)
    first = join_queries(index, stored, spec)
    table, widened = search_again(index, stored, spec, first, count_all(index, spec.rules))
    assert 0 < widened < len(table)
    assert table["query_row"].equals(first["query_row"])
    filled = np.flatnonzero(np.asarray(first["status"].to_pylist()) == "filled")
    assert table.take(filled).equals(first.take(filled))


def test_some_queries_are_found_as_all_are(index: IndexDataset) -> None:
    spec = JoinSpec(6, columns=("brand",))
    stored = read_index_queries(index, 2, spec)
    places = np.asarray([0, 3, 4, len(stored.table) - 1])
    some = find_neighbors(index, stored, spec, places, stored.probes[places])
    assert some.equals(join_queries(index, stored, spec).take(places))


def test_a_wider_search_keeps_the_lists_of_the_first() -> None:
    wider = np.asarray([[4, 1, 2, 0], [4, 2, 0, 3], [7, 6, 5, 4]], dtype=np.int32)
    first = np.asarray([[4, 1], [4, 9], [1, 2]], dtype=np.int32)
    found = with_first_probes(wider, first)
    assert found.tolist() == [[4, 1, 2, 0], [4, 9, 2, 0], [1, 2, 7, 6]]
    assert found.dtype == np.int32
