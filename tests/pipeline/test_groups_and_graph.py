"""Groups and graph as stages: through the local runner, resumed, skipped, named by rules."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.embeddings import describe_schema
from index_builder.datasets.manifests import Manifest
from index_builder.errors import ConfigError, DatasetError, FingerprintError, KithError
from index_builder.index.shards import open_index, open_shard, read_shard_table
from index_builder.search import groups
from index_builder.steps import graph
from pipelines.build_index import build_index
from pipelines.config import Config
from pipelines.evaluate_neighbors import evaluate_neighbors
from pipelines.find_groups import find_groups
from pipelines.join_neighbors import join_neighbors
from pipelines.neighbor_graph import neighbor_graph
from pipelines.nightly import run_nightly
from pipelines.stage import Dataset
from tests.index_fixtures import Catalogue, scattered_ids, write_embeddings
from tests.pipeline.small_catalogue import load, session, write_config
from transforms import graph as graph_transform
from transforms import groups as groups_transform

ROWS, SHARDS = 240, 3


def pictures(rows: int = ROWS) -> Catalogue:
    """Directions in families of about four near-duplicates."""
    rng = np.random.default_rng(7)
    family = rng.integers(rows // 4, size=rows)
    vectors = rng.normal(size=(rows // 4, 16))[family] + 0.05 * rng.normal(size=(rows, 16))
    return Catalogue(vectors, scattered_ids(rows))


def settings(workspace: Path, *overrides: str) -> Config:
    """A configuration for an embeddings dataset made elsewhere."""
    workspace.mkdir(exist_ok=True)
    path = workspace / "c.yaml"
    values: dict[str, Any] = {
        "workspace": str(workspace / "w"),
        "index": {"nlist": 8, "nprobe": 4, "shards": SHARDS},
        "join": {"k": 6},
        "duplicates": {"threshold": 0.95},
        "graph": {"max_reverse": 3},
        "evaluate": {"sample": 20},
    }
    path.write_text(yaml.safe_dump(values))
    return load(path, *overrides)


def build(folder: Path, catalogue: Catalogue) -> str:
    """Builds an index of made embeddings in `folder`/w; returns where it is."""
    parts = write_embeddings(folder / "embeddings", catalogue)
    schema = embeddings.EmbeddingSchema(16, (("brand", "string"), ("size", "int64"))).arrow()
    properties = {"dim": 16, "encoder": {}}
    manifest = Manifest(
        embeddings.KIND, "f" * 64, {}, describe_schema(schema), tuple(parts), properties
    )
    manifests.commit(str(folder / "embeddings"), manifest)
    config = settings(folder)
    return build_index(config, session(), str(folder / "embeddings"), None).folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("stages"), pictures())


@pytest.fixture(scope="module")
def joined(index: str) -> Dataset:
    return join_neighbors(settings(Path(index).parents[2]), session(), index)


def table_of(dataset: Dataset, pattern: str = "part") -> pa.Table:
    """The rows of one of a dataset's files a part, in order."""
    files = [
        file.path for part in dataset.manifest.parts for file in part.files if pattern in file.path
    ]
    return pa.concat_tables([pq.read_table(Path(dataset.folder) / file) for file in files])


def bytes_of(folder: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def all_ids(index: str) -> list[str]:
    opened = open_index(index)
    tables = [read_shard_table(opened, number, ("image_id",)) for number in range(SHARDS)]
    return [str(name) for name in pa.concat_tables(tables)["image_id"].to_pylist()]


def test_what_was_linked_with_a_damaged_shard_is_linked_again(index: str, tmp_path: Path) -> None:
    """Its own task sees the checksum; those that had streamed it before must not be believed."""
    copy = tmp_path / "index"
    shutil.copytree(index, copy)
    opened = open_index(str(copy))
    # Tasks begin in order: those of the other shards have streamed the last one by then.
    last = SHARDS - 1
    path = copy / opened.parts[last].file(".faiss").path
    good = path.read_bytes()
    with open_shard(opened, last, ()) as shard:
        code = shard.vectors().slice(0, 1).matrix()
    place = good.index(code.tobytes())
    # A vector turned round: nothing but the checksum tells.
    path.write_bytes(good[:place] + (-code).tobytes() + good[place + code.nbytes :])
    config = settings(tmp_path)
    with pytest.raises(DatasetError, match=rf"{path.name} does not match its checksum"):
        find_groups(config, session(), str(copy))
    left = list((tmp_path / "w").rglob("forest-*.npy"))
    assert left
    assert not list((tmp_path / "w").rglob("part-*.parquet"))
    path.write_bytes(good)
    made = find_groups(config, session(), str(copy))
    assert made.counters["groups.images"] == ROWS
    assert table_of(made).equals(
        table_of(find_groups(settings(tmp_path / "straight"), session(), index))
    )


def test_a_truncated_shard_is_refused_before_any_is_linked(index: str, tmp_path: Path) -> None:
    copy = tmp_path / "index"
    shutil.copytree(index, copy)
    path = copy / "shard-00001.faiss"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        DatasetError, match=r"1 of its files .*: shard-00001\.faiss has \d+ bytes, wanted"
    ):
        find_groups(settings(tmp_path), session(), str(copy))
    assert not (tmp_path / "w").exists()


