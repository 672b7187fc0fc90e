"""What `benchmarks.join` runs: the peers and their environments, `kith` commands, ready catalogues."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_runs import ROOT, Peer, PeerRun, SkippedError

FAISS_PEERS = ("ivf", "batch", "knn")
JOIN_PEERS = (
    Peer(
        "autofaiss",
        "autofaiss",
        "autofaiss_index",
        ("autofaiss==2.18.0", "numpy==1.26.4", "pyarrow==23.0.1", "setuptools==80.9.0"),
        (PeerRun("float32"),),
    ),
    Peer(
        "hnswlib",
        "hnswlib",
        "hnswlib_graph",
        ("hnswlib==0.8.0", "numpy==1.26.4"),
        (PeerRun("float32"),),
    ),
    Peer("scann", "ScaNN", "scann_tree", ("numpy==2.2.6", "scann==1.4.2"), (PeerRun("float32"),)),
)
PEER_NAMES = (*FAISS_PEERS, *(peer.name for peer in JOIN_PEERS))


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """A set of vectors made ready: what is known of it, Kith's index of it, and the centroids.

    `about` is what `benchmarks.vectors` printed; `tiny` is an index of a few rows of the same dim.
    """

    about: dict[str, Any]
    seed: int
    nlist: int
    nprobe: int
    index: str
    centroids: str
    tiny: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One run of a `kith` command: what it printed, and what its process took.

    `cpu_seconds` is the time of all its threads.
    """

    result: dict[str, Any]
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def lists_of(rows: int) -> int:
    """Returns the lists of an index: the power of two below 4 sqrt(n), at least 39 rows a list."""
    return 1 << int(math.log2(max(2.0, min(4 * math.sqrt(rows), rows / 39))))


@contextlib.contextmanager
def empty(folder: Path) -> Iterator[Path]:
    """Makes a folder for the length of a block."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_kith(
    command: str, arguments: Sequence[str], settings: dict[str, Any], workspace: Path
) -> Command:
    """Runs a `kith` command with a configuration of its own, in a process of its own.

    Returns what it printed, its time from the start of Python to its end, and its peak memory
    (`ru_maxrss`). Raises SkippedError with what it printed when it fails.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    config = workspace / "bench.yaml"
    config.write_text(json.dumps({"workspace": str(workspace / "workspace"), **settings}))
    line = [sys.executable, "-m", "pipelines.cli", command, "--config", str(config), "--json"]
    with (workspace / "stdout").open("w+") as out, (workspace / "stderr").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([*line, *arguments], stdout=out, stderr=errors, cwd=ROOT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise SkippedError(f"kith {command} failed: {errors.read().strip()[-2000:]}")
        # Linux counts kibibytes.
        cpu_seconds = usage.ru_utime + usage.ru_stime
        return Command(json.loads(out.read()), seconds, cpu_seconds, usage.ru_maxrss * 1024)
