"""Joins by codes: what is proposed, what is decided, and that nothing but the index decides it."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder import library
from index_builder.errors import ConfigError, DatasetError
from index_builder.index import code_sums
from index_builder.index.code_sums import Lookup, supported_lookups
from index_builder.index.goals import Encoding
from index_builder.index.memory import join_row_bytes
from index_builder.index.shards import IndexDataset, open_index
from index_builder.index.spec import IndexSpec
from index_builder.library import Condition, Goal, JoinRules, Metric, Promise
from index_builder.search import compressed_search
from index_builder.search.compressed_search import propose
from index_builder.search.join import JoinSpec, Queries, probed_shards, read_index_queries
from index_builder.steps import joining, plan
from index_builder.steps.host_speed import JoinSpeed
from index_builder.steps.merging import merge_shards
from tests.index_fixtures import (
    Catalogue,
    build_index,
    clustered_catalogue,
    found_neighbors,
    gaussian_catalogue,
    join_all,
    parquet_bytes,
)

REQUEST = IndexSpec(nlist=12, nprobe=5, shards=3, encoding=Encoding.COMPRESSED)


def by_vectors(index: IndexDataset) -> IndexDataset:
    """The same index, joined without its codes."""
    properties = index.manifest.properties | {"refine": None}
    return dataclasses.replace(
        index, manifest=dataclasses.replace(index.manifest, properties=properties)
    )


def refined(index: IndexDataset, refine: int) -> IndexDataset:
    properties = index.manifest.properties | {"refine": refine}
    return dataclasses.replace(
        index, manifest=dataclasses.replace(index.manifest, properties=properties)
    )


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return gaussian_catalogue(900, 30, duplicates=0.05)


@pytest.fixture(scope="module")
def index(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    return build_index(tmp_path_factory.mktemp("compressed"), catalogue, REQUEST)


def unpacked(index: IndexDataset) -> NDArray[np.uint8]:
    """The codes of all rows, uint8 [rows, subspaces], from the files."""
    assert index.trained.codebooks is not None
    packed = np.concatenate(
        [np.load(f"{index.folder}/shard-{number:05d}.codes.npy") for number in range(3)]
    )
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    return codes[:, : index.trained.codebooks.subspaces]


def test_what_is_proposed_are_the_least_sums_of_the_probed_lists(index: IndexDataset) -> None:
    spec, kept = JoinSpec(k=4, threads=2), 40
    stored = read_index_queries(index, 1, spec)
    queries = Queries.build(
        stored.vectors,
        stored.squared_norms,
        stored.probes,
        stored.table,
        spec.rules,
        single_images=True,
    )
    columns = ("image_id", *spec.rules.candidate_columns)
    shards = probed_shards(index, stored.probes)
    proposals = propose(index, queries.block, queries.probes, queries.encoder, shards, columns, kept)
    found, counts = proposals.finish()
    codes, books = unpacked(index), index.trained.codebooks
    assert books is not None
    tables = books.tables(stored.vectors.matrix(), Metric.COSINE)[:, : 16 * books.subspaces]
    tables = tables.reshape(len(tables), -1, 16).astype(np.int64)
    list_of = np.repeat(np.arange(index.trained.nlist), np.diff(index.layout.list_offsets))
    for q in range(len(found)):
        rows = np.flatnonzero(np.isin(list_of, stored.probes[q]))
        rows = rows[rows != stored.first_row + q]
        sums = tables[q][np.arange(books.subspaces), codes[rows]].sum(axis=1)
        wanted = rows[np.lexsort((rows, sums))[:kept]]
        assert counts[q] == len(wanted) == kept
        np.testing.assert_array_equal(np.sort(found[q]), np.sort(wanted))


RULES: dict[str, JoinRules] = {
    "none": JoinRules(),
    "same": JoinRules(same=("brand",)),
    "different": JoinRules(different=("size",)),
    "conditions": JoinRules(candidates=(Condition("size", at_least=2),)),
    "max_per": JoinRules(max_per=(("brand", 3),)),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_enough_proposals_give_the_join_by_vectors(index: IndexDataset, rules: JoinRules) -> None:
    spec = JoinSpec(k=7, rules=rules, threads=2)
    found = join_all(refined(index, 200), spec)
    assert parquet_bytes(found) == parquet_bytes(join_all(by_vectors(index), spec))


@pytest.mark.parametrize("metric", list(Metric))
def test_most_neighbours_are_found_under_every_metric(metric: Metric, tmp_path: Path) -> None:
    made = clustered_catalogue(1500, 24, 40)
    lengths = np.random.default_rng(5).uniform(0.5, 3.0, size=(1500, 1))
    made = dataclasses.replace(made, vectors=made.vectors * lengths)
    request = dataclasses.replace(REQUEST, metric=metric, nlist=20, nprobe=6)
    index = build_index(tmp_path, made, request, normalize=metric is Metric.COSINE)
    spec = JoinSpec(k=10)
    wanted, found = (found_neighbors(join_all(one, spec)) for one in (by_vectors(index), index))
    shares = [len({*wanted[query][0]} & {*ids}) / 10 for query, (ids, _) in found.items()]
    assert np.mean(shares) >= 0.95
    # Scores are exact: a pair that both have has the same bits.
    scores = {(q, i): s for q, (ids, found_scores) in wanted.items()
              for i, s in zip(ids, found_scores, strict=True)}  # fmt: skip
    for query, (ids, own) in found.items():
        for name, score in zip(ids, own, strict=True):
            assert scores.get((query, name), score) == score


def test_the_same_bytes_whatever_threads_shards_and_lookup(
    catalogue: Catalogue, index: IndexDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JoinSpec(k=5, rules=RULES["different"], threads=1)
    wanted = parquet_bytes(join_all(refined(index, 2), spec))
    assert wanted != parquet_bytes(join_all(by_vectors(index), spec))
    other = build_index(tmp_path, catalogue, dataclasses.replace(REQUEST, shards=5))
    many = dataclasses.replace(spec, threads=3)
    assert parquet_bytes(join_all(refined(other, 2), many)) == wanted
    assert supported_lookups()[-1] is Lookup.PLAIN
    for lookup in supported_lookups():
        monkeypatch.setattr(code_sums, "LOOKUP", lookup)
        assert parquet_bytes(join_all(refined(index, 2), spec)) == wanted


def test_tiles_and_the_order_of_shards_change_nothing(
    index: IndexDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JoinSpec(k=5)
    wanted = parquet_bytes(join_all(refined(index, 2), spec))
    monkeypatch.setattr(compressed_search, "_SUMS", 128)
    monkeypatch.setattr(compressed_search, "_RANGE_BYTES", 4096)
    backwards = lambda *arguments: probed_shards(*arguments)[::-1]  # noqa: E731
    monkeypatch.setattr("index_builder.search.join.probed_shards", backwards)
    assert parquet_bytes(join_all(refined(index, 2), spec)) == wanted


def test_queries_that_caps_leave_short_are_searched_by_vectors(tmp_path: Path) -> None:
    made = gaussian_catalogue(300, 16)
    vectors = made.vectors.copy()
    # An item of 60 images next to each other: all that is proposed to one of them, and to each other.
    vectors[:60] = vectors[0] + 0.01 * np.random.default_rng(1).normal(size=(60, 16))
    items = ["one"] * 30 + ["two"] * 30 + [f"item-{row}" for row in range(240)]
    crowded = dataclasses.replace(made, vectors=vectors, item_ids=items)
    request = dataclasses.replace(REQUEST, nlist=4, nprobe=4, shards=2)
    index = build_index(tmp_path, crowded, request)
    spec = JoinSpec(k=5)
    found = join_all(refined(index, 3), spec)
    assert set(found["status"].to_pylist()) == {"filled"}
    wanted = found_neighbors(join_all(by_vectors(index), spec))
    assert found_neighbors(found)[made.image_ids[0]] == wanted[made.image_ids[0]]


@pytest.mark.parametrize("metric", list(Metric))
def test_small_odd_catalogues_are_joined_as_by_vectors(metric: Metric, tmp_path: Path) -> None:
    # Five numbers a vector, copies, lists without rows, and more neighbours wanted than there are.
    rng = np.random.default_rng(2)
    vectors = rng.integers(-2, 3, size=(23, 5)).astype(float)
    vectors[vectors.any(axis=1) == 0] = 1
    vectors[5:9] = vectors[4]
    if metric is not Metric.COSINE:
        vectors[11] = 0
    made = Catalogue(vectors, [f"i{row * 7 % 23}" for row in range(23)])
    request = dataclasses.replace(REQUEST, metric=metric, nlist=6, nprobe=3, shards=3)
    index = build_index(tmp_path, made, request, normalize=metric is Metric.COSINE)
    for k in (1, 4, 40):
        spec = JoinSpec(k=k, evidence=("margin",))
        found = join_all(refined(index, 23), spec)
        assert parquet_bytes(found) == parquet_bytes(join_all(by_vectors(index), spec))
    rules = JoinRules(queries=(Condition("brand", equals="none has it"),))
    assert not len(join_all(index, JoinSpec(k=2, rules=rules)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two indexes by the library, of the same shape and of other vectors."""
    folder = tmp_path_factory.mktemp("built")
    for seed, name in enumerate(("index", "other")):
        made = clustered_catalogue(1200, 20, 30, seed)
        source = library.import_arrays(made.vectors, made.image_ids, str(folder / f"{name}-vectors"))
        library.build(source, str(folder / name), REQUEST, Goal(k=10))
    return folder


