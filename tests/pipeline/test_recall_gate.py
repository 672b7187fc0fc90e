"""Recall as a promise, through whole runs: calibrated, certified, raised, refused."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from index_builder.datasets import manifests
from index_builder.errors import GateError
from index_builder.index import spec as index_spec
from index_builder.index.shards import SHARED_PART
from index_builder.index.spec import IndexSpec
from index_builder.index.training import load_trained
from index_builder.recall import calibration
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.recall import Promise
from index_builder.rules.exclusions import ExclusionSpec, find_exclusions
from index_builder.rules.rules import JoinRules
from index_builder.steps import building, nprobe_choice
from index_builder.steps.build_spec import BuildSpec, Retry
from pipelines.build_index import define_pipeline, next_attempt
from pipelines.config import Config
from pipelines.evaluate_neighbors import evaluate_neighbors, read_evaluation
from pipelines.locate import find_embeddings, find_index, find_neighbors
from pipelines.nightly import run_nightly
from pipelines.runners import RunnerSpec, run_pipeline
from pipelines.stage import Session
from tests.index_fixtures import clustered_catalogue, write_embeddings
from tests.pipeline.small_catalogue import load, session, write_catalogue, write_config
from tests.unit.test_exclusions import write_pairs

INDEX = {"transform": {"type": "pca", "dim": 32}, "nlist": 32, "shards": 3}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, so that the images are embedded once."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(autouse=True)
def probe_small_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images would be compared all with all otherwise."""
    monkeypatch.setattr(index_spec, "LEAST_GAIN_OF_LISTS", 0)


def configured(folder: Path, catalogue: Path, workspace: Path, **evaluate: Any) -> Config:
    # 69 images are measured whole: 35 is more than half of them.
    evaluate = {"sample": 35, "recall_by": "category", **evaluate}
    # Rows with too few neighbours would be searched again, and recall would hardly fall.
    sections = {"join": {"k": 5, "max_probe": 0}, "nightly": {"report": False}}
    path = folder / "c.yaml"
    return load(write_config(path, catalogue, workspace, index=INDEX, evaluate=evaluate, **sections))


def test_a_calibrated_run_keeps_its_promise(catalogue: Path, workspace: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, catalogue, workspace, min_recall=0.95)
    run = run_nightly(config, session()).run
    recall = run["recall"]
    assert run["status"] == "published"
    assert recall["target"] == recall["minimum"] == 0.95
    assert recall["estimate"] == recall["lower_bound"] >= 0.95
    assert recall["queries"] == recall["rows"] == run["index"]["rows"]
    assert (recall["k"], recall["seed"], recall["nlist"]) == (5, 1, run["index"]["nlist"])
    assert [attempt["nprobe"] for attempt in run["attempts"]] == [recall["nprobe"]]
    # The choice was made on the same whole catalogue, so it foretold the figure exactly.
    index = manifests.load(find_index(config), "index")
    chosen = index.properties["calibration"]
    assert chosen["nprobe"] == recall["nprobe"] == index.properties["nprobe"] < recall["nlist"]
    assert chosen["estimate"] == pytest.approx(recall["estimate"])
    # By category: every row is of one, and the whole is their mean.
    assert recall["by"] == "category"
    by_value = recall["values"]
    assert sum(value["queries"] for value in by_value) == recall["rows"]
    total = sum(value["estimate"] * value["queries"] for value in by_value)
    assert total / recall["rows"] == pytest.approx(recall["estimate"])
    assert all(value["lower_bound"] == value["estimate"] for value in by_value)
    # PCA to 32 dimensions of 69 images moves some neighbours.
    assert 0.3 < recall["encoder_recall"] <= 1
    assert recall["encoder_queries"] == recall["rows"]
    evaluation = manifests.load(run["stages"]["evaluate"]["path"], "evaluation")
    assert evaluation.properties["certificate"] == {
        name: value for name, value in recall.items() if name != "minimum"
    }


