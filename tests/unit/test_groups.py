"""Near-duplicate groups against a brute force over all pairs, and their columns beside the index."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from index_builder.datasets import manifests
from index_builder.datasets.embeddings import describe_schema
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import ConfigError, DatasetError, FingerprintError
from index_builder.index.shards import IndexDataset, open_shard, read_shard_table
from index_builder.index.spec import IndexSpec
from index_builder.scoring.metrics import Metric
from index_builder.search import groups
from index_builder.search.groups import Groups, GroupsRef, connect, group_tables, with_groups
from index_builder.steps import pairs
from index_builder.steps.pairs import PairSpec, check_threshold, link_shard
from tests.index_fixtures import Catalogue, build_index, scattered_ids

ROWS = 260


def near_duplicates(rows: int = ROWS, dim: int = 24, noise: float = 0.12) -> Catalogue:
    """Directions in loose families, some of them chains, some rows copies of another, bit by bit."""
    rng = np.random.default_rng(3)
    family = rng.integers(rows // 3, size=rows)
    vectors = rng.normal(size=(rows // 3, dim))[family] + noise * rng.normal(size=(rows, dim))
    vectors[rows // 2 : rows // 2 + 20] = vectors[0]
    vectors[-10:] = vectors[10:20]
    return Catalogue(vectors, scattered_ids(rows))


def with_metric(index: IndexDataset, metric: str, exponent: int = 0) -> IndexDataset:
    """The same index, read as one of another metric."""
    properties = index.manifest.properties | {"metric": metric, "scale_exponent": exponent}
    return dataclasses.replace(
        index, manifest=dataclasses.replace(index.manifest, properties=properties)
    )


def all_rows(index: IndexDataset) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The vectors of an index and their nearest lists, in the order of its rows."""
    vectors, probes = [], []
    for number in range(index.layout.shards):
        with open_shard(index, number, ("probes",)) as shard:
            vectors.append(shard.vectors().matrix().astype(np.float64))
            probes.append(shard.probes())
    return np.concatenate(vectors), np.concatenate(probes)


def all_scores(vectors: NDArray[np.float64], metric: str, exponent: int = 0) -> NDArray[np.float32]:
    products, norms = vectors @ vectors.T, (vectors**2).sum(axis=1)
    if metric == "cosine":
        return (products / np.sqrt(norms[:, None] * norms)).astype(np.float32)
    unscale = 2.0 ** (-2 * exponent)
    if metric == "euclidean":
        return (-(norms[:, None] + norms - 2 * products) * unscale).astype(np.float32)
    return (products * unscale).astype(np.float32)


def components(linked: NDArray[np.bool_]) -> set[frozenset[int]]:
    """The connected components with two members or more, by walking from row to row."""
    left, found = set(range(len(linked))), set()
    while left:
        member, waiting = set(), {left.pop()}
        while waiting:
            row = waiting.pop()
            member.add(row)
            waiting |= set(np.flatnonzero(linked[row]).tolist()) - member
        left -= member
        if len(member) > 1:
            found.add(frozenset(member))
    return found


def brute_force(
    index: IndexDataset, metric: str, spec: PairSpec, exponent: int = 0
) -> set[frozenset[int]]:
    vectors, probes = all_rows(index)
    near = all_scores(vectors, metric, exponent) >= np.float32(spec.threshold)
    met = (probes[:, 0][None, :, None] == probes[:, None, : spec.nprobe]).any(axis=2)
    return components(near & (met | met.T))


def found_groups(index: IndexDataset, spec: PairSpec) -> Groups:
    return connect([link_shard(index, number, spec) for number in range(index.layout.shards)])


def as_sets(found: Groups) -> set[frozenset[int]]:
    return {frozenset(found.rows[found.labels == label].tolist()) for label in range(len(found.sizes))}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    folder = tmp_path_factory.mktemp("groups")
    return build_index(folder, near_duplicates(), IndexSpec(nlist=6, nprobe=3, shards=4))


