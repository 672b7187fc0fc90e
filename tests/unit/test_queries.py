"""Queries that are not in the index: against a brute force, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from index_builder import library
from index_builder.datasets import manifests
from index_builder.errors import ConfigError, DatasetError, FingerprintError
from index_builder.index.goals import TransformSpec
from index_builder.index.shards import IndexDataset, open_index
from index_builder.index.spec import IndexSpec
from index_builder.rules.exclusions import ExclusionSpec
from index_builder.rules.rules import JoinRules
from index_builder.scoring.vectors import unit_float16
from index_builder.search.join import JoinSpec
from index_builder.steps import queries
from tests.index_fixtures import parquet_bytes

DIM = 24
CORPUS, ASKED = 300, 90


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """Vectors with ids and columns, as they are imported."""

    vectors: NDArray[Any]
    ids: list[str]
    items: list[str]
    brands: list[str | None]

    def write(self, folder: Path, encoder: str = "net", **columns: list[Any]) -> str:
        more: dict[str, list[Any]] = {"brand": self.brands, **columns}
        return library.import_arrays(
            self.vectors, self.ids, str(folder), items=self.items, columns=more, encoder=encoder
        )


def corpus() -> Side:
    vectors = np.random.default_rng(0).normal(size=(CORPUS, DIM))
    brands = [("a", "b", None)[row % 3] for row in range(CORPUS)]
    names = [f"c{row * 7 % CORPUS:03d}" for row in range(CORPUS)]
    return Side(vectors, names, [f"item-{row // 2}" for row in range(CORPUS)], brands)


def asked() -> Side:
    """New vectors; a third are copies of corpus rows, of which some are of the same item."""
    vectors = np.random.default_rng(1).normal(size=(ASKED, DIM))
    vectors[::3] = corpus().vectors[:ASKED:3]
    items = [f"item-{row // 2}" if row % 6 == 0 else f"new-{row}" for row in range(ASKED)]
    return Side(vectors, [f"q{row:03d}" for row in range(ASKED)], items,
                [("b", "a", None, "c")[row % 4] for row in range(ASKED)])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of both sides, and an index of the corpus in which every list is probed."""
    path = tmp_path_factory.mktemp("queries")
    source = corpus().write(path / "corpus")
    spec = IndexSpec(transform=TransformSpec("pca", 16), nlist=8, nprobe=8, shards=3)
    library.build(source, str(path / "index"), spec)
    asked().write(path / "asked")
    return path


def brute_force(
    index: IndexDataset, rules: JoinRules, k: int, excluded: frozenset[tuple[str, str]] = frozenset()
) -> dict[str, list[tuple[str, float]]]:
    """The best image of each other item in the probed lists, by score, then id, in float64."""
    left, right = asked(), corpus()
    apply = index.trained.transform.apply
    q, x = (apply(unit_float16(side.vectors)[0]).astype(np.float64) for side in (left, right))
    norms = np.sqrt((q * q).sum(axis=1)[:, None] * (x * x).sum(axis=1)[None, :])
    scores = (q @ x.T / norms).astype(np.float32)
    centroids = index.trained.centroids.astype(np.float64)
    nearest = [
        np.argsort(-(side @ centroids.T).astype(np.float32), axis=1, kind="stable") for side in (q, x)
    ]
    found = {}
    for i, name in enumerate(left.ids):
        order = sorted(range(CORPUS), key=lambda j: (-scores[i, j], right.ids[j].encode()))
        best: list[tuple[str, float]] = []
        items = {left.items[i]}
        for j in order:
            same = left.brands[i] is not None and left.brands[i] == right.brands[j]
            if right.items[j] in items or (rules.different and same) or (rules.same and not same):
                continue
            probed = nearest[1][j, 0] in nearest[0][i, : index.nprobe]
            if not probed or (name, right.ids[j]) in excluded:
                continue
            items.add(right.items[j])
            best.append((right.ids[j], float(scores[i, j])))
        found[name] = best[:k]
    return found


def neighbors_of(folder: str) -> dict[str, list[tuple[str, float]]]:
    table = library.read_neighbors(folder)
    columns = (table[name].to_pylist() for name in ("query_id", "neighbor_ids", "scores"))
    return {
        name: list(zip(ids, scores, strict=True)) for name, ids, scores in zip(*columns, strict=True)
    }


