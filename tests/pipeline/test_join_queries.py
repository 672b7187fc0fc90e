"""kith join --queries: another catalogue, or a list of new items, against an index that is there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from index_builder import library
from index_builder.datasets import manifests
from index_builder.errors import ConfigError, DatasetError, FingerprintError
from index_builder.library import IndexSpec, JoinRules, JoinSpec
from index_builder.rules.conditions import Condition
from index_builder.search import neighbors
from index_builder.search.groups import GroupsRef
from index_builder.steps import queries
from pipelines.build_index import build_index
from pipelines.cli import app
from pipelines.config import Config
from pipelines.evaluate_neighbors import evaluate_neighbors
from pipelines.export_neighbors import export_neighbors
from pipelines.find_groups import find_groups
from pipelines.join_neighbors import join_neighbors
from pipelines.join_queries import join_queries
from pipelines.stage import MADE, UNCHANGED
from tests.pipeline.small_catalogue import load, session

CORPUS, ASKED, DIM = 400, 130, 16
INDEX = IndexSpec(nlist=10, nprobe=3, shards=4)


def import_side(folder: Path, rows: int, seed: int, prefix: str, **options: Any) -> str:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(8, DIM))[rng.integers(8, size=rows)] + rng.normal(size=(rows, DIM))
    columns = {"brand": [f"b{row % 5}" for row in range(rows)], "stock": list(range(rows))}
    ids = [f"{prefix}{row:03d}" for row in range(rows)]
    return library.import_arrays(vectors, ids, str(folder), columns=columns, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of a corpus and of queries, and the corpus's index, made without Beam."""
    folder = tmp_path_factory.mktemp("made")
    corpus = import_side(folder / "corpus", CORPUS, 0, "c")
    import_side(folder / "asked", ASKED, 0, "q")
    library.build(corpus, str(folder / "index"), INDEX)
    return folder