def test_a_whole_run_by_the_library(built: Path, tmp_path: Path) -> None:
    index = open_index(str(built / "index"))
    assert index.manifest.properties["method"] == "compressed"
    assert index.manifest.properties["encoding"] == "compressed"
    assert index.refine == 10
    assert [file.path for file in index.parts[0].files if file.path.endswith(".npy")] == [
        "shard-00000.codes.npy"
    ]
    spec = JoinSpec(k=10)
    folder = library.join(str(built / "index"), str(tmp_path / "neighbors"), spec)
    certificate = library.evaluate(str(built / "index"), folder, spec)
    found = library.read_neighbors(folder)
    probed = join_all(by_vectors(index), spec)
    wanted, joined = found_neighbors(probed), found_neighbors(found)
    recalls = [len({*wanted[query][0]} & {*ids}) / 10 for query, (ids, _) in joined.items()]
    assert np.mean(recalls) >= 0.95
    assert 0.5 < certificate.estimate < 1


@pytest.mark.parametrize(("least", "refine"), [(0.0, 10), (1e9, None)])
def test_calibration_says_whether_codes_are_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, refine: int | None
) -> None:
    # As if 1,500 vectors were many, and codes faster or slower once nprobe is known.
    monkeypatch.setattr("index_builder.index.spec.LEAST_GAIN_OF_LISTS", 0)
    monkeypatch.setattr("index_builder.index.spec.LEAST_GAIN", 0)
    monkeypatch.setattr("index_builder.steps.nprobe_choice.LEAST_GAIN", least)
    made = clustered_catalogue(1500, 128, 60)
    source = library.import_arrays(made.vectors, made.image_ids, str(tmp_path / "vectors"))
    promise = Promise(0.9, sample=200)
    request = IndexSpec(nlist=30, shards=2)
    goal = Goal(k=5, min_recall=0.9)
    folder = library.build(source, str(tmp_path / "index"), request, goal, promise=promise)
    index = open_index(folder)
    properties = index.manifest.properties
    assert properties["refine"] == properties["calibration"]["refine"] == refine
    assert properties["method"] == ("list_major" if refine is None else "compressed")
    assert properties["calibration"]["target"] == 0.9
    suffixes = {file.path.split(".", 1)[1] for file in index.parts[0].files}
    assert ("codes.npy" in suffixes) == (refine is not None)
    if refine is not None:
        # Lists may miss half of what the promise allows.
        assert properties["calibration"]["target_of_lists"] == 0.95
    spec = JoinSpec(k=5)
    joined = library.join(folder, str(tmp_path / "neighbors"), spec)
    assert library.evaluate(folder, joined, spec, promise).estimate >= 0.9


