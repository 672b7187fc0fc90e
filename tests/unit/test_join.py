"""The join against a float64 brute force: ids, score bits and order, whatever the layout."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.errors import DatasetError
from index_builder.index.goals import TransformSpec
from index_builder.index.kmeans import find_centroids
from index_builder.index.shards import IndexDataset
from index_builder.index.spec import IndexSpec
from index_builder.rules.rules import JoinRules
from index_builder.scoring import topk
from index_builder.scoring.products import timed_products
from index_builder.scoring.scores import error_bound
from index_builder.search import join
from index_builder.search.join import JoinSpec, join_shard, lookup_rows, probed_shards
from tests.index_fixtures import (
    BruteForce,
    Catalogue,
    brute_force,
    build_index,
    clustered_catalogue,
    found_neighbors,
    gaussian_catalogue,
    join_all,
    parquet_bytes,
    scattered_ids,
)

HALF_WHITENED = TransformSpec("pca", 32)


def assert_exact(table: pa.Table, oracle: BruteForce, k: int) -> None:
    """Ids, score bits and order of every query."""
    found, wanted = found_neighbors(table), oracle.neighbors(k)
    assert len(table) == len(wanted)
    different = {query: (found.get(query), wanted[query]) for query in wanted
                 if found.get(query) != wanted[query]}  # fmt: skip
    assert not different


def all_lists(nlist: int | None = None, shards: int = 4, transform: str = "none") -> IndexSpec:
    """A request that probes every list."""
    spec = TransformSpec(transform, 32) if transform == "pca" else TransformSpec()
    return IndexSpec(transform=spec, nlist=nlist, nprobe=nlist, shards=shards)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """700 directions, 5 % of them identical, with brands and sizes of which some are null."""
    return gaussian_catalogue(700, 48, duplicates=0.05)


@pytest.fixture(scope="module")
def index(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    """The catalogue half-whitened, in 16 lists that are all probed, in 4 shards."""
    request = IndexSpec(transform=HALF_WHITENED, nlist=16, nprobe=16, shards=4)
    return build_index(tmp_path_factory.mktemp("full"), catalogue, request)


@pytest.fixture(scope="module")
def partial(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    """The same with 3 of 16 lists probed."""
    request = IndexSpec(transform=HALF_WHITENED, nlist=16, nprobe=3, shards=4)
    return build_index(tmp_path_factory.mktemp("partial"), catalogue, request)


RULES = [
    JoinRules(),
    JoinRules(same=("brand",)),
    JoinRules(different=("brand",)),
    JoinRules(same=("size",), different=("brand",)),
    JoinRules(same=("brand", "size")),
    JoinRules(different=("brand", "size")),
]


@pytest.mark.parametrize("rules", RULES)
def test_full_probe_equals_brute_force(
    index: IndexDataset, catalogue: Catalogue, rules: JoinRules
) -> None:
    table = join_all(index, JoinSpec(12, rules, columns=("brand",)))
    assert_exact(table, brute_force(index, catalogue, rules), 12)
    assert table["query_row"].to_pylist() == list(range(700))


@pytest.mark.parametrize("rules", RULES)
def test_fewer_lists_equal_brute_force_of_the_probed_lists(
    partial: IndexDataset, catalogue: Catalogue, rules: JoinRules
) -> None:
    table = join_all(partial, JoinSpec(12, rules))
    assert_exact(table, brute_force(partial, catalogue, rules, nprobe=3), 12)


def test_fewer_lists_find_less(partial: IndexDataset, catalogue: Catalogue) -> None:
    found = found_neighbors(join_all(partial, JoinSpec(12)))
    assert found != brute_force(partial, catalogue).neighbors(12)


def test_identical_vectors_score_one_in_the_order_of_their_ids(
    index: IndexDataset, catalogue: Catalogue
) -> None:
    copies = [catalogue.image_ids[row] for row in (0, *range(350, 385))]
    ids, scores = found_neighbors(join_all(index, JoinSpec(12)))[copies[0]]
    assert ids == sorted(copies[1:], key=str.encode)[:12]
    assert scores == [1.0] * 12


@pytest.mark.parametrize("dim", [256, 1280])
def test_all_positive_vectors(dim: int, tmp_path: Path) -> None:
    # The worst case of the error bound: every partial sum grows. Near-equal scores, too.
    vectors = np.random.default_rng(1).uniform(0.9, 1.0, size=(260, dim))
    catalogue = Catalogue(vectors, scattered_ids(260))
    index = build_index(tmp_path, catalogue, all_lists(6, shards=3))
    assert_exact(join_all(index, JoinSpec(20)), brute_force(index, catalogue), 20)


def test_distinct_vectors_with_tied_scores(tmp_path: Path) -> None:
    # Signs of 16 numbers: every cosine is a multiple of 1/8, so most ranks are decided by id.
    signs = np.random.default_rng(2).choice([-1.0, 1.0], size=(300, 16))
    catalogue = Catalogue(signs, scattered_ids(300))
    index = build_index(tmp_path, catalogue, all_lists(7))
    table = join_all(index, JoinSpec(25))
    distinct = {score for row in table["scores"].to_pylist() for score in row}
    assert len(distinct) < 10
    assert_exact(table, brute_force(index, catalogue), 25)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("transform", ["none", "pca"])
def test_more_neighbors_asked_for_than_rows(rows: int, transform: str, tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(rows, 40, seed=3)
    index = build_index(tmp_path, catalogue, all_lists(transform=transform))
    table = join_all(index, JoinSpec(10, columns=("brand",)))
    assert_exact(table, brute_force(index, catalogue), 10)
    assert [len(ids) for ids in table["neighbor_ids"].to_pylist()] == [rows - 1] * rows
    assert set(table["status"].to_pylist()) == {"exhausted"}


def test_more_neighbors_asked_for_than_a_list_holds(
    partial: IndexDataset, catalogue: Catalogue
) -> None:
    table = join_all(partial, JoinSpec(400))
    assert_exact(table, brute_force(partial, catalogue, nprobe=3), 400)
    assert set(table["status"].to_pylist()) == {"capped"}


@pytest.mark.parametrize("transform", ["none", "pca"])
def test_identical_catalogue(transform: str, tmp_path: Path) -> None:
    vectors = np.tile(np.random.default_rng(4).normal(size=40), (90, 1))
    catalogue = Catalogue(vectors, scattered_ids(90))
    index = build_index(tmp_path, catalogue, all_lists(2, transform=transform))
    # All rows are in one list, which is split over all shards.
    assert np.count_nonzero(np.diff(index.layout.list_offsets)) == 1
    assert index.layout.shards == 4
    table = join_all(index, JoinSpec(7))
    assert_exact(table, brute_force(index, catalogue), 7)
    assert {score for row in table["scores"].to_pylist() for score in row} == {1.0}


def test_a_large_list_is_split_and_the_rows_stay_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    crowd = rng.normal(size=40) + 0.01 * rng.normal(size=(300, 40))
    catalogue = Catalogue(np.concatenate([crowd, rng.normal(size=(60, 40))]), scattered_ids(360))
    split = build_index(tmp_path / "split", catalogue, all_lists(9, shards=5))
    whole = build_index(tmp_path / "whole", catalogue, all_lists(9, shards=1))
    owners = [
        [number for number in range(5) if np.ptp(split.layout.list_rows(number, list_number))]
        for list_number in range(split.trained.nlist)
    ]
    assert max(len(shards) for shards in owners) >= 2
    table = join_all(split, JoinSpec(15))
    assert_exact(table, brute_force(split, catalogue), 15)
    assert table.equals(join_all(whole, JoinSpec(15)))


def test_lists_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No vector with positive numbers alone is nearest to the opposite of one.
    def with_opposites(*arguments: Any, **settings: Any) -> np.ndarray:
        found = find_centroids(*arguments, **settings)
        return np.concatenate([found, -found])

    monkeypatch.setattr("index_builder.index.training.find_centroids", with_opposites)
    catalogue = gaussian_catalogue(400, 24, seed=6)
    catalogue.vectors[:] = np.abs(catalogue.vectors)
    index = build_index(tmp_path, catalogue, all_lists(40, shards=3))
    assert (np.diff(index.layout.list_offsets) == 0).sum() >= 20
    assert_exact(join_all(index, JoinSpec(10)), brute_force(index, catalogue), 10)


def test_ids_that_are_prefixes_or_not_ascii(tmp_path: Path) -> None:
    names = ["a", "aa", "aaa", "a\u0000", "ab", "A", "é", "e\u0301", "z", "ü", "日本", "日",
             "\U0001f600", "\uffff", "", "a b", "a/b", "a" * 300]  # fmt: skip
    vectors = np.tile(np.random.default_rng(7).normal(size=20), (len(names), 1))
    catalogue = Catalogue(vectors, names)
    index = build_index(tmp_path, catalogue, all_lists(1, shards=3), parts=2)
    table = join_all(index, JoinSpec(len(names)))
    assert_exact(table, brute_force(index, catalogue), len(names))
    first = found_neighbors(table)["z"][0]
    # By bytes of UTF-8: U+FFFF comes before U+1F600, which UTF-16 would put the other way round.
    assert first[:4] == ["", "A", "a", "a\u0000"]
    assert first[-2:] == ["\uffff", "\U0001f600"]


def test_images_of_the_same_item_are_left_out(tmp_path: Path) -> None:
    base = gaussian_catalogue(120, 24, seed=8)
    items = [f"item-{row // 3}" for row in range(120)]
    catalogue = Catalogue(base.vectors, base.image_ids, item_ids=items)
    index = build_index(tmp_path, catalogue, all_lists(5, shards=2))
    table = join_all(index, JoinSpec(119))
    assert_exact(table, brute_force(index, catalogue), 119)
    item_of = dict(zip(base.image_ids, items, strict=True))
    for query, (ids, _) in found_neighbors(table).items():
        # The best image of each of the other items.
        assert len(ids) == 39
        assert len({item_of[other] for other in ids}) == 39
        assert item_of[query] not in {item_of[other] for other in ids}


def test_rules_with_no_partner_give_an_empty_row(tmp_path: Path) -> None:
    base = gaussian_catalogue(20, 16, seed=9)
    brands: list[str | None] = ["lonely", None, *["common"] * 18]
    catalogue = Catalogue(base.vectors, base.image_ids, brands=brands)
    index = build_index(tmp_path, catalogue, all_lists(2, shards=2))
    rules = JoinRules(same=("brand",))
    table = join_all(index, JoinSpec(5, rules, columns=("brand",)))
    assert_exact(table, brute_force(index, catalogue, rules), 5)
    rows = {row["query_id"]: row for row in table.to_pylist()}
    for lonely in base.image_ids[:2]:
        assert rows[lonely]["neighbor_ids"] == []
        assert rows[lonely]["status"] == "exhausted"
    assert rows[base.image_ids[5]]["neighbor_brand"] == ["common"] * 5
    assert rows[base.image_ids[5]]["status"] == "filled"


LATTICE = st.integers(1, 3).flatmap(
    lambda dim: st.lists(st.tuples(*[st.integers(-2, 2)] * dim).filter(any), min_size=1, max_size=30)
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_any_small_catalogue(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Vectors on a small lattice: equal vectors and equal scores are the rule."""
    vectors = np.asarray(data.draw(LATTICE, "vectors"), dtype=np.float64)
    n = len(vectors)
    ids = data.draw(st.lists(st.text(max_size=3), min_size=n, max_size=n, unique=True), "ids")
    brands = data.draw(st.lists(st.sampled_from(["x", "y", None]), min_size=n, max_size=n))
    items = data.draw(
        st.one_of(st.none(), st.lists(st.sampled_from("pqrs"), min_size=n, max_size=n)), "items"
    )
    nlist = data.draw(st.integers(1, min(n, 6)), "nlist")
    nprobe = data.draw(st.integers(1, nlist), "nprobe")
    rules = data.draw(st.sampled_from(RULES[:3]), "rules")
    k = data.draw(st.integers(1, 8), "k")
    request = IndexSpec(nlist=nlist, nprobe=nprobe, shards=data.draw(st.integers(1, 4), "shards"))
    catalogue = Catalogue(vectors, ids, item_ids=items, brands=brands)
    folder = tmp_path_factory.mktemp("any")
    index = build_index(folder, catalogue, request, data.draw(st.integers(1, 3), "parts"))
    table = join_all(index, JoinSpec(k, rules, threads=data.draw(st.integers(1, 3), "threads")))
    assert_exact(table, brute_force(index, catalogue, rules, index.nprobe), k)