@pytest.fixture(scope="module")
def sphere(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    """Directions in space, near enough for chains that lead through other shards and back."""
    vectors = np.random.default_rng(2).normal(size=(150, 3))
    vectors[40:45] = vectors[3]
    catalogue = Catalogue(vectors, scattered_ids(150))
    folder = tmp_path_factory.mktemp("sphere")
    return build_index(folder, catalogue, IndexSpec(nlist=3, nprobe=2, shards=5))


@pytest.mark.parametrize("nprobe", [1, 3])
@pytest.mark.parametrize(
    ("metric", "threshold", "exponent"),
    [
        ("cosine", 0.97, 0),
        ("cosine", 1.0, 0),
        ("euclidean", -0.05, 0),
        ("euclidean", 0.0, 0),
        ("euclidean", -0.2, -1),
        ("euclidean", -0.0125, 1),
        ("inner_product", 0.97, 0),
        ("inner_product", 3.9, -1),
    ],
)
def test_groups_are_the_components_of_all_pairs(
    index: IndexDataset, metric: str, threshold: float, exponent: int, nprobe: int
) -> None:
    spec = PairSpec(threshold, nprobe, threads=2)
    expected = brute_force(index, metric, spec, exponent)
    assert 2 < len(expected) < ROWS / 3
    assert as_sets(found_groups(with_metric(index, metric, exponent), spec)) == expected


@pytest.mark.parametrize("threshold", [0.96, 0.98, 0.99])
def test_a_shard_alone_links_what_its_own_rows_probe(sphere: IndexDataset, threshold: float) -> None:
    vectors, probes = all_rows(sphere)
    near = all_scores(vectors, "cosine") >= np.float32(threshold)
    asked = near & (probes[:, 0][None, :, None] == probes[:, None, :]).any(axis=2)
    for number in range(sphere.layout.shards):
        start, stop = sphere.layout.shard_rows(number)
        own = np.zeros(len(vectors), dtype=bool)
        own[start:stop] = True
        linked = asked & own[:, None]
        forest = link_shard(sphere, number, PairSpec(threshold, 2, threads=2))
        found = as_sets(connect([forest]))
        for expected in components(linked | linked.T):
            (group,) = (group for group in found if group & expected)
            assert group <= expected
            # Of rows that are equal, the shard that holds them links the others.
            kept = {vectors[row].tobytes() for row in group}
            assert {vectors[row].tobytes() for row in expected} == kept
        inside = forest[(forest[:, 1] >= start) & (forest[:, 1] < stop)]
        # Edges begin at the smallest own row of their component, and no own row has two of them.
        assert not set(forest[:, 0]) & set(inside[:, 1])
        assert len(set(inside[:, 1])) == len(inside)
        assert (forest[:, 0] >= start).all()
        assert (forest[:, 0] < stop).all()


def test_a_score_that_is_the_threshold_counts_and_one_bit_less_does_not(index: IndexDataset) -> None:
    scores = np.unique(all_scores(all_rows(index)[0], "cosine"))
    threshold = scores[len(scores) - 150]
    for value in (threshold, np.nextafter(threshold, np.float32(2))):
        spec = PairSpec(float(value), 3, threads=1)
        assert as_sets(found_groups(index, spec)) == brute_force(index, "cosine", spec)
    lower = brute_force(index, "cosine", PairSpec(float(threshold), 3))
    assert lower != brute_force(index, "cosine", PairSpec(float(value), 3))


def test_all_positive_vectors_whose_float32_sums_are_off(tmp_path: Path) -> None:
    vectors = np.random.default_rng(5).uniform(0.2, 1, size=(120, 900))
    index = build_index(
        tmp_path, Catalogue(vectors, scattered_ids(120)), IndexSpec(nlist=1, nprobe=1, shards=2)
    )
    scores = np.sort(all_scores(all_rows(index)[0], "cosine"), axis=None)
    spec = PairSpec(float(scores[-120 - 60]), 1, threads=1)
    expected = brute_force(index, "cosine", spec)
    assert expected
    assert as_sets(found_groups(index, spec)) == expected


def test_forests_do_not_depend_on_threads_or_tiles(
    index: IndexDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = range(index.layout.shards)
    plain = [link_shard(index, number, PairSpec(0.95, 3, threads=1)) for number in numbers]
    assert sum(map(len, plain)) > 50
    monkeypatch.setattr(pairs, "_QUERY_TILE_ROWS", 7)
    monkeypatch.setattr(pairs, "_CORPUS_TILE_ROWS", 5)
    for number, forest in zip(numbers, plain, strict=True):
        found = link_shard(index, number, PairSpec(0.95, 3, threads=3))
        assert {tuple(edge) for edge in found} == {tuple(edge) for edge in forest}


def test_many_pairs_leave_few_edges(tmp_path: Path) -> None:
    vectors = np.ones((400, 8)) + 1e-2 * np.random.default_rng(0).normal(size=(400, 8))
    vectors[100:300] = 1
    catalogue = Catalogue(vectors, scattered_ids(400))
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=2, nprobe=2, shards=3))
    forests = [link_shard(index, number, PairSpec(0.9, 2, threads=2)) for number in range(3)]
    # All 79,800 pairs are near; a forest has fewer edges than its shard and what it saw have rows.
    assert all(len(forest) < 400 for forest in forests)
    assert connect(forests).sizes.tolist() == [400]


