"""Progress: a bar on a terminal, lines in a log, nothing on standard output."""

import io
import re
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Part
from pipelines import progress
from pipelines.progress import watch_stage
from transforms.counters import LOCAL_PROGRESS, LocalProgress


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and writes far more often than people need it."""
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.03)


def finish_part(folder: Path, name: str, units: int) -> None:
    manifests.mark_part(str(folder), Part(name, "key", units, ()))
    LOCAL_PROGRESS.add(units)


def wait_for(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Waits until a line on standard error matches, and fails when none does."""
    seen, deadline = "", time.monotonic() + 20
    while not re.search(pattern, seen, re.MULTILINE):
        assert time.monotonic() < deadline, seen
        captured = capsys.readouterr()
        assert captured.out == ""
        seen += captured.err
        time.sleep(0.005)


def test_a_log_gets_lines_with_parts_and_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with watch_stage("embed", str(tmp_path), 3, "images", console):
        wait_for(r"^embed: 0 of 3 parts$", capsys)
        finish_part(tmp_path, "part-0", 1200)
        finish_part(tmp_path, "part-1", 34)
        wait_for(r"^embed: 2 of 3 parts 1,234 images, [\d,]+/s$", capsys)


def test_a_short_stage_writes_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 10.0)
    with watch_stage("embed", str(tmp_path), 3, "images", Console(file=io.StringIO())):
        finish_part(tmp_path, "part-0", 5)
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, _environ={})
    with watch_stage("join", str(tmp_path), 2, "rows", console):
        finish_part(tmp_path, "part-0", 50)
        finish_part(tmp_path, "part-1", 50)
        time.sleep(0.05)
    assert re.search(r"join .*2/2 parts.*100 rows, [\d,]+/s", screen.getvalue())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_ends_with_the_stage_also_when_it_fails(tmp_path: Path, terminal: bool) -> None:
    before = set(threading.enumerate())
    watchers: set[threading.Thread] = set()
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with (
        pytest.raises(ZeroDivisionError),
        watch_stage("build", str(tmp_path), 1, "rows", console),
    ):
        watchers = set(threading.enumerate()) - before
        raise ZeroDivisionError
    assert watchers
    for thread in watchers:
        # The one that redraws the bar is told to end, and ends at its next look.
        thread.join(10)
        assert not thread.is_alive()


def test_units_of_an_earlier_stage_are_not_counted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LOCAL_PROGRESS.add(1_000_000)
    with watch_stage("join", str(tmp_path), 1, "rows", Console(file=io.StringIO())):
        LOCAL_PROGRESS.add(7)
        wait_for(r"^join: 0 of 1 parts 7 rows, ", capsys)


def test_units_of_many_threads_are_all_counted() -> None:
    counter = LocalProgress()
    threads = [threading.Thread(target=lambda: [counter.add(1) for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken = 0
    while any(thread.is_alive() for thread in threads):
        taken += counter.take()
    assert taken + counter.take() == 20_000
    assert counter.take() == 0
