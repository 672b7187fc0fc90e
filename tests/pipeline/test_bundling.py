"""The cut of the work changes nothing: number of shards, bundles, threads, order of the parts."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.nightly import run_nightly
from pipelines.stage import Session
from tests.catalog_fixtures import Published
from tests.pipeline.small_catalogue import dataset_bytes, load, session, write_config

THREADS = ("--direct_num_workers=3", "--direct_running_mode=multi_threading")


def run(folder: Path, catalogue: Path, session: Session, overrides: Sequence[str] = ()) -> Published:
    config = load(write_config(folder / "c.yaml", catalogue, folder / "w"), *overrides)
    run_nightly(config, session)
    return Published(folder / "w")


def test_many_bundles_on_many_threads_write_the_same_bytes(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    snapshot = run(tmp_path, catalogue, session(*THREADS))
    assert dataset_bytes(tmp_path / "w") == dataset_bytes(finished)
    assert snapshot.run["stages"]["embed"]["counters"]["embed.images_in"] == 72


@pytest.mark.parametrize(("shards", "threads"), [(1, 1), (2, 3), (5, 2)])
def test_recommendations_do_not_depend_on_shards_and_threads(
    finished: Path, catalogue: Path, tmp_path: Path, shards: int, threads: int
) -> None:
    # The embeddings are at hand; only what follows is cut another way.
    (tmp_path / "w").mkdir()
    for kind in ("embeddings", "failures"):
        (tmp_path / "w" / kind).symlink_to(finished / kind)
    overrides = [f"index.shards={shards}", f"join.threads={threads}"]
    snapshot = run(tmp_path, catalogue, session(*THREADS), overrides)
    states = {name: stage["state"] for name, stage in snapshot.run["stages"].items()}
    assert (states["embed"], states["join"]) == ("unchanged", "made")
    parts = snapshot.manifest("recommendations").parts
    assert len(parts) == snapshot.run["index"]["shards"] == shards
    reference = Published(finished)
    assert snapshot.jsonl() == reference.jsonl()
    assert snapshot.table("neighbors").equals(reference.table("neighbors"))
    for figure in ("recall", "truth"):
        assert snapshot.run[figure] == reference.run[figure]
