"""Runs killed with SIGKILL go on to the bytes of an undisturbed run; readers never notice."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index_builder import manifests
from pipelines.check import check_everything
from pipelines.nightly import run_nightly
from pipelines.search_images import search_images
from tests.catalog_fixtures import Published
from tests.pipeline.small_catalogue import dataset_bytes, load, session, write_catalogue, write_config

TIME_LIMIT_SEC = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of 12 images in two shards, and the hard files."""
    return write_catalogue(tmp_path_factory.mktemp("tiny") / "data", shards=2, images=12)


@pytest.fixture(scope="module")
def before(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a published run, before the night that is to be killed."""
    folder = tmp_path_factory.mktemp("before")
    run_nightly(load(write_config(folder / "c.yaml", tiny, folder / "w")), session())
    return folder / "w"


# What makes tonight's run do every stage again.
TONIGHT = {
    "encoder": {"resize": "pad"},
    "index": {"shards": 2, "transform": {"type": "pca", "dim": 8}},
    "join": {"k": 4},
}


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, before: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of a workspace in which the same night was not disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(before, folder / "w")
    run_nightly(load(write_config(folder / "c.yaml", tiny, folder / "w", **TONIGHT)), session())
    return dataset_bytes(folder / "w")


def assert_as_undisturbed(workspace: Path, undisturbed: dict[str, str]) -> None:
    assert dataset_bytes(workspace) == undisturbed
    # Neither markers nor unfinished files are left in a dataset that is committed.
    assert [str(path) for path in workspace.rglob("_work")] == []
    datasets = [path.parent for path in workspace.rglob("_manifest.json")]
    assert len(datasets) == 12
    for folder in datasets:
        assert [path.name for path in folder.glob(".writing-*")] == []


def run_until_killed(config: Path, *writes: int) -> list[str]:
    """Runs until a run ends by itself; returns the files at which the earlier ones were killed."""
    command = [sys.executable, "-m", "tests.pipeline.run_until_killed", str(config), *map(str, writes)]
    done = subprocess.run(
        command, capture_output=True, timeout=TIME_LIMIT_SEC, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    killed = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(killed, list)
    return killed


@pytest.mark.parametrize(
    "writes",
    [
        pytest.param((2,), id="each-run-dies-before-its-second-file"),
        pytest.param((-3, 1, -2, 4, 3, -5), id="before-and-after"),
    ],
)
def test_killed_at_its_writes_it_gets_to_the_same_bytes(
    tiny: Path, before: Path, undisturbed: dict[str, str], tmp_path: Path, writes: tuple[int, ...]
) -> None:
    shutil.copytree(before, tmp_path / "w")
    published = Published(tmp_path / "w").pointer
    config = write_config(tmp_path / "c.yaml", tiny, tmp_path / "w", **TONIGHT)
    killed = run_until_killed(config, *writes)
    assert_as_undisturbed(tmp_path / "w", undisturbed)
    assert Published(tmp_path / "w").pointer["datasets"] != published["datasets"]
    # The kills were spread over all stages, so this was no rerun from the beginning.
    stages = {Path(name).relative_to(tmp_path / "w").parts[0] for name in killed}
    assert stages >= {"embeddings", "failures", "index", "neighbors", "evaluations", "exports"}
    assert len(killed) >= 8


def test_killed_between_the_export_and_the_pointer(
    tiny: Path, before: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(before, tmp_path / "w")
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    config = write_config(tmp_path / "c.yaml", tiny, tmp_path / "w", **TONIGHT)
    script = (
        "import os, signal, sys\n"
        "from pipelines import nightly\n"
        "from tests.pipeline.small_catalogue import load, session\n"
        "def die(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "nightly.publish = die\n"
        "nightly.run_nightly(load(sys.argv[1]), session())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(config)], capture_output=True, timeout=TIME_LIMIT_SEC,
        check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]
    # All datasets are complete, the run is described, and yet nothing is published.
    assert_as_undisturbed(tmp_path / "w", undisturbed)
    assert (tmp_path / "w" / "current.json").read_bytes() == pointer
    run = run_nightly(load(config), session()).run
    assert {stage["state"] for stage in run["stages"].values()} == {"unchanged"}
    assert Published(tmp_path / "w").pointer["run"] == run["run_id"]
    assert_as_undisturbed(tmp_path / "w", undisturbed)


class Reader(threading.Thread):
    """Reads the published snapshot all the time, as a recommender would."""

    def __init__(self, workspace: Path) -> None:
        super().__init__(daemon=True)
        self.workspace = workspace
        self.stopped = threading.Event()
        self.reads = 0
        self.problems: list[BaseException] = []

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                snapshot = Published(self.workspace)
                for kind in snapshot.pointer["datasets"]:
                    folder, manifest = str(snapshot.folder(kind)), snapshot.manifest(kind)
                    for part in manifest.parts:
                        for file in part.files:
                            manifests.verify_file(folder, file)
                self.reads += 1
            except Exception as error:
                self.problems.append(error)
            time.sleep(0.02)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_killed_at_random_moments_while_others_read(
    tiny: Path,
    before: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    processes: list[subprocess.Popen[bytes]],
) -> None:
    shutil.copytree(before, tmp_path / "w")
    config = write_config(tmp_path / "c.yaml", tiny, tmp_path / "w", **TONIGHT)
    earlier = load(write_config(tmp_path / "earlier.yaml", tiny, tmp_path / "w"))
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    reader = Reader(tmp_path / "w")
    reader.start()
    command = [sys.executable, "-m", "pipelines.cli", "nightly", "--config", str(config), "--json"]
    root = Path(__file__).parents[2]
    moments = random.Random(20)
    for first in ("embeddings/*/_work/*.json", "index/*/_work/*"):
        old = set((tmp_path / "w").glob(first))
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root
        )
        processes.append(process)
        deadline = time.monotonic() + TIME_LIMIT_SEC
        while process.poll() is None and not set((tmp_path / "w").glob(first)) - old:
            assert time.monotonic() < deadline, f"{first} never came"
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
        if (tmp_path / "w" / "current.json").read_bytes() != pointer:
            break
        # What was published is whole, and can be searched.
        assert check_everything(earlier, data=True)["verified_files"] > 10
        index = str(Published(tmp_path / "w").folder("index"))
        (found,) = search_images(earlier, index, [str(tiny / "hard" / "photo.webp")], k=2)
        assert found.neighbors[0]["image_id"] == "photo.webp"
    run_nightly(load(config), session())
    reader.stopped.set()
    reader.join(TIME_LIMIT_SEC)
    assert reader.problems == []
    assert reader.reads > 3
    assert_as_undisturbed(tmp_path / "w", undisturbed)
