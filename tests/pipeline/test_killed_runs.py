"""Runs killed with SIGKILL go on to the bytes of an undisturbed run; readers never notice."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index_builder.datasets import manifests
from pipelines.check import check_everything
from pipelines.nightly import run_nightly
from pipelines.search_images import search_images
from tests.catalog_fixtures import Published
from tests.pipeline.killable_runs import KillableRuns, done_again, finished_files
from tests.pipeline.killed_work import Tiny, Work
from tests.pipeline.small_catalogue import dataset_bytes, load, session

MOST_RUNS = 50
# In the order in which a night completes their datasets.
STAGES = ("failures", "embeddings", "index", "groups", "neighbors", "evaluations", "exports", "graph")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KillableRuns]:
    with KillableRuns(tmp_path_factory.mktemp("runs") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def night(runs: KillableRuns, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A night that does every stage again, in a workspace with a published run."""
    folder = tmp_path_factory.mktemp("night")
    tiny = Tiny.make(folder / "tiny", shards=2, images=12)
    runs.run("nightly", "--config", str(tiny.write_config(folder / "c.yaml", folder / "before")))
    return Work.plan(runs, tiny, "nightly", folder / "before", folder / "undisturbed")


@pytest.fixture(scope="module")
def embedding(runs: KillableRuns, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The embed stage alone, on more shards, in a workspace that is not there yet."""
    folder = tmp_path_factory.mktemp("embedding")
    tiny = Tiny.make(folder / "tiny", shards=12, images=180)
    return Work.plan(runs, tiny, "embed", folder / "nothing", folder / "undisturbed")


def test_killed_at_its_writes_it_gets_to_the_same_bytes(night: Work, tmp_path: Path) -> None:
    workspace = night.prepare(tmp_path / "night")
    published = Published(workspace).pointer
    killed, writes = [], [1, -1, 2, -3, 4, -5, 6]
    # A shard is four writes, so a run that dies at its seventh gets further than the one before it.
    for at in [*writes, *[-7] * (MOST_RUNS - len(writes))]:
        ended = night.runs.run(*night.arguments(workspace), at_write=at)
        if not ended.killed:
            break
        killed.append(ended.file)
    else:
        raise AssertionError(f"no run came to its end in {MOST_RUNS}")
    night.check(workspace)
    assert len(list(workspace.rglob("_manifest.json"))) == 6 + len(STAGES)
    assert Published(workspace).pointer["datasets"] != published["datasets"]
    # The kills were spread over all stages, so this was no rerun from the beginning.
    stages = {Path(name).relative_to(workspace).parts[0] for name in killed}
    assert stages >= {"embeddings", "failures", "index", "groups", "neighbors", "exports", "graph"}
    assert len(killed) > 10


def test_a_stage_killed_before_it_is_complete_keeps_all_parts(night: Work, tmp_path: Path) -> None:
    workspace = night.prepare(tmp_path / "night")
    finished = finished_files(workspace)
    for kind in STAGES:
        at = f"{kind}/*/_manifest.json"
        assert night.runs.run(*night.arguments(workspace), at_file=at).killed, kind
        now = finished_files(workspace)
        assert done_again(finished, now) == [], kind
        finished = now
    night.runs.run(*night.arguments(workspace))
    assert done_again(finished, finished_files(workspace)) == []
    night.check(workspace)


def test_killed_between_the_export_and_the_pointer(night: Work, tmp_path: Path) -> None:
    workspace = night.prepare(tmp_path / "night")
    pointer = (workspace / "current.json").read_bytes()
    assert night.runs.run(*night.arguments(workspace), at_file="current.json").killed
    # All datasets are complete, the run is described, and yet nothing is published.
    assert dataset_bytes(workspace) == night.undisturbed
    assert (workspace / "current.json").read_bytes() == pointer
    described = [json.loads(path.read_text()) for path in (workspace / "runs").glob("*/run.json")]
    assert sorted(run["status"] for run in described) == ["published", "publishing"]
    run = run_nightly(load(workspace.parent / "c.yaml"), session()).run
    assert {stage["state"] for stage in run["stages"].values()} == {"unchanged"}
    assert Published(workspace).pointer["run"] == run["run_id"]
    night.check(workspace)


def test_killed_at_random_moments_of_the_night(night: Work, tmp_path: Path) -> None:
    # With the next test, more than ten kills.
    kills = night.kill_at_random(tmp_path, wanted=6, seed=4)
    assert len(kills.moments) >= 6


def test_killed_at_random_moments_of_embedding(embedding: Work, tmp_path: Path) -> None:
    kills = embedding.kill_at_random(tmp_path, wanted=8, seed=5)
    assert len(kills.moments) >= 8


def test_what_is_done_again_is_noticed(embedding: Work, tmp_path: Path) -> None:
    workspace = embedding.prepare(tmp_path / "embedding")
    part = "part-00003.parquet"
    assert embedding.runs.run(*embedding.arguments(workspace), at_file=f"{part[:10]}.json").killed
    finished = finished_files(workspace)
    assert finished, "no part was finished before another one was marked"
    assert not any(path.name == part for path in finished), "a part without its marker is not finished"
    lost = min(path for path in finished if path.parts[-3] == "embeddings")
    lost.unlink()
    embedding.runs.run(*embedding.arguments(workspace))
    assert done_again(finished, finished_files(workspace)) != []
    embedding.check(workspace)


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


def test_readers_never_notice_a_kill(night: Work, tmp_path: Path) -> None:
    workspace = night.prepare(tmp_path / "night")
    earlier = load(night.tiny.write_config(tmp_path / "earlier.yaml", workspace))
    pointer = (workspace / "current.json").read_bytes()
    reader = Reader(workspace)
    reader.start()
    for at in ("index/*/_manifest.json", "exports/*/_manifest.json"):
        assert night.runs.run(*night.arguments(workspace), at_file=at).killed
        assert (workspace / "current.json").read_bytes() == pointer
        # What was published is whole, and can be searched.
        assert check_everything(earlier, data=True)["verified_files"] > 10
        index = str(Published(workspace).folder("index"))
        (found,) = search_images(earlier, index, [str(night.tiny.data / "hard" / "gray16.png")], k=2)
        assert found.neighbors[0]["image_id"] == "gray16.png"
    night.runs.run(*night.arguments(workspace))
    assert (workspace / "current.json").read_bytes() != pointer
    reader.stopped.set()
    reader.join(60)
    assert reader.problems == []
    assert reader.reads > 3
    night.check(workspace)
