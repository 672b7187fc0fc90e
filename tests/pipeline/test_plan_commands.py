"""`--plan` and `--merge` on a finished workspace, and what a run says of its predictions."""

import json
from pathlib import Path
from typing import Any

import faiss
import pytest

from index_builder.index import shards
from pipelines import cli
from tests.catalog_fixtures import Published


def kith(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Runs the command line in this process; returns its JSON."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    document: dict[str, Any] = json.loads(captured.out)
    return document


@pytest.fixture
def config(finished: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["kith"])
    monkeypatch.setattr("pipelines.plan_report._CALIBRATION_SECONDS", 0.001)
    return str(finished.parent / "c.yaml")


def test_plans_of_a_catalogue(finished: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in finished.iterdir())
    planned = kith(capsys, "build", "--plan", "--config", config)
    index = Published(finished).manifest("index")
    chosen = {name: index.properties[name] for name in planned["choices"]}
    assert planned["choices"] == chosen
    assert planned["stage"] == "build"
    assert len(planned["reasons"]) == 5
    assert 0 < planned["seconds"] < 600
    assert planned["join_task_memory_bytes"] < planned["memory_limit_bytes"] == 8 << 30

    joined = kith(capsys, "join", "--plan", "--config", config)
    # Every list is probed, so all pairs are scored, in all shards.
    assert joined["pairs"] == index.rows**2 == planned["pairs"]
    assert joined["fan_out"] == index.properties["shards"] == 3
    # Nothing was made or left behind.
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_plan_of_what_would_be_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "--plan", "--config", config, "--set", "index.memory_limit_gib=0.01"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "index.memory_limit_gib allows 10.2 MiB. " in capsys.readouterr().err


def test_merging_a_finished_index(
    config: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.faiss"
    document = kith(capsys, "build", "--config", config, "--merge", str(path))
    assert document["state"] == "unchanged"
    rows = Published(finished).manifest("index").rows
    assert document["merged"] == {
        "faiss_path": str(path),
        "ids_path": str(tmp_path / "items.parquet"),
        "rows": rows,
        "bytes": path.stat().st_size,
    }
    index = shards.open_index(document["index"])
    assert faiss.read_index(str(path)).ntotal == rows == index.layout.rows


def test_a_run_holds_what_was_predicted_against_what_was_seen(finished: Path) -> None:
    # The first run made everything; other tests may have run again over it.
    first = min(finished.glob("runs/*/run.json"))
    stages = json.loads(first.read_text())["stages"]
    for name in ("build", "join"):
        predicted, actual = stages[name]["predicted"], stages[name]["actual"]
        assert 1 / 1.3 < predicted["memory_bytes"] / actual["memory_bytes"] < 1.3
        assert actual["memory_at_start_bytes"] <= actual["memory_bytes"]
        assert 0 < actual["seconds"] <= stages[name]["seconds"]
        assert predicted["seconds"] > 0
    assert "predicted" not in stages["embed"]