def test_equal_vectors_whose_own_product_is_below_the_threshold_stay_apart() -> None:
    codes = np.full((3, 4), 0.25, np.float16).view(np.uint16)
    norms = np.full(3, 0.25)
    inner = Metric.INNER_PRODUCT.code
    assert pairs._run_heads(codes, norms, inner, 1.0, 0.5).tolist() == [True, True, True]
    assert pairs._run_heads(codes, norms, inner, 1.0, 0.25).tolist() == [True, False, False]
    assert pairs._run_heads(codes, norms, inner, 4.0, 0.5).tolist() == [True, False, False]


def test_connecting_nothing_and_chains() -> None:
    assert len(connect([]).rows) == 0
    assert len(connect([np.empty((0, 2), np.int64)]).rows) == 0
    found = connect([np.array([[2, 9], [2**40, 9]]), np.array([[5, 6], [9, 2]])])
    assert found.rows.tolist() == [2, 5, 6, 9, 2**40]
    assert found.labels.tolist() == [0, 1, 1, 0, 0]
    assert found.sizes.tolist() == [3, 2]


def test_forests_are_connected_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    forests = [rng.integers(0, 900, size=(int(size), 2)) for size in rng.integers(0, 60, size=12)]
    whole = connect(forests)
    monkeypatch.setattr(groups, "_EDGES_AT_ONCE", 1)
    merged: list[int] = []
    original = groups._add_edges

    def noting(found: Groups, waiting: list[NDArray[np.int64]]) -> Groups:
        merged.append(len(waiting))
        return original(found, waiting)

    monkeypatch.setattr(groups, "_add_edges", noting)
    found = connect(iter(forests))
    assert len(merged) == 3
    assert np.array_equal(found.rows, whole.rows)
    assert np.array_equal(found.labels, whole.labels)
    linked = np.zeros((900, 900), dtype=bool)
    for forest in forests:
        linked[forest[:, 0], forest[:, 1]] = linked[forest[:, 1], forest[:, 0]] = True
    assert {group for group in as_sets(found) if len(group) > 1} == components(linked)


def test_parts_have_the_rows_of_the_shards_and_the_smallest_id_by_bytes(tmp_path: Path) -> None:
    ids = [f"i{row:03d}" for row in range(40)]
    # UTF-8 orders these as bytes: b < z < é < ﬁ < 😀.
    ids[:5] = ["z", "é", "b", "ﬁ", "😀"]
    vectors = np.random.default_rng(1).normal(size=(40, 8))
    index = build_index(tmp_path, Catalogue(vectors, ids), IndexSpec(nlist=2, nprobe=2, shards=3))
    order = [
        name for number in range(3)
        for name in read_shard_table(index, number, ("image_id",))["image_id"].to_pylist()
    ]  # fmt: skip
    row = {name: place for place, name in enumerate(order)}
    found = connect([np.array([[row["é"], row["z"]], [row["😀"], row["ﬁ"]], [row["é"], row["i009"]]])])
    tables = list(group_tables(index, found))
    assert [len(table) for table in tables] == [
        stop - start for start, stop in map(index.layout.shard_rows, range(3))
    ]
    assert tables[0].schema == groups.SCHEMA
    table = pa.concat_tables(tables).to_pylist()
    assert [entry["image_id"] for entry in table] == order
    by_id = {entry.pop("image_id"): tuple(entry.values()) for entry in table}
    assert by_id["i009"] == ("i009", True, 3)
    assert by_id["z"] == by_id["é"] == ("i009", False, 3)
    assert by_id["ﬁ"] == ("ﬁ", True, 2)
    assert by_id["😀"] == ("ﬁ", False, 2)
    assert by_id["b"] == ("b", True, 1)
    assert sum(entry[1] for entry in by_id.values()) == 40 - 2 - 1


