"""Rules from the configuration to the files: the stages, what they write, and what they refuse."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from index_builder import library
from index_builder.datasets import manifests
from index_builder.errors import ConfigError, DatasetError, FingerprintError
from index_builder.index.shards import IndexDataset, open_index
from index_builder.search.short_rows import search_again
from index_builder.steps import joining
from pipelines.build_index import build_index
from pipelines.config import Config
from pipelines.evaluate_neighbors import evaluate_neighbors, read_evaluation
from pipelines.export_neighbors import export_neighbors
from pipelines.join_neighbors import join_neighbors
from pipelines.stage import Dataset
from tests.index_fixtures import Catalogue, found_neighbors
from tests.pipeline.small_catalogue import load, session
from tests.unit.rules_for_tests import expected, several_images
from tests.unit.test_exclusions import write_pairs
from transforms.item_rows import ItemRows

ROWS, K, NPROBE, SHARDS = 210, 8, 2, 3
RULES: dict[str, Any] = {
    "candidates": [{"column": "size", "in": [0, 1]}],
    "queries": [{"column": "size", "at_most": 3}],
    "max_per": {"brand": 2},
}


def configuration(folder: Path, *overrides: str, **join: Any) -> Config:
    values = {
        "workspace": str(folder / "w"),
        "index": {"nlist": 10, "nprobe": NPROBE, "shards": SHARDS},
        "join": {"k": K, "rules": RULES, **join},
        "evaluate": {"sample": 40},
        "export": {"formats": ["parquet"], "columns": ["brand"]},
    }
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return load(path, *overrides)


def import_catalogue(folder: Path, catalogue: Catalogue) -> str:
    columns = {name: catalogue.columns()[name] for name in ("brand", "size")}
    return library.import_arrays(
        catalogue.vectors, catalogue.image_ids, str(folder), items=catalogue.item_ids, columns=columns
    )


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return several_images(ROWS, 16, seed=3)


@pytest.fixture(scope="module")
def index(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    folder = tmp_path_factory.mktemp("rules")
    made = import_catalogue(folder / "embeddings", catalogue)
    return open_index(build_index(configuration(folder), session(), made).folder)


def rows_of(dataset: Dataset) -> pa.Table:
    files = [part.file(".parquet").path for part in dataset.manifest.parts]
    return pa.concat_tables([pq.read_table(Path(dataset.folder) / file) for file in files])


def bytes_of(folder: str | Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_rules_go_through_all_stages(index: IndexDataset, catalogue: Catalogue, tmp_path: Path) -> None:
    best = expected(index, catalogue, configuration(tmp_path).join_spec().rules, 1)
    pairs = [(query, ids[0]) for query, (ids, _) in best.items() if ids][::2]
    path = write_pairs(tmp_path / "pairs.parquet", pairs)
    rules = RULES | {"exclude": {"paths": path, "symmetric": True}}
    config = configuration(tmp_path, rules=rules, max_probe=10, evidence=["margin"])
    joined = join_neighbors(config, session(), index.folder)
    table, figures = rows_of(joined), joined.manifest.properties
    settled = dataclasses.replace(config.join_spec().rules, exclude=joining_rule(joined))
    # All lists are probed for what the first two left short, and whatever is exhausted is complete.
    whole = expected(index, catalogue, settled, K, excluded=pairs)
    first = expected(index, catalogue, settled, K, NPROBE, excluded=pairs)
    found = found_neighbors(table)
    assert found == {query: row if len(row[0]) == K else whole[query] for query, row in first.items()}
    assert table.column_names[6] == "margins"
    assert figures["filtered"] == ROWS - len(found) > 0
    assert figures["widened"] > 0 == figures["capped"]
    assert figures["filled"] + figures["exhausted"] == len(found) == joined.manifest.rows
    assert figures["rules"]["max_per"] == (("brand", 2),)
    assert str(tmp_path) not in json.dumps(joined.manifest.to_json())
    # The same again: nothing to do. Another content of the pairs: another dataset.
    assert join_neighbors(config, session(), index.folder).state == "unchanged"
    evaluated = read_evaluation(evaluate_neighbors(config, session(), index.folder, joined.folder))
    assert evaluated["recall"]["estimate"] > 0.5
    write_pairs(tmp_path / "pairs.parquet", pairs[1:])
    with pytest.raises(FingerprintError, match="was joined with"):
        evaluate_neighbors(config, session(), index.folder, joined.folder)
    assert join_neighbors(config, session(), index.folder).folder != joined.folder


def joining_rule(joined: Dataset) -> Any:
    """The exclusions as the manifest names them."""
    from index_builder.rules.rules import ExclusionRule

    value = joined.manifest.properties["rules"]["exclude"]
    return ExclusionRule(
        tuple(value["tokens"]), value["by"], tuple(value["columns"]), value["symmetric"]
    )


def test_a_join_killed_at_the_second_search_goes_on(
    index: IndexDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, rules=RULES | {"same": ["size"]})
    whole = join_neighbors(
        configuration(tmp_path / "a", rules=config_rules(config)), session(), index.folder
    )
    calls = []
    original = search_again

    def dying(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(joining, "search_again", dying)
        with pytest.raises(Exception, match="killed"):
            join_neighbors(config, session(), index.folder)
    folder = next((tmp_path / "w" / "neighbors").iterdir())
    assert not manifests.is_complete(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(joining, "join_queries", None)
        resumed = join_neighbors(config, session(), index.folder)
    assert resumed.state == "resumed"
    assert bytes_of(resumed.folder) == bytes_of(whole.folder)


def config_rules(config: Config) -> dict[str, Any]:
    rules: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)["join"]["rules"]
    return rules


def test_the_export_by_item_has_a_row_an_item(
    index: IndexDataset, catalogue: Catalogue, tmp_path: Path
) -> None:
    rules = {"max_per": {"brand": 2}}
    config = configuration(tmp_path, "export.by=item", rules=rules, max_probe=0)
    joined = join_neighbors(config, session(), index.folder)
    exported = export_neighbors(config, session(), joined.folder)
    assert exported.manifest.properties["items"] == {"k": K, "max_per": (("brand", 2),)}
    images = expected(index, catalogue, config.join_spec().rules, K, NPROBE)
    assert catalogue.item_ids is not None
    item_of = dict(zip(catalogue.image_ids, catalogue.item_ids, strict=True))
    rows = {row["query_id"]: row["neighbors"] for row in rows_of(exported).to_pylist()}
    assert sorted(rows) == sorted(set(catalogue.item_ids))
    assert len(rows) == exported.manifest.rows
    for item, found in rows.items():
        candidates = [
            (-score, image)
            for query, (ids, scores) in images.items()
            if item_of[query] == item
            for image, score in zip(ids, scores, strict=True)
        ]
        best = min(candidates)
        assert (found[0]["id"], found[0]["image_id"]) == (item_of[best[1]], best[1])
        assert found[0]["score"] == -best[0]
        assert len({one["id"] for one in found}) == len(found) <= K
        brands = [one["brand"] for one in found if one["brand"] is not None]
        assert all(brands.count(brand) <= 2 for brand in brands)
    assert config.export_spec().items == ItemRows(K, (("brand", 2),))


def refusals(tmp_path: Path) -> list[tuple[dict[str, Any], type[Exception], str]]:
    path = write_pairs(tmp_path / "pairs.parquet", [("nobody", "no one")])
    return [
        (
            {"candidates": [{"column": "colour", "equals": "red"}]},
            ConfigError,
            "The join needs the column 'colour'",
        ),
        (
            {"candidates": [{"column": "size", "equals": "red"}]},
            ConfigError,
            "join.rules.candidates.0.equals: got 'red' (str) for the column 'size', which is int64",
        ),
        ({"max_per": {"colour": 1}}, ConfigError, "The join needs the column 'colour'"),
        ({"max_per": {"size": 1}}, ConfigError, "items have different values of 'size'"),
        ({"exclude": {"paths": path}}, DatasetError, "1 of 1 pairs name an image_id"),
        ({"exclude": {"paths": path + "x"}}, ConfigError, "no file matches"),
        ({"exclude": {"paths": path, "query_column": "q"}}, ConfigError, "has 0 columns 'q'"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_rules_that_do_not_fit_stop_before_any_work(
    case: int, index: IndexDataset, tmp_path: Path
) -> None:
    rules, kind, message = refusals(tmp_path)[case]
    with pytest.raises(kind) as caught:
        join_neighbors(configuration(tmp_path, rules=rules), session(), index.folder)
    assert message in str(caught.value)
    written = [path for path in (tmp_path / "w").rglob("*") if path.is_file() and path.name != ".lock"]
    assert written == []


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ({"k": 0}, "join.k: got 0, wanted: Input should be greater than or equal to 1"),
        (
            {"rules": {"max_per": {"brand": 1, "size": 2}}},
            "wanted: max_per has 2 columns (brand, size), wanted one: the best under several caps "
            "cannot be kept",
        ),
        ({"rules": {"max_per": {"brand": 0}}}, "join.rules.max_per.brand: got 0"),
        (
            {"rules": {"candidates": [{"column": "brand"}]}},
            "the condition on 'brand' tests nothing, wanted at least one of equals, in, not_in",
        ),
        (
            {"rules": {"candidates": [{"column": "brand", "inn": ["a"]}]}},
            "join.rules.candidates.0.inn: unknown key. Did you mean 'in'?",
        ),
        ({"rules": {"exclude": {"paths": [], "by": "brand"}}}, "join.rules.exclude.by: got 'brand'"),
        ({"max_probe": -1}, "join.max_probe: got -1"),
        ({"evidence": ["rank"]}, "join.evidence.0: got 'rank'"),
    ],
)
def test_a_wrong_configuration_of_rules_is_explained(
    join: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration(tmp_path, **join)
    assert message in str(caught.value)


def test_a_configuration_that_was_written_down_can_be_read_again(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    again = configuration(tmp_path, rules=config_rules(config))
    assert again.join_spec() == config.join_spec()
    assert config.join_spec().rules.candidates[0].one_of == (0, 1)