@pytest.mark.parametrize("nprobe", [3, 16])
def test_bytes_do_not_depend_on_shards(nprobe: int, catalogue: Catalogue, tmp_path: Path) -> None:
    spec = JoinSpec(12, JoinRules(different=("brand",)), columns=("brand", "size"))
    written = []
    for shards in (1, 2, 5):
        request = IndexSpec(transform=HALF_WHITENED, nlist=16, nprobe=nprobe, shards=shards)
        index = build_index(tmp_path / str(shards), catalogue, request)
        assert index.layout.shards == shards
        written.append(join_all(index, spec))
    assert all(table.equals(written[0]) for table in written)
    assert len({parquet_bytes(table) for table in written}) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_bytes_do_not_depend_on_threads(threads: int, partial: IndexDataset, tmp_path: Path) -> None:
    one = join_all(partial, JoinSpec(12, columns=("brand",), threads=1))
    several = join_all(partial, JoinSpec(12, columns=("brand",), threads=threads))
    assert parquet_bytes(several) == parquet_bytes(one)


@pytest.mark.parametrize(("queries", "corpus"), [(1, 1), (7, 13), (64, 5), (5_000, 2_000)])
def test_bytes_do_not_depend_on_tiles(
    queries: int, corpus: int, partial: IndexDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = parquet_bytes(join_all(partial, JoinSpec(12)))
    monkeypatch.setattr(topk, "QUERY_TILE_ROWS", queries)
    monkeypatch.setattr(topk, "CORPUS_TILE_ROWS", corpus)
    assert parquet_bytes(join_all(partial, JoinSpec(12))) == usual


def test_bytes_do_not_depend_on_the_order_of_shards(
    partial: IndexDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = parquet_bytes(join_all(partial, JoinSpec(12)))
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 7):
        monkeypatch.setattr(
            join,
            "probed_shards",
            lambda *arguments, order=order: [
                shard for shard in order if shard in probed_shards(*arguments)
            ],
        )
        assert parquet_bytes(join_all(partial, JoinSpec(12))) == usual


@dataclasses.dataclass
class TestedProduct:
    """A fast product that is made by the test; `proposed` grows by the products of each tile."""

    made: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float64]]
    name: str = "tested"
    unit_roundoff: float = 0.0
    proposed: int = 0

    __test__ = False

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        out[:] = self.made(queries, corpus)
        self.proposed += out.size