@pytest.mark.parametrize(
    "rules",
    [JoinRules(), JoinRules(same=("brand",)), JoinRules(different=("brand",))],
    ids=["none", "same", "different"],
)
def test_the_neighbors_are_those_of_a_brute_force(
    folder: Path, rules: JoinRules, tmp_path: Path
) -> None:
    index = str(folder / "index")
    made = library.make_queries(str(folder / "asked"), index, str(tmp_path / "queries"))
    spec = JoinSpec(6, rules, columns=("brand",))
    found = library.join(index, str(tmp_path / "neighbors"), spec, queries_folder=made)
    opened = open_index(index)
    assert neighbors_of(found) == brute_force(opened, rules, 6)
    table = library.read_neighbors(found)
    assert table["query_row"].to_pylist() == list(range(ASKED))
    brand_of = dict(zip(asked().ids, asked().brands, strict=True))
    assert table["query_brand"].to_pylist() == [brand_of[i] for i in table["query_id"].to_pylist()]
    properties = manifests.load(found, "neighbors").properties
    assert properties["index"] == opened.manifest.content
    assert properties["queries"] == queries.open_queries(made).manifest.content


def test_query_shards_hold_transformed_vectors_in_the_order_of_lists(
    folder: Path, tmp_path: Path
) -> None:
    index = open_index(str(folder / "index"))
    opened = queries.open_queries(
        library.make_queries(str(folder / "asked"), index.folder, str(tmp_path / "queries"))
    )
    assert opened.shards == 1
    table = pq.read_table(tmp_path / "queries" / opened.manifest.parts[0].files[0].path)
    assert table.schema.field("code").type == pa.list_(pa.float16(), 16)
    nearest = [row[0] for row in table["probes"].to_pylist()]
    assert nearest == sorted(nearest)
    rows = [int(name[1:]) for name in table["image_id"].to_pylist()]
    codes = np.asarray(table["code"].to_pylist(), dtype=np.float16)
    wanted = index.trained.transform.apply(unit_float16(asked().vectors)[0])
    assert (codes == wanted[rows]).all()
    norms = (codes.astype(np.float64) ** 2).sum(axis=1)
    assert table["squared_norm"].to_pylist() == norms.tolist()


