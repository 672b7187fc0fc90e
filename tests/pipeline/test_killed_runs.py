"""Runs killed with SIGKILL go on to the bytes of an undisturbed run; readers never notice."""

import dataclasses
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
from typing import Any

import pytest

from index_builder import manifests
from pipelines.check import check_everything
from pipelines.nightly import run_nightly
from pipelines.search_images import search_images
from tests.catalog_fixtures import Published
from tests.pipeline.small_catalogue import dataset_bytes, load, session, write_catalogue, write_config
from transforms.encoders.keras_runtime import import_keras

TIME_LIMIT_SEC = 120


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A catalogue of 12 images in two shards and a few files, and a network that loads in no time."""

    data: Path
    model: Path

    def write_config(self, path: Path, workspace: Path, **sections: Any) -> Path:
        """Writes the configuration; `resize` of the encoder is set to `pad` for tonight's run."""
        tonight = bool(sections)
        encoder = {
            "name": "custom",
            "weights": str(self.model),
            "preprocessing": "tf",
            "input_size": [32, 32],
            "resize": "pad" if tonight else "crop",
        }
        return write_config(path, self.data, workspace, encoder=encoder, **sections)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    keras = import_keras()
    folder = tmp_path_factory.mktemp("tiny")
    data = write_catalogue(folder / "data", shards=2, images=12)
    for name in ("ct_slice.dcm", "photo.tif", "photo.webp"):
        (data / "hard" / name).unlink()
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(40, 8, strides=4)])
    model.save(folder / "model.keras")
    return Tiny(data, folder / "model.keras")


@pytest.fixture(scope="module")
def before(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a published run, before the night that is to be killed."""
    folder = tmp_path_factory.mktemp("before")
    run_nightly(load(tiny.write_config(folder / "c.yaml", folder / "w")), session())
    return folder / "w"


# Together with another resize, this makes tonight's run do every stage again.
TONIGHT: dict[str, Any] = {
    "index": {"shards": 2, "transform": {"type": "pca", "dim": 8}},
    "join": {"k": 4},
}


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, before: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of a workspace in which the same night was not disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(before, folder / "w")
    run_nightly(load(tiny.write_config(folder / "c.yaml", folder / "w", **TONIGHT)), session())
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


def test_killed_at_its_writes_it_gets_to_the_same_bytes(
    tiny: Tiny, before: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(before, tmp_path / "w")
    published = Published(tmp_path / "w").pointer
    config = tiny.write_config(tmp_path / "c.yaml", tmp_path / "w", **TONIGHT)
    killed = run_until_killed(config, 1, -1, 2, -3, 4, -4, 5, -5, 6, -7, 5)
    assert_as_undisturbed(tmp_path / "w", undisturbed)
    assert Published(tmp_path / "w").pointer["datasets"] != published["datasets"]
    # The kills were spread over all stages, so this was no rerun from the beginning.
    stages = {Path(name).relative_to(tmp_path / "w").parts[0] for name in killed}
    assert stages >= {"embeddings", "failures", "index", "neighbors", "exports"}
    assert len(killed) > 12


def test_killed_between_the_export_and_the_pointer(
    tiny: Tiny, before: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(before, tmp_path / "w")
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    config = tiny.write_config(tmp_path / "c.yaml", tmp_path / "w", **TONIGHT)
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
    tiny: Tiny,
    before: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    processes: list[subprocess.Popen[bytes]],
) -> None:
    shutil.copytree(before, tmp_path / "w")
    config = tiny.write_config(tmp_path / "c.yaml", tmp_path / "w", **TONIGHT)
    earlier = load(tiny.write_config(tmp_path / "earlier.yaml", tmp_path / "w"))
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
        (found,) = search_images(earlier, index, [str(tiny.data / "hard" / "gray16.png")], k=2)
        assert found.neighbors[0]["image_id"] == "gray16.png"
    run_nightly(load(config), session())
    reader.stopped.set()
    reader.join(TIME_LIMIT_SEC)
    assert reader.problems == []
    assert reader.reads > 3
    assert_as_undisturbed(tmp_path / "w", undisturbed)
