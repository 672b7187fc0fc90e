"""Runs of Kith that can be killed with SIGKILL, at a moment or at a write, and what they had finished.

`KillableRuns` starts one server process that imports everything and uses nothing; each run is a
forked child of it, so a run costs no imports. The server is this module run by itself: it reads one
JSON request a line from standard input and answers each with one line.
"""

import ctypes
import dataclasses
import fnmatch
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
# No run of a test takes as long as this.
TIME_LIMIT_SEC = 120


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: killed (at `file`, where it was to die at a write), or by itself."""

    killed: bool
    seconds: float
    file: str


class KillableRuns:
    """Runs commands of Kith one after another; a context manager that ends its server.

    `temporary` is the system's folder of temporary files for all runs, and nobody else's.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.temporary = log.parent / "temporary"
        self.temporary.mkdir()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.killable_runs", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )

    def __enter__(self) -> "KillableRuns":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()

    def run(
        self, *arguments: str, after: float | None = None, at_write: int = 0, at_file: str = ""
    ) -> Ended:
        """Runs `kith ARGUMENTS`, killed where one of the three says, if it gets there.

        `after`: seconds after the start, wherever it is then. `at_write`: when its n-th file is about
        to get its final name, or just has got it (negative). `at_file`: when a file is about to get
        a name whose last parts match this pattern. Fails where the run ends by itself with another
        status than 0, or never ends.
        """
        request = {"arguments": arguments, "after": after, "at_write": at_write, "at_file": at_file}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        log = self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""
        assert answer, f"the server of runs ended\n{log}"
        values = json.loads(answer)
        status = values.pop("status")
        assert status == 0 or values["killed"], f"{arguments} ended with status {status}\n{log}"
        return Ended(**values)


# What is finished in a workspace

Identity = tuple[int, int]


def finished_files(workspace: Path) -> dict[Path, Identity]:
    """Returns inode and time of change of every file of every finished part and committed dataset.

    A part of the failures is finished when the part of the embeddings from the same pass is.
    """
    folders = {path.parent for path in workspace.glob("*/*/_manifest.json")}
    found = {folder / "_manifest.json" for folder in folders}
    for folder in folders:
        for part in json.loads((folder / "_manifest.json").read_text())["parts"]:
            found |= _files_of(folder, part)
    for marker in workspace.glob("*/*/_work/[!.]*.json"):
        folder = marker.parents[1]
        twin = workspace / "embeddings" / folder.name
        marked = (twin / "_work" / marker.name).exists() or (twin / "_manifest.json").exists()
        part = json.loads(marker.read_text())
        if "files" in part and (folder.parent.name != "failures" or marked):
            found |= _files_of(folder, part)
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def _files_of(folder: Path, part: dict[str, Any]) -> set[Path]:
    # Reused parts lie in the folder of another dataset.
    return {Path(os.path.normpath(folder / file["path"])) for file in part["files"]}


def done_again(before: dict[Path, Identity], after: dict[Path, Identity]) -> list[Path]:
    """Returns the finished files that a later run wrote again or lost, apart from its own scratch."""
    scratch = [path for path in before if "_work" in path.parts and path not in after]
    return sorted(
        path for path, was in before.items() if path not in scratch and after.get(path) != was
    )


# The server


def serve(log_path: str) -> None:
    """Answers requests until standard input ends."""
    # All that a run may import; the threads of TensorFlow start in the children.
    from pipelines import cli, embed_images, nightly  # noqa: F401
    from pipelines.report import build  # noqa: F401
    from transforms.encoders.keras_runtime import import_keras

    import_keras()
    for line in sys.stdin:
        print(json.dumps(_fork(log_path, **json.loads(line))), flush=True)


def _fork(
    log_path: str, arguments: list[str], after: float | None, at_write: int, at_file: str
) -> dict[str, Any]:
    read, write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _run(log_path, arguments, at_write, at_file, write)
    os.close(write)
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], TIME_LIMIT_SEC if after is None else after)
    hung = not ended and after is None
    if not ended:
        # This process alone, as the kernel or an operator would: what it started is not told.
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(handle)
    file = _read_now(read)
    killed = not hung and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"killed": killed, "seconds": time.monotonic() - start, "file": file, "status": status}


def _read_now(pipe: int) -> str:
    """Returns what was written into a pipe, of which an orphan of the run may still hold the end."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1 << 16).decode()
    except BlockingIOError:
        return ""
    finally:
        os.close(pipe)


def _run(log_path: str, arguments: list[str], at_write: int, at_file: str, pipe: int) -> NoReturn:
    """Runs the command in this child, which never returns."""
    from pipelines import cli

    # No run outlives the server, however that ends (PR_SET_PDEATHSIG is 1).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if at_write or at_file:
        _die_at(at_write, at_file, pipe)
    status: int | str | None = 1
    try:
        cli.main(arguments)
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        sys.stderr.flush()
        # Not sys.exit: what the server imported has exit handlers of its own.
        os._exit(status if isinstance(status, int) else int(status is not None))


def _die_at(at_write: int, at_file: str, pipe: int) -> None:
    """Makes this process kill itself at a write: files are counted as they get their final names."""
    replace, count = os.replace, 0

    def dying_replace(source: str, target: str) -> None:
        nonlocal count
        count += 1
        if fnmatch.fnmatch(target, f"*/{at_file}") or count == abs(at_write):
            os.write(pipe, str(target).encode())
            if at_write < 0:
                replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying_replace


if __name__ == "__main__":
    serve(sys.argv[1])