def test_bytes_do_not_depend_on_the_shards_of_the_queries(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, found = str(folder / "index"), []
    for shards in (1, 4):
        monkeypatch.setattr(queries, "query_shards", lambda *_, shards=shards: shards)
        made = library.make_queries(str(folder / "asked"), index, str(tmp_path / f"q{shards}"))
        assert queries.open_queries(made).shards == shards
        joined = library.join(index, str(tmp_path / f"n{shards}"), JoinSpec(5), queries_folder=made)
        found.append(library.read_neighbors(joined).combine_chunks())
    assert parquet_bytes(found[0]) == parquet_bytes(found[1])


def test_queries_are_cut_into_shards_of_about_the_index_s_size(folder: Path) -> None:
    index = open_index(str(folder / "index"))
    assert [queries.query_shards(index, rows) for rows in (1, 100, 101, 300, 1000)] == [1, 1, 2, 3, 10]


def test_a_list_of_images_has_the_same_neighbors_as_in_the_whole(folder: Path, tmp_path: Path) -> None:
    index, spec = str(folder / "index"), JoinSpec(4)
    names = ["q007", "q003", "q080", "q003"]
    found = {}
    for name, image_ids in (("all", None), ("some", names)):
        made = library.make_queries(
            str(folder / "asked"), index, str(tmp_path / f"{name}-q"), image_ids=image_ids
        )
        found[name] = neighbors_of(
            library.join(index, str(tmp_path / f"{name}-n"), spec, queries_folder=made)
        )
    assert sorted(found["some"]) == sorted(set(names))
    assert found["some"] == {name: found["all"][name] for name in names}


def test_images_that_are_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    names = ["q001", *[f"x{number}" for number in range(8)]]
    with pytest.raises(ConfigError, match=r"8 of 9 image ids are not in .*first: 'x0', .*'x4'\)"):
        library.make_queries(
            str(folder / "asked"), str(folder / "index"), str(tmp_path / "q"), image_ids=names
        )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("name", ["ids.txt", "ids.parquet"])
def test_lists_of_ids_are_read_from_text_and_parquet(name: str, tmp_path: Path) -> None:
    path, ids = tmp_path / name, ["b b", "ä", "a", "b b"]
    if name.endswith(".txt"):
        path.write_bytes("b b\r\nä\n\na\nb b".encode())
    else:
        pq.write_table(pa.table({"n": [1, 2, 3, 4], "image_id": ids}), path)
    assert queries.read_limit(str(path)).to_pylist() == ["a", "b b", "ä"]


def test_lists_of_ids_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.txt does not exist"):
        queries.read_limit(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="names no image id"):
        queries.read_limit(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    with pytest.raises(ConfigError, match="Wanted text in UTF-8 with one image id a line"):
        queries.read_limit(str(tmp_path / "latin.txt"))
    pq.write_table(pa.table({"a": ["1"], "b": ["2"]}), tmp_path / "two.parquet")
    with pytest.raises(ConfigError, match="has the columns a, b, wanted image_id"):
        queries.read_limit(str(tmp_path / "two.parquet"))
    (tmp_path / "text.parquet").write_text("q001")
    with pytest.raises(ConfigError, match="text.parquet cannot be read"):
        queries.read_limit(str(tmp_path / "text.parquet"))


def test_queries_of_another_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    other = asked().write(tmp_path / "other", encoder="another net")
    with pytest.raises(FingerprintError) as caught:
        library.make_queries(other, str(folder / "index"), str(tmp_path / "q"))
    text = str(caught.value)
    assert "encoder: the queries have 'another net', the index 'net'" in text
    assert "Embed the queries with the configuration of that index" in text
    narrow = library.import_arrays(np.eye(5), list("abcde"), str(tmp_path / "n"), encoder="net")
    with pytest.raises(FingerprintError, match="dim: the queries have 5, the index 24"):
        library.make_queries(narrow, str(folder / "index"), str(tmp_path / "q"))
    assert not (tmp_path / "q").exists()


def test_queries_for_another_index_are_refused(folder: Path, tmp_path: Path) -> None:
    made = library.make_queries(str(folder / "asked"), str(folder / "index"), str(tmp_path / "q"))
    other = library.build(str(folder / "corpus"), str(tmp_path / "other"), IndexSpec(nlist=2, seed=5))
    with pytest.raises(FingerprintError, match="were made for the index with content"):
        library.join(other, str(tmp_path / "n"), JoinSpec(3), queries_folder=made)


def test_columns_that_a_rule_needs_on_both_sides(folder: Path, tmp_path: Path) -> None:
    index = open_index(str(folder / "index"))
    with pytest.raises(ConfigError, match="join.rules.same: there is no column 'colour'"):
        library.join(index.folder, str(tmp_path / "n"), JoinSpec(3, JoinRules(same=("colour",))))
    side = asked()
    bare = library.import_arrays(side.vectors, side.ids, str(tmp_path / "bare"), encoder="net")
    made = library.make_queries(bare, index.folder, str(tmp_path / "bare-q"))
    with pytest.raises(ConfigError, match="join.rules.same: there is no column 'brand', wanted one of"):
        library.join(
            index.folder, str(tmp_path / "n"), JoinSpec(3, JoinRules(same=("brand",))),
            queries_folder=made,
        )  # fmt: skip
    # Carried along it is null.
    found = library.join(
        index.folder, str(tmp_path / "n"), JoinSpec(3, columns=("brand",)), queries_folder=made
    )
    assert library.read_neighbors(found)["query_brand"].null_count == ASKED
    numbers = dataclasses.replace(side, brands=list(range(ASKED)))  # type: ignore[arg-type]
    typed = numbers.write(tmp_path / "typed")
    made = library.make_queries(typed, index.folder, str(tmp_path / "typed-q"))
    with pytest.raises(ConfigError, match="'brand' is int64 among the queries and string among the"):
        library.join(
            index.folder, str(tmp_path / "n2"), JoinSpec(3, JoinRules(same=("brand",))),
            queries_folder=made,
        )  # fmt: skip


def test_a_changed_query_shard_is_refused(folder: Path, tmp_path: Path) -> None:
    index = str(folder / "index")
    made = library.make_queries(str(folder / "asked"), index, str(tmp_path / "q"))
    path = tmp_path / "q" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    with pytest.raises(DatasetError, match=r"1 of its files .*part-00000.parquet has \d+ bytes"):
        library.join(index, str(tmp_path / "n"), JoinSpec(3), queries_folder=made)
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"part-00000\.parquet does not match its checksum"):
        library.join(index, str(tmp_path / "n"), JoinSpec(3), queries_folder=made)
    assert not (tmp_path / "n" / "part-00000.parquet").exists()


def test_making_queries_again_changes_nothing_and_another_dataset_is_not_overwritten(
    folder: Path, tmp_path: Path
) -> None:
    index, target = str(folder / "index"), str(tmp_path / "q")
    made = library.make_queries(str(folder / "asked"), index, target)
    before = {path.name: path.stat().st_mtime_ns for path in Path(made).iterdir()}
    assert library.make_queries(str(folder / "asked"), index, target) == made
    assert {path.name: path.stat().st_mtime_ns for path in Path(made).iterdir()} == before
    with pytest.raises(DatasetError, match="holds another dataset"):
        library.make_queries(str(folder / "asked"), index, target, image_ids=["q001"])


def test_every_probed_shard_of_the_index_is_verified_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(
        library.build(
            corpus().write(tmp_path / "corpus"),
            str(tmp_path / "index"),
            IndexSpec(nlist=12, nprobe=2, shards=6),
        )
    )
    monkeypatch.setattr(queries, "query_shards", lambda *_: 5)
    made = library.make_queries(
        asked().write(tmp_path / "asked"), index.folder, str(tmp_path / "q"),
        image_ids=[f"q{row:03d}" for row in range(12)],
    )  # fmt: skip
    opened = queries.open_queries(made)
    probed = [set(part.properties["shards_probed"]) for part in opened.manifest.parts]
    assert max(map(len, probed)) < 6
    assert opened.fan_out() == sum(map(len, probed)) / 5
    seen: list[str] = []
    monkeypatch.setattr(manifests, "verify_file", lambda _, file: seen.append(file.path))
    for shard in range(5):
        before = len(seen)
        opened.verify_share(index, shard)
        numbers = {int(path[6:11]) for path in seen[before:]}
        assert numbers <= probed[shard]
    wanted = sorted(set().union(*probed))
    assert sorted(seen) == [f"shard-{n:05d}.{kind}" for n in wanted for kind in ("faiss", "parquet")]


@pytest.mark.parametrize("nprobe", [1, 3])
def test_only_the_probed_lists_are_searched(nprobe: int, folder: Path, tmp_path: Path) -> None:
    spec = IndexSpec(nlist=8, nprobe=nprobe, shards=4)
    index = library.build(str(folder / "corpus"), str(tmp_path / "index"), spec)
    made = library.make_queries(str(folder / "asked"), index, str(tmp_path / "q"))
    found = library.join(index, str(tmp_path / "n"), JoinSpec(5, max_probe=0), queries_folder=made)
    assert neighbors_of(found) == brute_force(open_index(index), JoinRules(), 5)


def test_excluded_pairs_of_queries_and_candidates(folder: Path, tmp_path: Path) -> None:
    index = str(folder / "index")
    made = library.make_queries(str(folder / "asked"), index, str(tmp_path / "q"))
    plain = brute_force(open_index(index), JoinRules(), 3)
    pairs = frozenset((name, best) for name, found in plain.items() for best, _ in found[:2])
    table = pa.table({"query_id": [a for a, _ in pairs], "neighbor_id": [b for _, b in pairs]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    wanted = ExclusionSpec((str(tmp_path / "pairs.parquet"),))
    found = library.join(
        index, str(tmp_path / "n"), JoinSpec(3), queries_folder=made, exclusions=wanted
    )
    assert neighbors_of(found) == brute_force(open_index(index), JoinRules(), 3, pairs)
    assert neighbors_of(found) != plain
    strange = table.slice(0, 1).set_column(0, "query_id", pa.array(["c001"]))
    pq.write_table(strange, tmp_path / "pairs.parquet")
    with pytest.raises(DatasetError, match="1 of 1 pairs name an image_id that is not there"):
        library.join(index, str(tmp_path / "m"), JoinSpec(3), queries_folder=made, exclusions=wanted)
