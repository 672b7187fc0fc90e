"""Runs the peers of `benchmarks.peers`, each in an environment of its own that is made on demand.

An environment is a folder below the benchmarks' cache, made by `python -m venv` and pip (which reads
the user's own settings, such as an index of CPU builds of PyTorch). Where that fails, the peer is
skipped and the reason printed.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INSTALL_TIMEOUT_SEC = 1800
RUN_TIMEOUT_SEC = 1800


class SkippedError(Exception):
    """A measurement that cannot be made here; the text says why."""


class StoppedError(SkippedError):
    """A measurement that took longer than it may; `lines` is what it had printed until then."""

    def __init__(self, seconds: float, lines: Sequence[str]) -> None:
        super().__init__(f"failed: stopped after {seconds:g} seconds")
        self.lines = lines
        self._stopped = time.time()

    def stages(self) -> dict[str, float]:
        """Returns the seconds of the stages that had begun, as benchmarks.peers.neighbors.Clock tells.

        That of the stage that was running is what it had taken so far.
        """
        found: dict[str, float] = {}
        for line in self.lines:
            if not line.startswith('{"clock"'):
                continue
            clock = json.loads(line)["clock"]
            found = dict(clock["stages"])
            if clock["running"] is not None:
                name = clock["running"]
                found[name] = found.get(name, 0.0) + self._stopped - clock["at"]
        return found


@dataclasses.dataclass(frozen=True)
class PeerRun:
    """One way to run a peer: the precision of its network and its further arguments."""

    precision: str
    arguments: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer: its module below `benchmarks.peers`, what to install, and the ways to run it.

    `same_network` says that it computes what Kith computes; `needs_network` that it wants the
    Keras file.
    """

    name: str
    title: str
    module: str
    requirements: tuple[str, ...]
    runs: tuple[PeerRun, ...]
    same_network: bool = True
    needs_network: bool = False


PEERS = (
    Peer(
        "torch",
        "PyTorch DataLoader",
        "torch_dataloader",
        ("numpy==1.26.4", "pillow==12.3.0", "pyarrow==23.0.1", "setuptools==80.9.0", "torch==2.15.0"),
        tuple(
            PeerRun(precision, ("--precision", precision, "--mode", mode))
            for precision in ("float32", "bfloat16")
            for mode in ("plain", "channels_last", "traced", "compiled")
        ),
    ),
    Peer(
        "beam",
        "Beam RunInference",
        "beam_runinference",
        (
            "apache-beam==2.72.0",
            "google-crc32c==1.9.0",
            "keras==3.15.1",
            "numpy==1.26.4",
            "pillow==12.3.0",
            "protobuf==4.25.9",
            "pyarrow==23.0.1",
            "tensorflow-cpu==2.16.2",
            "tensorflow-hub==0.16.1",
            "tf-keras==2.16.0",
        ),
        tuple(PeerRun("float32", ("--mode", mode)) for mode in ("in_memory", "multi_threading")),
        needs_network=True,
    ),
    Peer(
        "fastdup",
        "fastdup",
        "fastdup_features",
        ("fastdup==2.54",),
        (PeerRun("float32"),),
        same_network=False,
    ),
)


def environment_folder(cache: Path, peer: Peer) -> Path:
    """Returns the folder of a peer's environment: it changes with Python and the pins."""
    text = "\n".join((sys.version, *peer.requirements))
    return cache / "peers" / f"{peer.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make_environment(cache: Path, peer: Peer) -> str:
    """Installs what a peer needs, unless it is there already; returns its Python.

    Raises SkippedError with the last line that the installation printed.
    """
    folder = environment_folder(cache, peer)
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if stamp.is_file():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", *peer.requirements]
    for command in ([sys.executable, "-m", "venv", str(folder)], pip):
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_SEC
            )
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SkippedError(f"cannot be installed: {_last_line(error)}") from error
    stamp.write_text("\n".join(peer.requirements) + "\n")
    return str(python)


def run_peer(python: str, peer: Peer, run: PeerRun, shards: str, network: str | None) -> dict[str, Any]:
    """Runs a peer once; returns what its `report` printed. Raises SkippedError when it fails."""
    with tempfile.TemporaryDirectory(prefix="kith-bench-") as out:
        command = [python, "-m", f"benchmarks.peers.{peer.module}", "--shards", shards, "--out", out]
        command += ["--threads", str(len(os.sched_getaffinity(0))), *run.arguments]
        if peer.needs_network:
            assert network is not None
            command += ["--model", network]
        return run_for_json(command, RUN_TIMEOUT_SEC)


def run_for_json(command: Sequence[str], timeout_sec: float) -> dict[str, Any]:
    """Runs a command in the repository and returns the object that its last line holds.

    Raises SkippedError when the command fails or ends with another line, StoppedError when it takes
    longer than `timeout_sec`.
    """
    environment = os.environ | {"SENTRY_OPT_OUT": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=timeout_sec,
            cwd=ROOT,
            env=environment,
        )
        # A progress bar may stand on the same line.
        line = done.stdout.strip().rpartition("\n")[2]
        found = json.loads(line[line.index("{") :])
    except subprocess.TimeoutExpired as error:
        # Python decodes the output of a process that ends by itself only.
        printed = error.stdout or b""
        text = printed if isinstance(printed, str) else printed.decode(errors="replace")
        # The last line may be half of one.
        raise StoppedError(timeout_sec, text.split("\n")[:-1]) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise SkippedError(f"failed: {_last_line(error)}") from error
    except ValueError as error:
        raise SkippedError(f"printed no result but {done.stdout[-200:]!r}") from error
    if "skipped" in found:
        raise SkippedError(str(found["skipped"]))
    return dict(found)


def _last_line(error: Exception) -> str:
    """Returns the last line that a command printed on standard error, or the error itself."""
    printed = getattr(error, "stderr", None) or ""
    if isinstance(printed, bytes):
        printed = printed.decode(errors="replace")
    lines = [line for line in printed.splitlines() if line.strip()]
    return lines[-1].strip() if lines else str(error)
