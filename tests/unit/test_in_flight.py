"""Marks outlive the process that set them, and a living process's marks are nobody else's."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from transforms.in_flight import InFlightMarks

ROOT = Path(__file__).parents[2]


def open_marks(folder: Path, threads: int = 3, name: str = "part-7") -> InFlightMarks:
    return InFlightMarks.open(str(folder), name, threads)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process on the same task with the ordinals 4 and 9 in flight, alive until killed."""
    script = (
        "import sys, time\n"
        "from transforms.in_flight import InFlightMarks\n"
        "marks = InFlightMarks.open(sys.argv[1], 'part-7', 3)\n"
        "marks.set(0, 9), marks.set(1, 2), marks.set(2, 4), marks.clear(1)\n"
        "print(sorted(marks.suspects), flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "m")],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "[]\n"
    yield process
    process.kill()
    process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def leave(folder: Path, *ordinals: int) -> None:
    """Leaves the files as a dead process would: nothing is cleared, nothing is finished."""
    with open_marks(folder, len(ordinals)) as marks:
        for slot, ordinal in enumerate(ordinals):
            marks.set(slot, ordinal)


def test_a_new_task_suspects_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    with open_marks(tmp_path / "a" / "b") as marks:
        assert marks.suspects == frozenset()
        for ordinal in range(100):
            marks.set(ordinal % 3, ordinal)
            marks.clear(ordinal % 3)
        assert files(tmp_path / "a" / "b") == ["part-7.0.marks"]
        marks.finish()
    # The folder is gone as well.
    assert files(tmp_path / "a") == []


def test_what_a_killed_process_had_in_flight_is_suspected(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    kill(other_process)
    with open_marks(tmp_path / "m") as marks:
        assert marks.suspects == {4, 9}
        assert files(tmp_path / "m") == ["part-7.0.marks", "part-7.0.suspects.json"]
        marks.finish()
    assert not (tmp_path / "m").exists()


def test_a_living_process_is_not_suspected_and_not_disturbed(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    with open_marks(tmp_path / "m") as marks:
        assert marks.suspects == frozenset()
        marks.set(0, 6)
        assert files(tmp_path / "m") == ["part-7.0.marks", "part-7.1.marks"]
        marks.finish()
    assert files(tmp_path / "m") == ["part-7.0.marks"]
    kill(other_process)
    with open_marks(tmp_path / "m") as marks:
        assert marks.suspects == {4, 9}


def test_two_dead_processes_are_taken_together(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    # A backup worker that died first, while the other one was alive.
    leave(tmp_path / "m", 20)
    assert files(tmp_path / "m") == ["part-7.0.marks", "part-7.1.marks"]
    kill(other_process)
    with open_marks(tmp_path / "m") as marks:
        assert marks.suspects == {4, 9, 20}
        assert files(tmp_path / "m") == ["part-7.0.marks", "part-7.0.suspects.json"]


def test_suspects_survive_crash_after_crash(tmp_path: Path) -> None:
    for ordinal, before in ((0, set()), (7, {0}), (3, {0, 7}), (3, {0, 3, 7})):
        with open_marks(tmp_path) as marks:
            assert marks.suspects == before
            marks.set(1, ordinal)
    with open_marks(tmp_path) as marks:
        assert marks.suspects == {0, 3, 7}


def test_an_image_found_suspicious_is_remembered(tmp_path: Path) -> None:
    with open_marks(tmp_path) as marks:
        marks.suspect(11)
        marks.suspect(5)
        assert marks.suspects == {5, 11}
    with open_marks(tmp_path) as marks:
        assert marks.suspects == {5, 11}


def test_the_number_of_threads_may_change(tmp_path: Path) -> None:
    leave(tmp_path, 1, 2, 3, 4, 5)
    with open_marks(tmp_path, threads=1) as marks:
        assert marks.suspects == {1, 2, 3, 4, 5}
        marks.set(0, 6)
    with open_marks(tmp_path, threads=9) as marks:
        assert marks.suspects == {1, 2, 3, 4, 5, 6}
        marks.set(8, 2**40)
    with open_marks(tmp_path) as marks:
        assert 2**40 in marks.suspects


def test_tasks_do_not_share_suspects(tmp_path: Path) -> None:
    leave(tmp_path, 1)
    # A name is no pattern, and not the beginning of another one's.
    for name in ("part", "part-", "part-7.0", "part-*", "part-[7]"):
        with open_marks(tmp_path, name=name) as marks:
            assert marks.suspects == frozenset()
            marks.finish()
    assert files(tmp_path) == ["part-7.0.marks"]


def test_a_crash_before_the_marks_are_wiped_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, 1)

    def full(descriptor: int, size: int) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(OSError, match="the disk is full"):
            open_marks(tmp_path)
    assert json.loads((tmp_path / "part-7.0.suspects.json").read_text()) == [1]
    with open_marks(tmp_path) as marks:
        assert marks.suspects == {1}


def test_a_crash_while_the_suspects_are_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, 1)

    def killed(source: str, target: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            open_marks(tmp_path)
    assert len(files(tmp_path)) == 2
    leave(tmp_path, 2)
    with open_marks(tmp_path) as marks:
        assert marks.suspects == {1, 2}
        marks.finish()
    assert not tmp_path.exists()


def test_a_file_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    leave(tmp_path, 1, 2)
    os.truncate(tmp_path / "part-7.0.marks", 11)
    with open_marks(tmp_path) as marks:
        assert marks.suspects == {1}


def test_many_at_once_in_one_process_keep_apart(tmp_path: Path) -> None:
    opened: list[InFlightMarks] = []
    barrier = threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        for _ in range(20):
            with open_marks(tmp_path) as marks:
                marks.finish()
        opened.append(open_marks(tmp_path))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [marks.suspects for marks in opened] == [frozenset()] * 8
    assert len({path for path in files(tmp_path) if path.endswith(".marks")}) == 8
    for marks in opened:
        marks.finish()
    assert not tmp_path.exists()


def test_what_a_finished_task_left_is_forgotten(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "m"
    leave(folder, 20)
    with open_marks(folder, name="part-8") as marks:
        marks.suspect(3)
    # A living process keeps its own, and other tasks theirs.
    InFlightMarks.forget(str(folder), "part-7")
    assert files(folder) == ["part-7.0.marks", "part-8.0.marks", "part-8.0.suspects.json"]
    kill(other_process)
    InFlightMarks.forget(str(folder), "part-7")
    assert files(folder) == ["part-8.0.marks", "part-8.0.suspects.json"]
    InFlightMarks.forget(str(folder), "part-8")
    assert not folder.exists()
    InFlightMarks.forget(str(folder), "part-8")


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    with open_marks(tmp_path) as marks:
        marks.finish()
        marks.close()