def configuration(folder: Path, **sections: Any) -> Config:
    values = {
        "workspace": str(folder / "w"),
        "index": {"nlist": 10, "nprobe": 3, "shards": 4},
        "join": {"k": 5, "rules": {"different": ["brand"]}},
        "export": {"columns": ["brand", "stock"]},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return load(path)


SPEC = JoinSpec(5, JoinRules(different=("brand",)), columns=("brand", "stock"))


def same_files(left: str, right: str) -> bool:
    """Whether two datasets have the same files with the same bytes, manifests included."""
    names = [sorted(path.name for path in Path(folder).iterdir()) for folder in (left, right)]
    return names[0] == names[1] and all(
        (Path(left) / name).read_bytes() == (Path(right) / name).read_bytes() for name in names[0]
    )


def test_the_pipelines_and_the_library_write_the_same_bytes(made: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path)
    index = build_index(config, session(), str(made / "corpus"))
    assert same_files(index.folder, str(made / "index"))
    joined = join_neighbors(config, session(), index.folder)
    assert same_files(joined.folder, library.join(index.folder, str(tmp_path / "n"), SPEC))
    found = join_queries(config, session(), index.folder, str(made / "asked"))
    mine = library.make_queries(str(made / "asked"), index.folder, str(tmp_path / "q"))
    assert same_files(found.queries.folder, mine)
    assert len(queries.open_queries(mine).manifest.parts) == 2
    mine = library.join(index.folder, str(tmp_path / "qn"), SPEC, queries_folder=mine)
    assert same_files(found.neighbors.folder, mine)
    assert found.neighbors.counters["join.queries"] == ASKED
    assert found.queries.counters["queries.vectors_in"] == ASKED
    # What the library made is as good as what the pipelines make.
    again = join_neighbors(config, session(), str(made / "index"))
    assert (again.state, again.folder) == (UNCHANGED, joined.folder)


def test_the_command_joins_queries_and_the_export_takes_them(made: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path)
    arguments = ["join", "--config", str(tmp_path / "c.yaml"), "--index", str(made / "index"), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--queries", str(made / "asked")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["status"], report["rows"]) == ("done", ASKED)
    assert report["figures"]["pairs"] > 4 * ASKED
    manifest = manifests.load(report["neighbors"], neighbors.KIND)
    assert manifest.properties["queries"] == queries.open_queries(report["queries"]).manifest.content
    assert manifest.properties["index"] == manifests.load(str(made / "index"), "index").content
    rows = library.read_neighbors(report["neighbors"])
    assert sorted(rows["query_id"].to_pylist()) == [f"q{row:03d}" for row in range(ASKED)]
    for row in rows.to_pylist():
        assert row["query_brand"] not in row["neighbor_brand"]
    exported = export_neighbors(config, session(), report["neighbors"])
    assert exported.manifest.rows == ASKED
    with pytest.raises(FingerprintError, match="queries that are not in the index"):
        evaluate_neighbors(config, session(), str(made / "index"), report["neighbors"])


def test_candidates_have_the_columns_of_their_groups(made: Path, tmp_path: Path) -> None:
    rules = {"candidates": [{"column": "is_representative", "equals": True}], "max_per": {"group": 1}}
    sections: dict[str, Any] = {
        "duplicates": {"threshold": 0.8},
        "export": {"columns": ["brand", "group", "group_size"]},
    }
    config = configuration(tmp_path, join={"k": 5, "rules": rules}, **sections)
    index, asked = str(made / "index"), str(made / "asked")
    with pytest.raises(DatasetError, match="are none for this index.*Run kith groups"):
        join_queries(config, session(), index, asked)
    grouped = find_groups(config, session(), index)
    found = join_queries(config, session(), index, asked)
    rows = library.read_neighbors(found.neighbors.folder).to_pylist()
    by_id = {}
    for part in grouped.manifest.parts:
        table = pq.read_table(Path(grouped.folder) / f"{part.name}.parquet")
        by_id |= {row["image_id"]: row for row in table.to_pylist()}
    assert len({row["group"] for row in by_id.values()}) < CORPUS - 50
    # All that may be found, best first, from a join without rules that searches the same lists.
    plain = configuration(tmp_path, join={"k": CORPUS, "max_probe": 0})
    everything = library.read_neighbors(join_queries(plain, session(), index, asked).neighbors.folder)
    whole = dict(
        zip(everything["query_id"].to_pylist(), everything["neighbor_ids"].to_pylist(), strict=True)
    )
    filled = [row for row in rows if row["status"] == "filled"]
    assert len(filled) > 0.9 * ASKED
    for row in rows:
        eligible = [name for name in whole[row["query_id"]] if by_id[name]["is_representative"]]
        if len(eligible) >= 5:  # Others were searched again in more lists.
            assert row["neighbor_ids"] == eligible[:5]
        assert row["neighbor_group"] == row["neighbor_ids"]
        assert row["neighbor_group_size"] == [by_id[n]["group_size"] for n in row["neighbor_ids"]]
        assert (row["query_group"], row["query_group_size"]) == (None, None)
    spec = JoinSpec(
        5,
        JoinRules(candidates=(Condition("is_representative", equals=True),), max_per=(("group", 1),)),
        columns=("brand", "group", "group_size"),
        groups=GroupsRef(grouped.folder, grouped.manifest.content),
    )
    mine = library.join(index, str(tmp_path / "n"), spec, queries_folder=found.queries.folder)
    assert same_files(found.neighbors.folder, mine)
    # Groups that were changed are met by their checksum, as a changed shard is.
    path = Path(grouped.folder) / "part-00001.parquet"
    pq.write_table(pq.read_table(path), path, compression="NONE")
    with pytest.raises(DatasetError, match=r"groups/.*part-00001\.parquet does not match its checksum"):
        library.join(index, str(tmp_path / "again"), spec, queries_folder=found.queries.folder)


@pytest.mark.parametrize("key", ["same", "different"])
def test_queries_have_no_groups_to_compare(key: str, made: Path, tmp_path: Path) -> None:
    config = configuration(
        tmp_path, join={"k": 5, "rules": {key: ["group"]}}, duplicates={"threshold": 0.8}
    )
    find_groups(config, session(), str(made / "index"))
    text = r"join\.rules: .*'group'.* near-duplicate groups, which .* not rows of the index"
    with pytest.raises(ConfigError, match=text):
        join_queries(config, session(), str(made / "index"), str(made / "asked"))
    assert not (tmp_path / "w" / "queries").exists()


def test_a_list_of_new_items(made: Path, tmp_path: Path) -> None:
    config, index, asked = configuration(tmp_path), str(made / "index"), str(made / "asked")
    whole = join_queries(config, session(), index, asked)
    (tmp_path / "ids.txt").write_text("q100\nq007\nq100\n")
    pq.write_table(pa.table({"image_id": ["q007", "q100"]}), tmp_path / "ids.parquet")
    some = join_queries(config, session(), index, asked, str(tmp_path / "ids.txt"))
    same = join_queries(config, session(), index, asked, str(tmp_path / "ids.parquet"))
    assert (some.neighbors.state, same.neighbors.state) == (MADE, UNCHANGED)
    tables = [
        {row["query_id"]: row for row in library.read_neighbors(one.neighbors.folder).to_pylist()}
        for one in (whole, some)
    ]
    assert sorted(tables[1]) == ["q007", "q100"]
    for name, row in tables[1].items():
        assert row | {"query_row": 0} == tables[0][name] | {"query_row": 0}
    (tmp_path / "ids.txt").write_text("q100\nx1\nx2\n")
    before = sorted((tmp_path / "w").rglob("*"))
    with pytest.raises(ConfigError, match=r"2 of 3 image ids are not in .*first: 'x1', 'x2'"):
        join_queries(config, session(), index, asked, str(tmp_path / "ids.txt"))
    assert sorted((tmp_path / "w").rglob("*")) == before


def test_the_metadata_table_is_joined_to_queries_too(made: Path, tmp_path: Path) -> None:
    names = [f"{prefix}{row:03d}" for prefix in "cq" for row in range(100)]
    seasons = {name: ("summer", "winter", None)[int(name[1:]) % 3] for name in names}
    table = pa.table({"item_id": names, "season": list(seasons.values())})
    pq.write_table(table, tmp_path / "table.parquet")
    metadata = {"paths": str(tmp_path / "table.parquet"), "columns": {"season": "string"}}
    config = configuration(
        tmp_path,
        catalog={"metadata": metadata},
        join={"k": 5, "rules": {"same": ["season"]}},
        export={"columns": ["season"]},
    )
    index = build_index(config, session(), str(made / "corpus"))
    found = join_queries(config, session(), index.folder, str(made / "asked"))
    for row in library.read_neighbors(found.neighbors.folder).to_pylist():
        season = seasons.get(row["query_id"])
        assert row["query_season"] == season
        assert row["neighbor_season"] == [season] * (0 if season is None else 5)


def test_an_interrupted_join_goes_on_with_the_queries_that_were_made(
    made: Path, tmp_path: Path
) -> None:
    config, asked = configuration(tmp_path), str(made / "asked")
    index = shutil.copytree(made / "index", tmp_path / "index")
    shard = index / "shard-00003.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(DatasetError, match=r"shard-00003\.parquet does not match its checksum"):
        join_queries(config, session(), str(index), asked)
    assert not list((tmp_path / "w" / "neighbors").glob("*/_manifest.json"))
    shard.write_bytes(good)
    found = join_queries(config, session(), str(index), asked)
    assert found.queries.state == UNCHANGED
    made_queries = library.make_queries(asked, str(index), str(tmp_path / "q"))
    straight = library.join(str(index), str(tmp_path / "n"), SPEC, queries_folder=made_queries)
    assert same_files(found.neighbors.folder, straight)


def test_what_does_not_belong_together_is_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    config, index = configuration(tmp_path), str(made / "index")
    other = import_side(tmp_path / "other", 20, 3, "o", encoder="another")
    with pytest.raises(FingerprintError, match="encoder: the queries have 'another', the index 'imp"):
        join_queries(config, session(), index, other)
    bare = library.import_arrays(np.eye(3, DIM), ["a", "b", "c"], str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="join.rules.different: there is no column 'brand'"):
        join_queries(config, session(), index, bare)
    twice = shutil.copytree(made / "asked", tmp_path / "twice")
    path = twice / "_manifest.json"
    value = manifests.load(str(twice), "embeddings")
    doubled = manifests.Manifest(
        value.kind, value.fingerprint, value.fingerprints, value.schema,
        (*value.parts, *value.parts), value.properties,
    )  # fmt: skip
    path.write_text(json.dumps(doubled.to_json()))
    with pytest.raises(Exception, match=f"{ASKED} image ids occur more than once"):
        join_queries(config, session(), index, str(twice))
    runner = CliRunner().invoke(
        app, ["join", "--config", str(tmp_path / "c.yaml"), "--limit-ids", "ids.txt", "--json"]
    )
    assert runner.exit_code == 2
    assert "--limit-ids takes images of --queries" in json.loads(runner.stdout)["error"]["message"]
    assert not (tmp_path / "w" / "neighbors").exists()
