"""Joins under rules against the loop that applies the rules first: ids, score bits and order."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index_builder import library
from index_builder.errors import ConfigError
from index_builder.index.shards import IndexDataset, open_index, read_shard_table
from index_builder.index.spec import IndexSpec
from index_builder.rules.conditions import Condition
from index_builder.rules.exclusions import ExclusionSpec, IdShards, find_exclusions, prepare_exclusions
from index_builder.rules.rules import JoinRules, RuleEncoder
from index_builder.search import join
from index_builder.search.join import JoinSpec
from index_builder.search.neighbors import MARGIN
from tests.index_fixtures import (
    Catalogue,
    build_index,
    found_neighbors,
    join_all,
    parquet_bytes,
    scattered_ids,
)
from tests.unit.rules_for_tests import expected, margins, several_images
from tests.unit.test_exclusions import write_pairs

LISTS = 9
NPROBE = 3


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """About eighty items of one to three images, four brands (one is null), sizes 0 to 4."""
    return several_images(160, 24)


@pytest.fixture(scope="module")
def whole(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    """All lists are probed."""
    request = IndexSpec(nlist=LISTS, nprobe=LISTS, shards=3)
    return build_index(tmp_path_factory.mktemp("whole"), catalogue, request)


@pytest.fixture(scope="module")
def partial(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    """Three lists of nine are probed."""
    request = IndexSpec(nlist=LISTS, nprobe=NPROBE, shards=3)
    return build_index(tmp_path_factory.mktemp("partial"), catalogue, request)


SMALL = Condition("size", at_most=2)
RULES = [
    JoinRules(),
    JoinRules(candidates=(SMALL,)),
    JoinRules(
        queries=(Condition("brand", not_in=("a",)),), candidates=(Condition("size", one_of=(1, 3)),)
    ),
    JoinRules(candidates=(Condition("size", is_null=True),), different=("brand",)),
    JoinRules(max_per=(("brand", 1),)),
    JoinRules(max_per=(("brand", 4),), candidates=(SMALL,), same=("size",)),
    JoinRules(queries=(Condition("brand", equals="nowhere"),)),
    JoinRules(candidates=(Condition("brand", equals="nowhere"),)),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("nprobe", [NPROBE, LISTS])
def test_rules_come_before_the_best(
    rules: JoinRules, nprobe: int, catalogue: Catalogue, request: pytest.FixtureRequest
) -> None:
    index = request.getfixturevalue("whole" if nprobe == LISTS else "partial")
    table = join_all(index, JoinSpec(9, rules))
    assert found_neighbors(table) == expected(index, catalogue, rules, 9, nprobe)
    # A query without a row leaves the numbers of the others as they are.
    rows = dict(zip(table["query_id"].to_pylist(), table["query_row"].to_pylist(), strict=True))
    ids = np.concatenate(
        [read_shard_table(index, n, ("image_id",))["image_id"].to_pylist() for n in range(3)]
    )
    assert all(ids[row] == query for query, row in rows.items())


def test_an_item_is_a_neighbour_once_by_its_best_image(
    whole: IndexDataset, catalogue: Catalogue
) -> None:
    assert catalogue.item_ids is not None
    item_of = dict(zip(catalogue.image_ids, catalogue.item_ids, strict=True))
    for query, (ids, _) in found_neighbors(join_all(whole, JoinSpec(20))).items():
        items = [item_of[image] for image in ids]
        assert len(set(items)) == 20
        assert item_of[query] not in items


@pytest.mark.parametrize("by", ["image_id", "item_id"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_excluded_pairs_are_no_neighbours(
    by: str, symmetric: bool, partial: IndexDataset, catalogue: Catalogue, tmp_path: Path
) -> None:
    # Of every query its two best, so that every list changes.
    best = found_neighbors(join_all(partial, JoinSpec(2)))
    ids = dict(zip(catalogue.image_ids, catalogue.columns()[by], strict=True))
    pairs = [(ids[query], ids[other]) for query, (found, _) in best.items() for other in found]
    write_pairs(tmp_path / "pairs.parquet", pairs)
    files = find_exclusions(ExclusionSpec((str(tmp_path / "*.parquet"),), by, symmetric=symmetric))
    source = IdShards(3, lambda n: read_shard_table(partial, n, (by,))[by].combine_chunks())
    folder = str(tmp_path / "exclusions")
    prepare_exclusions(files, folder, "identity", source)
    rules = JoinRules(max_per=(("brand", 3),), exclude=files.rule())
    table = join_all(partial, JoinSpec(8, rules, exclusions=folder))
    assert found_neighbors(table) == expected(partial, catalogue, rules, 8, NPROBE, set(pairs))
    assert found_neighbors(table) != found_neighbors(
        join_all(partial, JoinSpec(8, dataclasses.replace(rules, exclude=None)))
    )


def test_margins_are_to_the_next_neighbour_under_the_rules(
    whole: IndexDataset, catalogue: Catalogue
) -> None:
    rules = JoinRules(max_per=(("brand", 2),))
    table = join_all(whole, JoinSpec(5, rules, evidence=(MARGIN,)))
    more = expected(whole, catalogue, rules, 6)
    assert found_neighbors(table) == expected(whole, catalogue, rules, 5)
    for query, found in zip(table["query_id"].to_pylist(), table["margins"].to_pylist(), strict=True):
        scores = more[query][1]
        assert found == margins(scores[:5], scores[5] if len(scores) > 5 else None)
    assert join_all(whole, JoinSpec(5, rules)).equals(table.drop_columns(["margins"]))


def test_forgetting_capped_values_changes_nothing(
    whole: IndexDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JoinSpec(7, JoinRules(max_per=(("brand", 2),)))
    usual = parquet_bytes(join_all(whole, spec))
    forgotten: list[int] = []

    class Forgetful(RuleEncoder):
        def forget_caps(self, kept: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]") -> None:
            before = self.cap_values
            super().forget_caps(kept)
            forgotten.append(before - self.cap_values)

        @property
        def cap_values(self) -> int:
            return super().cap_values

    monkeypatch.setattr(join, "RuleEncoder", Forgetful)
    monkeypatch.setattr("index_builder.rules.rules._MOST_CAP_VALUES", -(2**40))
    assert parquet_bytes(join_all(whole, spec)) == usual
    assert len(forgotten) == 9
    assert max(forgotten) > 0


def test_bytes_under_rules_do_not_depend_on_shards_or_threads(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    rules = JoinRules(candidates=(Condition("size", is_null=False),), max_per=(("brand", 2),))
    written: set[bytes] = set()
    for shards, threads in ((1, 1), (2, 3), (5, 2)):
        request = IndexSpec(nlist=LISTS, nprobe=NPROBE, shards=shards)
        index = build_index(tmp_path / str(shards), catalogue, request)
        written.add(parquet_bytes(join_all(index, JoinSpec(6, rules, ("brand",), threads))))
    assert len(written) == 1


LATTICE = st.lists(
    st.tuples(st.integers(-2, 2), st.integers(-2, 2)).filter(any), min_size=1, max_size=24
)
CONDITIONS = st.sampled_from(
    [
        (),
        (Condition("brand", equals="x"),),
        (Condition("brand", not_in=("x",)), Condition("size", is_null=False)),
        (Condition("size", at_least=1),),
        (Condition("brand", is_null=True),),
    ]
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_rules_on_any_small_catalogue(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Equal vectors and equal scores are the rule; the item determines the brand."""
    vectors = np.asarray(data.draw(LATTICE, "vectors"), dtype=np.float64)
    n = len(vectors)
    numbers = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n), "items")
    kinds = data.draw(st.lists(st.sampled_from(["x", "y", None]), min_size=7, max_size=7), "brands")
    sizes = data.draw(st.lists(st.sampled_from([0, 1, None]), min_size=n, max_size=n), "sizes")
    catalogue = Catalogue(
        vectors,
        scattered_ids(n),
        item_ids=[f"item{number}" for number in numbers],
        brands=[kinds[number] for number in numbers],
        sizes=sizes,
    )
    rules = JoinRules(
        same=data.draw(st.sampled_from([(), ("size",)]), "same"),
        queries=data.draw(CONDITIONS, "queries"),
        candidates=data.draw(CONDITIONS, "candidates"),
        max_per=data.draw(st.sampled_from([(), (("brand", 1),), (("brand", 2),)]), "max_per"),
    )
    nlist = data.draw(st.integers(1, min(n, 5)), "nlist")
    nprobe = data.draw(st.integers(1, nlist), "nprobe")
    request = IndexSpec(nlist=nlist, nprobe=nprobe, shards=data.draw(st.integers(1, 3), "shards"))
    index = build_index(tmp_path_factory.mktemp("any"), catalogue, request)
    k = data.draw(st.integers(1, 6), "k")
    table = join_all(index, JoinSpec(k, rules, threads=data.draw(st.integers(1, 2), "threads")))
    assert found_neighbors(table) == expected(index, catalogue, rules, k, index.nprobe)