def test_groups_are_made_once_and_describe_themselves(index: str, tmp_path: Path) -> None:
    config = settings(tmp_path)
    made = find_groups(config, session(), index)
    assert made.state == "made"
    assert made.counters["groups.images"] == ROWS
    table = table_of(made)
    assert table["image_id"].to_pylist() == all_ids(index)
    sizes: dict[str, int] = {}
    for row in table.to_pylist():
        sizes[row["group"]] = sizes.get(row["group"], 0) + 1
        assert row["is_representative"] == (row["group"] == row["image_id"])
    assert [sizes[row["group"]] for row in table.to_pylist()] == table["group_size"].to_pylist()
    properties = made.manifest.properties
    shared = [size for size in sizes.values() if size > 1]
    assert (properties["groups"], properties["grouped"]) == (len(shared), sum(shared))
    assert properties["largest"] == max(shared) > 3
    assert (properties["threshold"], properties["nprobe"]) == (0.95, 4)
    assert made.manifest.schema == describe_schema(groups.SCHEMA)
    assert not (Path(made.folder) / "_work").exists()
    before = bytes_of(made.folder)
    assert find_groups(config, session(), index).state == "unchanged"
    assert find_groups(settings(tmp_path, "join.threads=1"), session(), index).state == "unchanged"
    assert bytes_of(made.folder) == before
    other = find_groups(settings(tmp_path, "duplicates.threshold=1"), session(), index)
    assert other.folder != made.folder
    assert other.manifest.properties["grouped"] < properties["grouped"]


def fail_at(number: int, function: Any) -> Any:
    """A function that raises at its call of that number, as if the machine had died there."""
    calls = iter(range(number))

    def failing(*arguments: Any, **more: Any) -> Any:
        if next(calls, None) is None:
            raise KithError("killed")
        return function(*arguments, **more)

    return failing