def write_groups(index: IndexDataset, folder: Path, content: str | None = None) -> GroupsRef:
    """Writes a groups dataset of an index as the pipeline does."""
    folder.mkdir()
    parts = []
    for number, table in enumerate(group_tables(index, found_groups(index, PairSpec(0.97, 3)))):
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
        file = manifests.describe_file(str(folder), f"part-{number:05d}.parquet")
        parts.append(Part(f"part-{number:05d}", "key", len(table), (file,)))
    properties = {"index": content or index.manifest.content}
    schema = describe_schema(groups.SCHEMA)
    manifest = Manifest(groups.KIND, "fingerprint", {}, schema, tuple(parts), properties)
    manifests.commit(str(folder), manifest)
    return GroupsRef(str(folder), manifest.content)


def test_columns_of_groups_are_read_as_if_the_index_had_them(
    index: IndexDataset, tmp_path: Path
) -> None:
    joined = with_groups(index, write_groups(index, tmp_path / "groups"))
    assert {field["name"] for field in joined.schema} >= set(groups.COLUMNS)
    table = read_shard_table(joined, 1, ("group", "image_id", "is_representative", "image_id"))
    assert table.column_names == ["group", "image_id", "is_representative"]
    assert table["image_id"].equals(read_shard_table(index, 1, ("image_id",))["image_id"])
    for row in table.to_pylist():
        assert row["is_representative"] == (row["group"] == row["image_id"])
    assert len(set(table["group"].to_pylist())) < len(table)
    path = tmp_path / "groups" / "part-00002.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DatasetError, match="part-00002.parquet does not match its checksum"):
        with open_shard(joined, 2, ("image_id", "group"), verify=True):
            pass


def test_groups_of_another_index_are_refused(index: IndexDataset, tmp_path: Path) -> None:
    ref = write_groups(index, tmp_path / "groups", content="0" * 64)
    with pytest.raises(FingerprintError, match=r"are of an index with content 0{64}, but .* has "):
        with_groups(index, ref)
    with pytest.raises(FingerprintError, match="wanted other: they were made again meanwhile"):
        with_groups(index, GroupsRef(ref.folder, "other"))
    with pytest.raises(DatasetError, match="is not a complete groups dataset"):
        with_groups(index, GroupsRef(str(tmp_path / "none"), ref.content))


@pytest.mark.parametrize(
    ("metric", "threshold", "wanted"),
    [
        (Metric.COSINE, 1.5, "above 0 and at most 1"),
        (Metric.COSINE, 0.0, "above 0 and at most 1"),
        (Metric.EUCLIDEAN, 0.1, r"at most 0 \(minus the largest squared distance\)"),
        (Metric.EUCLIDEAN, float("-inf"), "at most 0"),
        (Metric.INNER_PRODUCT, float("inf"), "a number"),
    ],
)
def test_thresholds_that_a_metric_cannot_have(metric: Metric, threshold: float, wanted: str) -> None:
    text = f"duplicates.threshold: got {threshold}, wanted {wanted}.*index.metric is {metric.value}"
    with pytest.raises(ConfigError, match=text):
        check_threshold(metric, threshold)


def test_more_lists_than_the_index_keeps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"duplicates\.nprobe: got 9, wanted at most 8"):
        PairSpec(0.9, 9).resolve(Metric.COSINE, 8)
    assert PairSpec(0.9).resolve(Metric.COSINE, 8) == PairSpec(0.9, 8)