def test_no_rows_where_no_query_is_asked(whole: IndexDataset) -> None:
    rules = JoinRules(queries=(Condition("size", at_least=100),))
    table = join_all(whole, JoinSpec(3, rules, columns=("brand",), evidence=(MARGIN,)))
    assert len(table) == 0
    assert table.schema.field("neighbor_brand").type == pa.list_(pa.string())


def test_the_library_applies_rules_and_excluded_pairs(catalogue: Catalogue, tmp_path: Path) -> None:
    columns = {name: catalogue.columns()[name] for name in ("brand", "size")}
    made = library.import_arrays(
        catalogue.vectors,
        catalogue.image_ids,
        str(tmp_path / "e"),
        items=catalogue.item_ids,
        columns=columns,
    )
    request = IndexSpec(nlist=LISTS, nprobe=NPROBE, shards=2)
    index = open_index(library.build(made, str(tmp_path / "i"), request))
    rules = JoinRules(candidates=(SMALL,), max_per=(("brand", 3),))
    best = expected(index, catalogue, rules, 1, NPROBE)
    pairs = [(query, ids[0]) for query, (ids, _) in best.items() if ids]
    wanted = ExclusionSpec((write_pairs(tmp_path / "pairs.parquet", pairs),))
    spec = JoinSpec(5, rules, max_probe=0)
    folder = library.join(index.folder, str(tmp_path / "n"), spec, exclusions=wanted)
    settled = dataclasses.replace(rules, exclude=find_exclusions(wanted).rule())
    found = found_neighbors(library.read_neighbors(folder))
    assert found == expected(index, catalogue, settled, 5, NPROBE, pairs)
    certificate = library.evaluate(index.folder, folder, spec, exclusions=wanted)
    exact = expected(index, catalogue, settled, 5, LISTS, pairs)
    recalls = [
        len(set(found[query][0]) & set(ids)) / len(ids) if ids else 1.0
        for query, (ids, _) in exact.items()
    ]
    assert certificate.queries == len(catalogue)
    assert certificate.estimate == pytest.approx(np.mean(recalls))
    # The index has no transform but rounding, so the encoder's space has the same neighbours.
    encoder = library.evaluate(index.folder, folder, spec, exclusions=wanted, embeddings_folder=made)
    assert encoder.encoder_queries == len(catalogue)
    answered = [recall for recall, (ids, _) in zip(recalls, exact.values(), strict=True) if ids]
    assert encoder.encoder_recall == pytest.approx(np.mean(answered), abs=0.01)
    with pytest.raises(ConfigError, match="join.rules.max_per: there is no column 'colour'"):
        library.join(index.folder, folder, JoinSpec(5, JoinRules(max_per=(("colour", 1),))))