def exact_product(q: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Every dot product of two sets of rows, without error."""
    return q.astype(np.float64) @ x.astype(np.float64).T


def lengths(q: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """|q| |x| of every pair."""
    return np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)[None, :]


@pytest.mark.parametrize("side", ["lower", "higher", "random"])
def test_any_product_within_the_error_bound_gives_the_same_bytes(
    side: str, index: IndexDataset
) -> None:
    usual = parquet_bytes(join_all(index, JoinSpec(12)))
    rng = np.random.default_rng(0)

    def made(q: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64]:
        bound = error_bound(q.shape[1]) - 2.0**-24  # left for rounding to float32 afterwards
        signs = {"lower": -1.0, "higher": 1.0}.get(side)
        direction = rng.choice([-1.0, 1.0], size=(len(q), len(x))) if signs is None else signs
        return exact_product(q, x) + direction * bound * lengths(q, x)

    product = TestedProduct(made)
    assert parquet_bytes(join_all(index, JoinSpec(12, threads=1, product=product))) == usual
    # Every query meets every distinct vector of each piece of a list; 36 of the 700 rows are copies.
    assert 700 * 665 <= product.proposed < 700 * 669


def test_a_product_far_outside_the_error_bound_is_noticed(index: IndexDataset) -> None:
    usual = parquet_bytes(join_all(index, JoinSpec(12)))
    product = TestedProduct(lambda q, x: exact_product(q, x) - 0.05)
    assert parquet_bytes(join_all(index, JoinSpec(12, product=product))) != usual


def test_a_bfloat16_product_with_its_own_bound_gives_the_same_bytes(index: IndexDataset) -> None:
    usual = parquet_bytes(join_all(index, JoinSpec(12)))

    def bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        bits = np.ascontiguousarray(numbers).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return rounded.astype(np.uint32).view(np.float32)

    def made(q: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64]:
        return (bfloat16(q) @ bfloat16(x).T).astype(np.float64)

    product = TestedProduct(made, "bfloat16", 2.0**-8)
    assert parquet_bytes(join_all(index, JoinSpec(12, product=product))) == usual


@pytest.mark.parametrize("number", range(4))
def test_every_library_gives_the_same_bytes(number: int, partial: IndexDataset) -> None:
    timed = timed_products()
    if number >= len(timed):
        pytest.skip(f"this machine has {len(timed)} products")
    usual = parquet_bytes(join_all(partial, JoinSpec(12)))
    spec = JoinSpec(12, product=timed[number].product)
    assert parquet_bytes(join_all(partial, spec)) == usual


def test_home_comes_first_then_the_shards_most_queries_probe(partial: IndexDataset) -> None:
    layout = partial.layout
    for home in (None, 0, 2):
        probes = np.asarray([[layout.shard_lists(3)[0]]] * 5 + [[layout.shard_lists(1)[1] - 1]])
        order = probed_shards(partial, probes.astype(np.int32), home)
        others = [number for number in order if number != home]
        weights = [int(np.isin(probes, range(*layout.shard_lists(number))).sum()) for number in others]
        assert weights == sorted(weights, reverse=True)
        assert all(weights)
        assert home is None or order[0] == home
        assert 3 in order


def test_lookup_returns_rows_in_the_order_asked_for(index: IndexDataset) -> None:
    table = join_all(index, JoinSpec(1, columns=("brand",)))
    rows = np.random.default_rng(0).integers(700, size=200)
    found = lookup_rows(index, rows, ("image_id", "brand"))
    assert found["image_id"].to_pylist() == table["query_id"].take(rows).to_pylist()
    assert found["brand"].to_pylist() == table["query_brand"].take(rows).to_pylist()
    assert len(lookup_rows(index, rows[:0], ("image_id",))) == 0


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    index = build_index(tmp_path, gaussian_catalogue(50, 16), all_lists(3, shards=2))
    path = tmp_path / "index" / "shard-00001.faiss"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    join_shard(index, 0, JoinSpec(3))
    with pytest.raises(DatasetError, match=r"shard-00001\.faiss does not match its checksum"):
        join_shard(index, 1, JoinSpec(3))


def test_k_that_no_task_can_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k is 0, wanted at least 1"):
        JoinSpec(0)
    with pytest.raises(ValueError, match=r"k is 1000000000, wanted at most 10000: .*\. Lower it\."):
        JoinSpec(10**9)
    # The most that there is has room for the evidence of its last one, too.
    index = build_index(tmp_path, gaussian_catalogue(9, 4), IndexSpec(nlist=1))
    table = join_all(index, JoinSpec(10_000, evidence=("margin",)))
    assert table["neighbor_ids"].combine_chunks().value_lengths().to_pylist() == [8] * 9


def test_clustered_rows_probe_few_shards(tmp_path: Path) -> None:
    catalogue = clustered_catalogue(600, 32, centres=24)
    request = IndexSpec(nlist=24, nprobe=2, shards=6)
    index = build_index(tmp_path, catalogue, request)
    assert_exact(join_all(index, JoinSpec(10)), brute_force(index, catalogue, nprobe=2), 10)