@pytest.mark.parametrize("place", ["link_shard", "part"])
def test_killed_groups_go_on_and_have_the_same_bytes(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    whole = find_groups(settings(tmp_path / "whole"), session(), index)
    config = settings(tmp_path / "killed")
    with monkeypatch.context() as patched:
        if place == "link_shard":
            failing = fail_at(2, groups_transform.link_shard)
            patched.setattr(groups_transform, "link_shard", failing)
        else:
            # Forests are marked first, then the parts.
            failing = fail_at(SHARDS + 1, manifests.mark_part)
            patched.setattr(manifests, "mark_part", failing)
        with pytest.raises(KithError, match="killed"):
            find_groups(config, session(), index)
    again = find_groups(config, session(), index)
    assert again.state == "resumed"
    assert again.counters.get("groups.images", 0) < ROWS
    assert bytes_of(again.folder) == bytes_of(whole.folder)


def test_groups_without_a_threshold_or_with_too_many_lists_are_refused(
    index: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, "duplicates.threshold=null")
    with pytest.raises(ConfigError, match=r"duplicates\.threshold: not set, wanted the score"):
        find_groups(config, session(), index)
    with pytest.raises(ConfigError, match=r"duplicates\.threshold: got 1\.2, wanted above 0 and at"):
        settings(tmp_path, "duplicates.threshold=1.2")
    with pytest.raises(ConfigError, match="images.metadata: 'group' is a column of the near-dup"):
        settings(tmp_path, "images.metadata={group: string}")
    with pytest.raises(ConfigError, match=r"duplicates\.nprobe: got 5, wanted at most index\.nprobe"):
        settings(tmp_path, "duplicates.nprobe=5")
    config = settings(tmp_path, "duplicates.nprobe=5", "index.nprobe=auto")
    with pytest.raises(ConfigError, match=r"duplicates\.nprobe: got 5, wanted at most 4"):
        find_groups(config, session(), index)


def test_rules_and_exports_name_the_columns_of_groups(index: str, tmp_path: Path) -> None:
    rules = "join.rules={candidates: [{column: is_representative, equals: true}], different: [group]}"
    config = settings(tmp_path, rules, "export.columns=[group, is_representative]")
    with pytest.raises(DatasetError, match="are none for this index.*Run kith groups"):
        join_neighbors(config, session(), index)
    made = find_groups(config, session(), index)
    group = {row["image_id"]: row["group"] for row in table_of(made).to_pylist()}
    found = join_neighbors(config, session(), index)
    assert found.manifest.properties["groups"] == made.manifest.content
    rows = table_of(found).to_pylist()
    assert [row["query_id"] for row in rows] == all_ids(index)
    for row in rows:
        assert row["query_group"] == group[row["query_id"]]
        assert row["neighbor_group"] == row["neighbor_ids"]
        assert [group[name] for name in row["neighbor_ids"]] == row["neighbor_group"]
        assert row["query_group"] not in row["neighbor_group"]
        assert all(row["neighbor_is_representative"])
    assert sum(len(row["neighbor_ids"]) for row in rows) > ROWS
    assert evaluate_neighbors(config, session(), index, found.folder).state == "made"
    # Other groups are another join; a threshold that no rule asks for changes nothing.
    other = settings(tmp_path, rules, "duplicates.threshold=0.9")
    with pytest.raises(DatasetError, match="are none for this index"):
        join_neighbors(other, session(), index)
    plain = join_neighbors(settings(tmp_path), session(), index)
    off = settings(tmp_path, "duplicates.threshold=null")
    assert join_neighbors(off, session(), index).folder == plain.folder != found.folder


def test_at_most_one_of_a_group_is_kept(index: str, tmp_path: Path) -> None:
    never = "join.max_probe=0"
    config = settings(tmp_path, "join.rules={max_per: {group: 1}}", never)
    made = find_groups(config, session(), index)
    group = {row["image_id"]: row["group"] for row in table_of(made).to_pylist()}
    plain = table_of(
        join_neighbors(settings(tmp_path, "join.k=239", never), session(), index)
    ).to_pylist()
    found = table_of(join_neighbors(config, session(), index)).to_pylist()
    for row, everyone in zip(found, plain, strict=True):
        best = {group[name]: name for name in reversed(everyone["neighbor_ids"])}
        first = [name for name in everyone["neighbor_ids"] if best[group[name]] == name]
        assert row["neighbor_ids"] == first[:6]


def test_the_graph_is_the_neighbours_turned_around(index: str, joined: Dataset, tmp_path: Path) -> None:
    config = settings(tmp_path)
    made = neighbor_graph(config, session(), index, joined.folder)
    queries = table_of(joined).to_pylist()
    holders: dict[str, list[tuple[float, bytes]]] = {name: [] for name in all_ids(index)}
    for query in queries:
        for name, score in zip(query["neighbor_ids"], query["scores"], strict=True):
            holders[name].append((-score, query["query_id"].encode()))
    for row, name in zip(table_of(made, "reverse").to_pylist(), all_ids(index), strict=True):
        assert row == {
            "image_id": name,
            "reverse_degree": len(holders[name]),
            "reverse_ids": [holder.decode() for _, holder in sorted(holders[name])[:3]],
            "reverse_scores": [-score for score, _ in sorted(holders[name])[:3]],
        }
    lists = {query["query_id"]: query["neighbor_ids"] for query in queries}
    evidence = table_of(made, "evidence").to_pylist()
    assert [row["query_id"] for row in evidence] == [query["query_id"] for query in queries]
    for row in evidence:
        found = lists[row["query_id"]]
        assert row["mutual"] == [row["query_id"] in lists[name] for name in found]
        assert row["reverse_degree"] == len(holders[row["query_id"]])
        assert row["neighbor_reverse_degrees"] == [len(holders[name]) for name in found]
    pairs = table_of(made, "mutual").to_pylist()
    both = {(a, b) for a in lists for b in lists[a] if a in lists[b]}
    assert {(pair["a"], pair["b"]) for pair in pairs} | {(p["b"], p["a"]) for p in pairs} == both
    assert all(pair["a_row"] < pair["b_row"] for pair in pairs)
    assert len(pairs) * 2 == len(both) > ROWS
    properties = made.manifest.properties
    assert properties["mutual_edges"] == len(pairs)
    assert properties["mutual_share"] == len(both) / sum(map(len, lists.values()))
    assert properties["items"] == made.manifest.rows == ROWS
    assert made.manifest.schema == describe_schema(graph.EVIDENCE_SCHEMA)
    assert sorted(path.name.split("-")[0] for path in Path(made.folder).glob("*.parquet")) == [
        name for name in ("evidence", "mutual", "reverse") for _ in range(SHARDS)
    ]
    assert neighbor_graph(config, session(), index, joined.folder).state == "unchanged"


@pytest.mark.parametrize("marks", [1, SHARDS + 1, 2 * SHARDS + 1])
def test_a_killed_graph_goes_on_and_has_the_same_bytes(
    index: str, joined: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: int
) -> None:
    whole = neighbor_graph(settings(tmp_path / "whole"), session(), index, joined.folder)
    config = settings(tmp_path / "killed")
    with monkeypatch.context() as patched:
        patched.setattr(manifests, "mark_part", fail_at(marks, manifests.mark_part))
        with pytest.raises(KithError, match="killed"):
            neighbor_graph(config, session(), index, joined.folder)
    again = neighbor_graph(config, session(), index, joined.folder)
    assert again.state == "resumed"
    assert bytes_of(again.folder) == bytes_of(whole.folder)


def test_a_graph_of_what_does_not_belong_together_is_refused(
    index: str, joined: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    other = build(tmp_path / "other", pictures(120))
    with pytest.raises(FingerprintError, match="was joined over an index with content"):
        neighbor_graph(config, session(), other, joined.folder)
    document = json.loads((Path(joined.folder) / "_manifest.json").read_text())
    document["properties"]["queries"] = "0" * 64
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "_manifest.json").write_text(json.dumps(document))
    with pytest.raises(FingerprintError, match="queries that are not in the index, so none of them"):
        neighbor_graph(config, session(), index, str(tmp_path / "asked"))


def test_a_nightly_run_makes_both_where_they_are_switched_on(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    on = {"duplicates": {"threshold": 0.8}, "graph": {"enabled": True}}
    result = run_nightly(
        load(write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w", **on)), session()
    )
    run = result.run
    assert {name: run["stages"][name]["state"] for name in ("groups", "join", "graph")} == {
        "groups": "made",
        "join": "unchanged",
        "graph": "made",
    }
    pointer = json.loads((tmp_path / "w" / "current.json").read_text())["datasets"]
    kept = manifests.load(str(tmp_path / "w" / pointer["groups"]), groups.KIND)
    assert run["duplicates"] == {
        name: kept.properties[name] for name in ("threshold", "groups", "grouped", "largest")
    }
    assert run["duplicates"]["groups"] > 0
    turned = manifests.load(str(tmp_path / "w" / pointer["graph"]), graph.KIND)
    assert run["graph"]["mutual_share"] == turned.properties["mutual_share"] > 0
    assert run["graph"]["edges"] == run["join"]["pairs"]
    off = json.loads((finished / "current.json").read_text())
    plain = json.loads((finished / off["run_path"] / "run.json").read_text())
    assert plain["duplicates"] is plain["graph"] is None
    assert {"groups", "graph"}.isdisjoint({*off["datasets"], *plain["stages"]})


def test_only_numbers_leave_the_steps(
    index: str, joined: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    process = graph_transform._SplitEdges.process

    def recording(self: Any, number: int) -> Any:
        for element in process(self, number):
            seen.append(element)
            yield element

    monkeypatch.setattr(graph_transform._SplitEdges, "process", recording)
    neighbor_graph(settings(tmp_path), session(), index, joined.folder)
    # A bucket for each pair of shards at most, and one element for each shard itself.
    assert SHARDS < len(seen) <= SHARDS * (SHARDS + 1)
    assert all(isinstance(n, int) for target, bucket in seen for n in (target, *bucket))  # type: ignore[misc]
