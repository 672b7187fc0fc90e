"""Whole runs in which codes propose: what is published, and what a missed promise raises."""

from pathlib import Path
from typing import Any

import pytest

from index_builder.datasets import manifests
from index_builder.index import spec as index_spec
from pipelines.locate import find_index
from pipelines.nightly import run_nightly
from tests.pipeline.small_catalogue import load, session, write_catalogue, write_config

INDEX: dict[str, Any] = {"transform": {"type": "pca", "dim": 32}, "nlist": 16, "shards": 2}


def test_a_missed_promise_raises_refine_with_nprobe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few images would be compared all with all otherwise.
    monkeypatch.setattr(index_spec, "LEAST_GAIN_OF_LISTS", 0)
    config = load(
        write_config(
            tmp_path / "c.yaml",
            write_catalogue(tmp_path / "catalogue"),
            tmp_path / "workspace",
            index=INDEX | {"encoding": "compressed", "refine": 1},
            evaluate={"sample": 35, "min_recall": 0.9, "max_attempts": 4},
            join={"k": 5, "max_probe": 0},
            nightly={"report": False},
        )
    )
    run = run_nightly(config, session()).run
    assert run["status"] == "published"
    assert run["recall"]["estimate"] >= 0.9
    attempts = run["attempts"]
    assert len(attempts) > 1
    index = manifests.load(find_index(config), "index")
    assert index.properties["method"] == index.properties["encoding"] == "compressed"
    assert index.properties["refine"] == 2 ** (len(attempts) - 1)
    nprobes = [attempt["nprobe"] for attempt in attempts]
    assert nprobes == sorted(set(nprobes))
    assert index.properties["nprobe"] == nprobes[-1]
