"""The record of a run: whenever publishing stops, it claims nothing that is not so."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from index_builder.datasets import storage
from index_builder.errors import KithError
from pipelines.publish import publish, read_pointer
from pipelines.report.build import Page
from pipelines.run_record import RunRecord, complete_published_record

DOCUMENT = {"schema_version": 1, "run_id": "r2", "images": {"read": 3}}


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """A run that is ready, in a workspace where another one is published."""
    publish(str(tmp_path), "r1", {"index": f"{tmp_path}/index/old"})
    return RunRecord(str(tmp_path / "runs" / "r2"), dict(DOCUMENT), Page({}, [], {}))


def published_run(workspace: Path) -> str:
    pointer = read_pointer(str(workspace))
    assert pointer is not None
    return str(pointer["run"])


def written(record: RunRecord) -> dict[str, Any]:
    """What `run.json` says; the page must say the same."""
    document = json.loads(Path(record.run_path).read_text())
    assert document.items() >= DOCUMENT.items()
    page = Path(str(record.report_path)).read_text()
    assert f">{document['status']}</span>" in page
    assert ("was not published" in page) == (document["status"] in ("failed", "refused"))
    assert document["reason"] is None or document["reason"] in page
    return {name: document[name] for name in ("status", "reason")}


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: BaseException) -> None:
    """Lets the n-th file of a name fail to get its name, as a kill or a full disk would."""
    replace, seen = os.replace, []

    def stopping(source: str, target: str) -> None:
        if os.path.basename(target) == name:
            seen.append(target)
            if len(seen) == number:
                raise error
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", stopping)


def publish_record(record: RunRecord, console: Console | None = None) -> tuple[dict[str, Any], str]:
    workspace = str(Path(record.folder).parents[1])
    console = console or Console(quiet=True)
    return record.publish(workspace, {"index": f"{workspace}/index/new"}, console)


def test_a_published_run_says_so(record: RunRecord, tmp_path: Path) -> None:
    run, pointer = publish_record(record)
    assert pointer == f"{tmp_path}/current.json"
    assert published_run(tmp_path) == "r2"
    assert written(record) == {"status": "published", "reason": None}
    assert run == json.loads(Path(record.run_path).read_text())


def test_killed_before_the_pointer_it_claims_nothing(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, "current.json", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        publish_record(record)
    assert published_run(tmp_path) == "r1"
    assert written(record)["status"] == "publishing"
    # The next run does not take it for a published one either.
    complete_published_record(str(tmp_path))
    assert written(record)["status"] == "publishing"


def test_killed_behind_the_pointer_the_next_run_completes_it(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, "run.json", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        publish_record(record)
    assert published_run(tmp_path) == "r2"
    assert written(record)["status"] == "publishing"
    complete_published_record(str(tmp_path))
    assert json.loads(Path(record.run_path).read_text()) == {
        **DOCUMENT,
        "status": "published",
        "reason": None,
    }


def test_a_pointer_that_cannot_be_moved_makes_a_failed_run(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    stop_at(monkeypatch, "current.json", 1, full)
    with pytest.raises(KithError, match="No space left on the device while writing") as caught:
        publish_record(record)
    assert published_run(tmp_path) == "r1"
    assert written(record) == {"status": "failed", "reason": str(caught.value)}


def test_no_room_for_the_last_word_leaves_the_run_published(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    stop_at(monkeypatch, "run.json", 2, full)
    console = Console(file=io.StringIO(), width=1000)
    run, _ = publish_record(record, console)
    assert (run["status"], published_run(tmp_path)) == ("published", "r2")
    assert written(record)["status"] == "publishing"
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert said.startswith("The run is published, but its record still says 'publishing': No space")
    complete_published_record(str(tmp_path))
    assert json.loads(Path(record.run_path).read_text())["status"] == "published"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda workspace: (workspace / "current.json").unlink(),
        lambda workspace: (workspace / "current.json").write_text("{"),
        lambda workspace: (workspace / "runs" / "r2" / "run.json").unlink(),
        lambda workspace: (workspace / "runs" / "r2" / "run.json").write_text("[]"),
        lambda workspace: None,
    ],
)
def test_there_may_be_nothing_to_complete(
    record: RunRecord, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    publish_record(record)
    spoil(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    complete_published_record(str(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
