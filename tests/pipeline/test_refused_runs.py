"""Runs that are refused: a clear message, the right exit status, and nothing published is lost."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from index_builder.datasets import manifests, storage
from index_builder.errors import DatasetError, GateError, KithError
from pipelines import cli
from pipelines.check import check_everything
from pipelines.nightly import run_nightly
from tests.catalog_fixtures import Published, copy_catalogue, flip_byte
from tests.pipeline.small_catalogue import SAMPLES, load, session, write_config


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished workspace, whose snapshot must stay published and whole."""
    shutil.copytree(finished, tmp_path / "w")
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    yield tmp_path / "w"
    assert (tmp_path / "w" / "current.json").read_bytes() == pointer


def kith(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs a command with --json; returns its status, the object, and what people read."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--json"])
    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    return int(ended.value.code or 0), json.loads(line), output.err


@pytest.fixture(autouse=True)
def kept_log_levels() -> Iterator[None]:
    """The command line quietens Beam's logs and takes argv; neither is for the tests after it."""
    import logging
    import sys
    import warnings

    argv, level = sys.argv, logging.getLogger("apache_beam").level
    with warnings.catch_warnings():
        yield
    sys.argv = argv
    logging.getLogger("apache_beam").setLevel(level)


def test_the_recall_gate_ends_with_status_1_and_describes_the_run(
    workspace: Path, catalogue: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    index = {"transform": {"type": "pca", "dim": 32}, "nlist": 12, "nprobe": 1}
    config = write_config(
        tmp_path / "c.yaml", catalogue, workspace, index=index, evaluate={"min_recall": 0.999}
    )
    earlier = {path.name for path in (workspace / "runs").iterdir()}
    status, result, text = kith(capsys, "nightly", "--config", str(config))
    assert status == 1
    assert (result["status"], result["exit_status"]) == ("failed", 1)
    assert result["error"]["kind"] == "GateError"
    message = result["error"]["message"]
    assert message in text
    for piece in ("lower bound", "evaluate.min_recall wants 0.999", "Raise index.nprobe"):
        assert piece in message
    runs = [json.loads(path.read_text()) for path in (workspace / "runs").glob("*/run.json")]
    refused = [run for run in runs if run["run_id"] not in earlier]
    assert [run["status"] for run in refused] == ["refused"]
    assert refused[0]["recall"]["lower_bound"] < 0.999 == refused[0]["recall"]["minimum"]
    assert refused[0]["export"] is None
    assert refused[0]["reason"] == message
    # The page of a refused run says why.
    page = (workspace / "runs" / refused[0]["run_id"] / "report.html").read_text()
    assert "refused" in page.lower()


def test_the_failure_gate_describes_the_run_as_far_as_it_came(
    workspace: Path, catalogue: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "c.yaml", catalogue, workspace, embeddings={"max_failed_fraction": 0.01}
    )
    earlier = {path.name for path in (workspace / "runs").iterdir()}
    status, result, _ = kith(capsys, "nightly", "--config", str(config))
    assert (status, result["error"]["kind"]) == (1, "GateError")
    (folder,) = (path for path in (workspace / "runs").iterdir() if path.name not in earlier)
    run = json.loads((folder / "run.json").read_text())
    assert (run["run_id"], run["status"]) == (folder.name, "refused")
    assert run["reason"] == result["error"]["message"]
    assert "3 of 72 images failed" in run["reason"]
    assert run["images"]["failed_by_reason"] == {"empty": 1, "truncated": 1, "unsupported_format": 1}
    assert list(run["stages"]) == ["embed"]
    assert set(run["fingerprints"]) == {"embeddings", "failures"}
    assert run["attempts"] == []
    later = ("index", "join", "recall", "truth", "duplicates", "graph", "export")
    assert [run[name] for name in later] == [None] * len(later)
    # The page says why, and which images; it can be made again.
    page = (folder / "report.html").read_text()
    assert run["reason"].split(":")[0] in page
    assert "zero_bytes.jpg" in page
    (folder / "report.html").unlink()
    status, result, _ = kith(capsys, "report", "--config", str(config), "--run", folder.name)
    assert (status, result["report_path"]) == (0, str(folder / "report.html"))
    again = (folder / "report.html").read_text()
    assert run["reason"].split(":")[0] in again
    assert "zero_bytes.jpg" in again


def test_books_that_do_not_balance_are_not_published(
    workspace: Path, catalogue: Path, tmp_path: Path
) -> None:
    path = Published(workspace).folder("embeddings") / "_manifest.json"
    document = json.loads(path.read_text())
    document["parts"][0]["properties"]["images_read"] += 1
    path.write_text(json.dumps(document))
    config = load(write_config(tmp_path / "c.yaml", catalogue, workspace))
    with pytest.raises(
        GateError, match="books do not balance: 73 images read, 0 embedded, 69 reused, 3 failed"
    ):
        run_nightly(config, session())


def test_one_id_in_two_sources_is_named_with_both_places(catalogue: Path, tmp_path: Path) -> None:
    data = copy_catalogue(catalogue, tmp_path / "data")
    (data / "more").mkdir()
    # Once beside an embedded image, once beside one that failed.
    shutil.copy(SAMPLES / "hard" / "gray16.png", data / "more" / "photo.webp")
    shutil.copy(SAMPLES / "hard" / "gray16.png", data / "more" / "zero_bytes.jpg")
    sources = [
        {"format": "files", "paths": f"{data}/hard/*"},
        {"format": "files", "paths": f"{data}/more/*"},
    ]
    config = write_config(
        tmp_path / "c.yaml", data, tmp_path / "w", images={"sources": sources}, evaluate={}, export={}
    )
    with pytest.raises(KithError, match="2 image ids occur more than once") as caught:
        run_nightly(load(config), session())
    for name in ("photo.webp", "zero_bytes.jpg"):
        assert f"{name}: hard/{name} row 0, more/{name} row 0" in str(caught.value)
    assert not (tmp_path / "w" / "current.json").exists()
    # Correcting the catalogue is all that it takes.
    shutil.rmtree(data / "more")
    (data / "more").mkdir()
    shutil.copy(SAMPLES / "hard" / "gray16.png", data / "more" / "other.png")
    assert run_nightly(load(config), session()).run["status"] == "published"


@pytest.mark.parametrize(
    ("kind", "suffix", "rerun", "stage"),
    [
        ("embeddings", ".parquet", "index", "build"),
        ("index", ".faiss", "neighbors", "join"),
        ("index", ".parquet", "neighbors", "join"),
        ("index", "trained.npz", "neighbors", "join"),
        ("neighbors", ".parquet", "recommendations", "export"),
    ],
)
def test_a_changed_byte_ends_a_stage_with_status_1(
    finished: Path, catalogue: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    kind: str, suffix: str, rerun: str, stage: str,
) -> None:  # fmt: skip
    shutil.copytree(finished, tmp_path / "w")
    snapshot = Published(tmp_path / "w")
    damaged = sorted(snapshot.folder(kind).glob(f"*{suffix}"))[0]
    flip_byte(damaged)
    shutil.rmtree(snapshot.folder(rerun))
    config = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w")
    status, result, _ = kith(capsys, stage, "--config", str(config))
    assert status == 1
    assert result["error"]["kind"] == "DatasetError"
    message = result["error"]["message"]
    assert message.startswith(f"{damaged} does not match its checksum: got sha256 ")
    assert "delete it and run the stage again" in message
    # And `check --data` finds the same without running anything.
    shutil.rmtree(snapshot.folder(rerun), ignore_errors=True)
    shutil.copytree(finished / snapshot.pointer["datasets"][rerun], snapshot.folder(rerun))
    with pytest.raises(DatasetError, match=f"{damaged.name} does not match its checksum"):
        check_everything(load(config), data=True)


def test_deleting_the_damaged_file_is_the_remedy(
    workspace: Path, finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    snapshot = Published(workspace)
    datasets = snapshot.pointer["datasets"]
    (snapshot.folder("embeddings") / "part-00001.parquet").unlink()
    shutil.rmtree(snapshot.folder("index"))
    config = load(write_config(tmp_path / "c.yaml", catalogue, workspace, nightly={"publish": False}))
    run = run_nightly(config, session()).run
    assert run["stages"]["embed"]["state"] in ("made", "resumed")
    for kind in ("embeddings", "failures", "index"):
        again, first = workspace / datasets[kind], finished / datasets[kind]
        assert manifests.load(str(again), kind).content == manifests.load(str(first), kind).content


def test_folders_that_are_no_datasets(
    workspace: Path, catalogue: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = str(write_config(tmp_path / "c.yaml", catalogue, workspace))
    snapshot = Published(workspace)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(snapshot.folder("embeddings"), unfinished)
    (unfinished / "_manifest.json").unlink()
    status, result, _ = kith(capsys, "build", "--config", config, "--embeddings", str(unfinished))
    assert (status, result["error"]["kind"]) == (1, "DatasetError")
    assert f"{unfinished} is not a complete embeddings dataset" in result["error"]["message"]
    assert "no _manifest.json" in result["error"]["message"]
    wrong = str(snapshot.folder("neighbors"))
    status, result, _ = kith(capsys, "join", "--config", config, "--index", wrong)
    assert (status, result["error"]["kind"]) == (1, "DatasetError")
    assert "kind 'neighbors', wanted 'index'" in result["error"]["message"]


def test_search_refuses_the_index_of_another_encoder(
    workspace: Path, catalogue: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = str(write_config(tmp_path / "c.yaml", catalogue, workspace))
    image = str(SAMPLES / "hard" / "photo.webp")
    overrides = ["--set", "encoder.name=resnet50", "--set", "encoder.weights=random"]
    status, result, _ = kith(capsys, "search", image, "--config", config, *overrides)
    assert (status, result["error"]["kind"]) == (1, "FingerprintError")
    message = result["error"]["message"]
    assert "encoder: the dataset has 'efficientnet_lite0', the configuration 'resnet50'" in message
    assert "Use the configuration of that index" in message


@pytest.mark.parametrize("full_at", ["/embeddings/", ".faiss", ".jsonl", "current.json"])
def test_no_space_left_anywhere(
    workspace: Path, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    sections: dict[str, Any] = {
        "index": {"transform": {"type": "pca", "dim": 24}, "shards": 2},
        "join": {"k": 4},
    }
    if full_at == "/embeddings/":
        sections["encoder"] = {"resize": "stretch"}
    config = load(write_config(tmp_path / "c.yaml", catalogue, workspace, **sections))
    before = set((workspace / "runs").glob("*/run.json"))
    replace, met = os.replace, []

    def full(source: str, target: str) -> None:
        if full_at in str(target):
            met.append(target)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(KithError, match="No space left on the device while writing") as caught:
        run_nightly(config, session())
    monkeypatch.undo()
    assert str(met[0]) in str(caught.value)
    assert "Free some space" in str(caught.value)
    after = set((workspace / "runs").glob("*/run.json"))
    assert before <= after
    runs = [json.loads(path.read_text()) for path in after - before]
    unpublished = [("failed", str(caught.value))] if full_at == "current.json" else []
    assert [(run["status"], run["reason"]) for run in runs] == unpublished
    # The unfinished file gave its space back, and what was published is whole.
    assert list(workspace.rglob(".writing-*")) == []
    earlier = load(write_config(tmp_path / "earlier.yaml", catalogue, workspace))
    assert check_everything(earlier, data=True)["verified_files"] > 10
    quiet = load(tmp_path / "c.yaml", "nightly.publish=false", "nightly.report=false")
    states = {name: s["state"] for name, s in run_nightly(quiet, session()).run["stages"].items()}
    assert (set(states.values()) == {"unchanged"}) == (full_at == "current.json")