def too_few_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets calibration be wrong: one list, whatever its sample says."""
    choose = calibration.choose_nprobe
    monkeypatch.setattr(
        calibration, "choose_nprobe", lambda *arguments: choose(*arguments) | {"nprobe": 1}
    )


def test_nprobe_is_raised_until_the_promise_is_kept(
    catalogue: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_few_lists(monkeypatch)
    config = configured(tmp_path, catalogue, workspace, min_recall=0.6, max_attempts=9)
    with open(tmp_path / "console", "w") as file:
        run = run_nightly(
            config, Session(RunnerSpec("DirectRunner"), Console(file=file, width=500))
        ).run
    attempts = run["attempts"]
    assert run["status"] == "published"
    assert len(attempts) > 1
    assert [attempt["attempt"] for attempt in attempts] == list(range(1, len(attempts) + 1))
    assert [attempt["nprobe"] for attempt in attempts] == [1, 2, 3, 4, 6, 9, 13][: len(attempts)]
    assert [attempt["confidence"] for attempt in attempts] == pytest.approx(
        [1 - 0.05 / 2 ** attempt["attempt"] for attempt in attempts]
    )
    bounds = [attempt["lower_bound"] for attempt in attempts]
    assert max(bounds[:-1]) < 0.6 <= bounds[-1] == run["recall"]["lower_bound"]
    assert "wanted 0.6; trying nprobe 2 (attempt 2 of 9)" in (tmp_path / "console").read_text()
    # Stages that run alone take the index that was published, and find the same.
    pointer = json.loads((workspace / "current.json").read_text())
    folder = find_index(config)
    assert folder == str(workspace / pointer["datasets"]["index"])
    trained = {path.read_bytes() for path in (workspace / "index").glob("*/trained.npz")}
    assert len(trained) == 1
    neighbors = find_neighbors(config, folder)
    source = find_embeddings(config)[0]
    alone = evaluate_neighbors(config, session(), folder, neighbors, source)
    assert alone.state == "unchanged"
    assert read_evaluation(alone)["recall"]["nprobe"] == attempts[-1]["nprobe"]


def test_a_promise_that_cannot_be_kept_is_not_published(
    catalogue: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_few_lists(monkeypatch)
    published = workspace / "current.json"
    before = published.read_bytes() if published.exists() else None
    config = configured(tmp_path, catalogue, workspace, min_recall=0.96, max_attempts=2)
    runs = set((workspace / "runs").glob("*")) if before else set()
    with pytest.raises(GateError, match=r"nprobe 2 of \d+ lists\), evaluate\.min_recall wants 0\.96"):
        run_nightly(config, session())
    assert (published.read_bytes() if published.exists() else None) == before
    (folder,) = set((workspace / "runs").glob("*")) - runs
    refused = json.loads((folder / "run.json").read_text())
    assert refused["status"] == "refused"
    assert [attempt["nprobe"] for attempt in refused["attempts"]] == [1, 2]


def test_a_given_nprobe_is_never_raised(catalogue: Path, workspace: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, catalogue, workspace, min_recall=0.96)
    fixed = load(tmp_path / "c.yaml", "index.nprobe=1")
    assert fixed.calibration_spec() is None
    assert fixed.promise().attempts == 1 < config.promise().attempts
    properties = {"attempt": 1, "nprobe": 1, "nlist": 32, "calibration": None, "refine": None}
    built = manifests.Manifest("index", "f", {}, [], (), properties)
    assert next_attempt(config, "index", built) is None
    chosen = manifests.Manifest("index", "f", {}, [], (), properties | {"calibration": {}})
    assert next_attempt(fixed, "index", chosen) is None
    assert next_attempt(config, "index", chosen) == Retry(2, 2, "index", {})
    all_lists = manifests.Manifest("index", "f", {}, [], (), chosen.properties | {"nprobe": 32})
    assert next_attempt(config, "index", all_lists) is None


def test_a_pipeline_chooses_as_a_plain_loop_does_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = clustered_catalogue(300, 16, centres=40)
    parts = tuple(write_embeddings(tmp_path / "source", catalogue, parts=4))
    request = IndexSpec(nlist=24, shards=2).resolve(300, 16)
    ids = catalogue.image_ids
    path = write_pairs(tmp_path / "pairs.parquet", list(itertools.pairwise(ids)))
    files = find_exclusions(ExclusionSpec((path,), symmetric=True))
    spec = BuildSpec(
        str(tmp_path / "source"), parts, request, str(tmp_path / "looped"), "key",
        calibration=CalibrationSpec(Promise(0.9, sample=100, attempts=3), 5, JoinRules(), files),
    )  # fmt: skip
    nprobe_choice.calibrate(spec, load_trained(building.train(spec)))
    figures = nprobe_choice.settled_calibration(spec)
    assert figures is not None
    assert 1 <= figures["nprobe"] < 24
    assert figures["queries"] == 100
    piped = dataclasses.replace(spec, index_folder=str(tmp_path / "piped"))
    run_pipeline(lambda root: define_pipeline(root, piped), session().runner)
    assert nprobe_choice.settled_calibration(piped) == figures
    # An interrupted build goes on with the choice that it had made.
    monkeypatch.delattr(calibration, "choose_nprobe")
    run_pipeline(lambda root: define_pipeline(root, spec), session().runner)
    shared = manifests.finished_part(spec.index_folder, SHARED_PART, "key")
    assert shared is not None
    assert (shared.properties["calibration"], shared.properties["attempt"]) == (figures, 1)
    assert shared.properties["nprobe"] == figures["nprobe"]