def test_another_refine_is_another_join(built: Path) -> None:
    index = open_index(str(built / "index"))
    other = refined(index, 11)
    assert other.manifest.content == index.manifest.content
    identities = {joining.neighbors_identity(one.manifest, JoinSpec(k=3)) for one in (index, other)}
    assert len(identities) == 2


def test_codebooks_that_are_missing_are_refused(built: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(REQUEST, encoding=Encoding.FLOAT16)
    folder = Path(library.build(str(built / "index-vectors"), str(tmp_path / "index"), plain))
    path = folder / "_manifest.json"
    path.write_text(path.read_text().replace('"refine": null', '"refine": 10'))
    with pytest.raises(DatasetError, match=r"searched by codes, but trained\.npz has no codebooks"):
        open_index(str(folder))


def test_the_plan_of_a_join_knows_the_codes(built: Path) -> None:
    speed = JoinSpeed(joined_pairs=1e8, read_bytes=1e9, hashed_bytes=1e9)
    index = open_index(str(built / "index"))
    work = plan.count_join_work(index)
    by_codes, plain = (plan.plan_join(one, work, 10, speed) for one in (index, by_vectors(index)))
    assert by_codes.reasons == (
        *plain.reasons,
        "encoding compressed: codes propose 100 rows a query, vectors decide",
    )
    # Of 400 rows a shard: codes twice, and room for 200 proposals.
    more = join_row_bytes(20, 5, 10, 10) - join_row_bytes(20, 5, 10)
    assert more == 3 + 5 + 1600
    rows = int(np.diff(index.layout.shard_offsets).max())
    assert by_codes.memory_bytes - plain.memory_bytes == rows * more
    # So few rows are probed that proposing costs more than it saves.
    assert by_codes.seconds > plain.seconds


def test_a_merged_file_has_the_vectors(built: Path, tmp_path: Path) -> None:
    index = open_index(str(built / "index"))
    merged = merge_shards(index, str(tmp_path / "all.faiss"))
    assert merged.rows == 1200
    assert faiss.read_index(merged.faiss_path).ntotal == 1200


def test_a_queries_join(built: Path, tmp_path: Path) -> None:
    asked = clustered_catalogue(100, 20, 30, seed=7)
    source = library.import_arrays(asked.vectors, asked.image_ids, str(tmp_path / "asked"))
    index = str(built / "index")
    queries = library.make_queries(source, index, str(tmp_path / "queries"))
    folder = library.join(index, str(tmp_path / "found"), JoinSpec(k=4), queries_folder=queries)
    table = library.read_neighbors(folder)
    assert len(table) == 100
    assert set(table["status"].to_pylist()) == {"filled"}


def truncate(index: Path, other: Path) -> None:
    path = index / "shard-00001.codes.npy"
    path.write_bytes(path.read_bytes()[:-10])


def delete(index: Path, other: Path) -> None:
    (index / "shard-00001.codes.npy").unlink()


def damage(index: Path, other: Path) -> None:
    path = index / "shard-00001.codes.npy"
    path.write_bytes(path.read_bytes()[:-10] + bytes(10))


def replace(index: Path, other: Path) -> None:
    (index / "shard-00001.codes.npy").write_bytes((other / "shard-00002.codes.npy").read_bytes())


DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "truncated": (truncate, r"shard-00001\.codes\.npy.*bytes"),
    "missing": (delete, r"shard-00001\.codes\.npy.*(missing|not there)"),
    "damaged": (damage, r"shard-00001\.codes\.npy.*checksum"),
    "foreign": (replace, r"shard-00001\.codes\.npy.*(bytes|checksum)"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_codes_are_refused(
    built: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    index = Path(shutil.copytree(built / "index", tmp_path / "index"))
    spoil(index, built / "other")
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        library.join(str(index), str(tmp_path / "neighbors"), JoinSpec(k=3))
    assert not (tmp_path / "neighbors" / "_manifest.json").exists()


def test_refine_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"index\.refine is 0, wanted at least 1.*Set index\.refine"):
        dataclasses.replace(REQUEST, refine=0).resolve(1000, 16)
