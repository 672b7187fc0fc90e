"""Many more kills than continuous integration has time for.

`KITH_KILLS` (100) runs of each command are killed at random moments; `KITH_SEED` (1) chooses them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.killable_runs import KillableRuns
from tests.pipeline.killed_work import Kills, Tiny, Work

KILLS = int(os.environ.get("KITH_KILLS", "100"))
SEED = int(os.environ.get("KITH_SEED", "1"))

pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KillableRuns]:
    with KillableRuns(tmp_path_factory.mktemp("runs") / "log") as server:
        yield server


def tell(work: Work, kills: Kills, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(
            f"\n{work.command}: {len(kills.moments)} runs killed in {kills.rounds} workspaces (seed "
            f"{SEED}), {kills.kept} finished files kept through all later runs, same bytes every time"
        )


def test_nights(
    runs: KillableRuns,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("night")
    tiny = Tiny.make(folder / "tiny", shards=4, images=60, engine="auto")
    runs.run("nightly", "--config", str(tiny.write_config(folder / "c.yaml", folder / "before")))
    night = Work.plan(runs, tiny, "nightly", folder / "before", folder / "undisturbed")
    kills = night.kill_at_random(tmp_path, KILLS, SEED)
    assert len(kills.moments) >= KILLS
    tell(night, kills, capsys)


def test_embedding(
    runs: KillableRuns,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("embedding")
    tiny = Tiny.make(folder / "tiny", shards=24, images=480, engine="auto")
    embedding = Work.plan(runs, tiny, "embed", folder / "nothing", folder / "undisturbed")
    kills = embedding.kill_at_random(tmp_path, KILLS, SEED)
    assert len(kills.moments) >= KILLS
    tell(embedding, kills, capsys)
