"""How many neighbours a query can have: counted from rule columns, and by a loop over all pairs."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.index.spec import IndexSpec
from index_builder.rules.conditions import Condition
from index_builder.rules.exclusions import ExclusionSpec, IdShards, find_exclusions, prepare_exclusions
from index_builder.rules.rules import JoinRules
from index_builder.search import candidate_counts
from index_builder.search.candidate_counts import count_possible
from index_builder.search.join import JoinSpec, read_index_queries
from index_builder.search.short_rows import count_all, most_possible, sums_are_exact
from index_builder.steps.joining import JoinTask, join_part
from tests.index_fixtures import Catalogue, build_index, gaussian_catalogue
from tests.unit.rules_for_tests import expected, several_images
from tests.unit.test_exclusions import write_pairs

NPROBE, LISTS = 2, 12


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """Items of one to three images; sizes differ among the images of an item."""
    return several_images(140, 16, seed=1)


@pytest.fixture(scope="module")
def index(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    request = IndexSpec(nlist=LISTS, nprobe=NPROBE, shards=3)
    return build_index(tmp_path_factory.mktemp("index"), catalogue, request)


RULES = [
    JoinRules(),
    JoinRules(different=("brand",)),
    JoinRules(same=("brand",), different=("size",)),
    JoinRules(same=("brand", "size")),
    JoinRules(max_per=(("brand", 2),)),
    JoinRules(max_per=(("brand", 3),), different=("size",), same=("size",)),
    JoinRules(candidates=(Condition("size", at_least=3),), different=("brand", "size")),
    JoinRules(queries=(Condition("size", equals=1),), max_per=(("brand", 1),), same=("brand",)),
]


def some_pairs(catalogue: Catalogue, by: str) -> list[tuple[str, str]]:
    values = [value for value in catalogue.columns()[by] if value is not None]
    places = np.random.default_rng(5).integers(len(values), size=(900, 2))
    return sorted({(values[a], values[b]) for a, b in places.tolist()})


@pytest.mark.parametrize("by", [None, "image_id", "item_id", "brand"])
@pytest.mark.parametrize("rules", RULES)
def test_statuses_and_counts_are_those_of_a_loop_over_all_pairs(
    rules: JoinRules, by: str | None, index: IndexDataset, catalogue: Catalogue, tmp_path: Path
) -> None:
    k, pairs = 9, list[tuple[str, str]]()
    spec = JoinSpec(k, rules, max_probe=4)
    if by is not None:
        pairs = some_pairs(catalogue, by)[: 4 if by == "brand" else None]
        paths = (write_pairs(tmp_path / "pairs.parquet", pairs),)
        files = find_exclusions(ExclusionSpec(paths, by, symmetric=by == "item_id"))
        ids = IdShards(
            index.layout.shards,
            lambda number: read_shard_table(index, number, (by,))[by].combine_chunks(),
        )
        prepare_exclusions(files, str(tmp_path / "exclusions"), "identity", ids)
        rules = dataclasses.replace(rules, exclude=files.rule())
        spec = JoinSpec(k, rules, max_probe=4, exclusions=str(tmp_path / "exclusions"))
    task, counts = JoinTask(index.folder, spec, str(tmp_path / "n"), "key"), count_all(index, rules)
    parts = [join_part(task, number, counts) for number in range(index.layout.shards)]
    whole = expected(index, catalogue, rules, k, excluded=pairs)
    wider = expected(index, catalogue, rules, k, 4, excluded=pairs)
    table = pa.concat_tables([pq.read_table(tmp_path / "n" / f"{part.name}.parquet") for part in parts])
    for name, found, status in zip(
        *(table[name].to_pylist() for name in ("query_id", "neighbor_ids", "status")), strict=True
    ):
        assert len(found) == len(wider[name][0])
        complete = len(found) == len(whole[name][0])
        assert status == ("filled" if len(found) == k else "exhausted" if complete else "capped")

    # The same without any search, for every query.
    uncapped = expected(
        index,
        Catalogue(catalogue.vectors, catalogue.image_ids, None, catalogue.brands, catalogue.sizes),
        dataclasses.replace(rules, max_per=(), queries=()),
        1000,
        excluded=pairs,
    )
    everyone = expected(index, catalogue, dataclasses.replace(rules, queries=()), k, excluded=pairs)
    items = dict(zip(catalogue.image_ids, catalogue.columns()["item_id"], strict=True))
    for number in range(index.layout.shards):
        stored = read_index_queries(index, number, spec)
        possible = count_possible(index, stored.table, rules, k, stored.exclusions)
        ids = stored.table["image_id"].to_pylist()
        assert possible.neighbors.tolist() == [len(everyone[name][0]) for name in ids]
        if by != "item_id":  # There the fixture's catalogue without items has no such pairs.
            images = [sum(items[x] != items[name] for x in uncapped[name][0]) for name in ids]
            assert possible.images.tolist() == [min(k, count) for count in images]


def test_sums_are_exact_where_they_are_said_to_be(tmp_path: Path) -> None:
    base = gaussian_catalogue(90, 12, seed=2)
    index = build_index(tmp_path, base, IndexSpec(nlist=8, nprobe=2, shards=3))
    for rules in (JoinRules(), JoinRules(same=("brand",), candidates=(Condition("size", at_most=2),))):
        assert sums_are_exact(index, rules, indexed=True)
        counts = count_all(index, rules)
        for number in range(index.layout.shards):
            table = read_index_queries(index, number, JoinSpec(1, rules)).table
            most = most_possible(index, table, rules, counts, indexed=True)
            assert count_possible(index, table, rules, 1000).neighbors.tolist() == most.tolist()
    for rules in (JoinRules(different=("brand",)), JoinRules(max_per=(("brand", 1),))):
        assert not sums_are_exact(index, rules, indexed=True)
    assert not sums_are_exact(index, JoinRules(), indexed=False)


def test_what_is_kept_of_the_index_does_not_grow_with_it(tmp_path: Path) -> None:
    base = gaussian_catalogue(600, 8, seed=3)
    brands: list[str | None] = [f"b{row % 3}" for row in range(600)]
    catalogue = Catalogue(base.vectors, base.image_ids, brands=brands, sizes=base.sizes)
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=4, nprobe=1, shards=2))
    rules = JoinRules(different=("size",), max_per=(("brand", 1),))
    sizes: list[int] = []
    original = candidate_counts._representatives

    def noting(table, most):  # type: ignore[no-untyped-def]
        kept = original(table, most)
        sizes.append(len(kept))
        return kept

    queries = read_index_queries(index, 0, JoinSpec(1, rules)).table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate_counts, "_representatives", noting)
        possible = count_possible(index, queries, rules, 2)
    # Sizes 1, 2, 3 and null, three brands, three items of each.
    assert sizes == [36, 36]
    assert set(possible.neighbors.tolist()) == {2}
