"""The nightly run: equal to the direct computation, repeatable, resumable, gated."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import manifests, storage
from index_builder.errors import DatasetError, FingerprintError, GateError, KithError
from index_builder.scoring.vectors import unit_float16
from pipelines import nightly
from pipelines.nightly import run_nightly
from pipelines.search_images import search_images
from tests.pipeline.small_catalogue import (
    dataset_bytes,
    load,
    session,
    write_config,
)
from transforms import embed


def table_of(workspace: Path, kind: str) -> pa.Table:
    """Reads the published dataset of a kind, parts in order."""
    folder = workspace / json.loads((workspace / "current.json").read_text())["datasets"][kind]
    manifest = manifests.load(str(folder), kind)
    files = [part.file(".parquet").path for part in manifest.parts if part.rows]
    return pa.concat_tables([pq.read_table(folder / file) for file in files])


def published_run(workspace: Path) -> dict[str, Any]:
    pointer = json.loads((workspace / "current.json").read_text())
    return json.loads((workspace / pointer["run_path"] / "run.json").read_text())


def vectors_of(table: pa.Table) -> np.ndarray:
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), -1)


def test_neighbours_equal_brute_force_over_the_embeddings(finished: Path) -> None:
    table = table_of(finished, "embeddings")
    ids = table["image_id"].to_pylist()
    pointer = json.loads((finished / "current.json").read_text())
    trained = np.load(finished / pointer["datasets"]["index"] / "trained.npz")
    projected = (vectors_of(table).astype(np.float64) - trained["mean"]) @ trained["matrix"].T
    codes = unit_float16(projected)[0].astype(np.float64)
    squared = (codes**2).sum(axis=1)
    scores = ((codes @ codes.T) / np.sqrt(squared[:, None] * squared)).astype(np.float32)
    joined = {row["query_id"]: row for row in table_of(finished, "neighbors").to_pylist()}
    assert set(joined) == set(ids)
    for i, query in enumerate(ids):
        ranked = sorted((-scores[i, j], ids[j].encode()) for j in range(len(ids)) if j != i)[:5]
        assert joined[query]["neighbor_ids"] == [name.decode() for _, name in ranked]
        assert joined[query]["scores"] == [float(-score) for score, _ in ranked]


def test_export_says_what_the_join_found(finished: Path) -> None:
    pointer = json.loads((finished / "current.json").read_text())
    folder = finished / pointer["datasets"]["recommendations"]
    lines = [json.loads(x) for p in sorted(folder.glob("*.jsonl")) for x in p.read_text().splitlines()]
    joined = table_of(finished, "neighbors").to_pylist()
    assert [line["query_id"] for line in lines] == [row["query_id"] for row in joined]
    for line, row in zip(lines, joined, strict=True):
        assert [n["id"] for n in line["neighbors"]] == row["neighbor_ids"]
        assert [np.float32(n["score"]) for n in line["neighbors"]] == row["scores"]
        assert [n["name"] for n in line["neighbors"]] == row["neighbor_name"]
    for written, line in zip(table_of(finished, "recommendations").to_pylist(), lines, strict=True):
        for neighbor in line["neighbors"]:
            neighbor["score"] = float(np.float32(neighbor["score"]))
        assert written == line


def test_books_and_report(finished: Path) -> None:
    run = published_run(finished)
    images = run["images"]
    assert images["read"] == 72
    assert images["read"] == images["embedded"] + images["reused"] + images["failed"]
    assert images["embedded"] == table_of(finished, "embeddings").num_rows
    assert images["failed_by_reason"] == {"empty": 1, "truncated": 1, "unsupported_format": 1}
    failures = {row["image_id"]: row for row in table_of(finished, "failures").to_pylist()}
    assert failures["truncated.jpg"]["reason"] == "truncated"
    assert failures["zero_bytes.jpg"]["stage"] == "decode"
    counters = run["stages"]["embed"]["counters"]
    assert counters["embed.images_in"] == 72
    assert counters["embed.images_out"] == images["embedded"]
    assert counters["embed.images_failed_empty"] == 1
    page = (finished / "runs" / run["run_id"] / "report.html").read_text()
    assert "zero_bytes.jpg" in page
    assert (run["status"], run["reason"]) == ("published", None)
    assert ">published</span>" in page
    assert page.count("data:image/") > 50


def test_a_rerun_changes_no_byte_and_calls_no_model(
    finished: Path, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dataset_bytes(finished)

    def forbidden(*arguments: object) -> None:
        raise AssertionError("the model was loaded although nothing changed")

    monkeypatch.setattr(embed, "load_encoder", forbidden)
    config = load(write_config(tmp_path / "c.yaml", catalogue, finished))
    result = run_nightly(config, session())
    assert dataset_bytes(finished) == before
    assert {stage["state"] for stage in result.run["stages"].values()} == {"unchanged"}
    assert result.run["images"]["reused"] == 69
    assert result.run["images"]["embedded"] == 0


def start_run(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines.cli", "nightly", "--config", str(config), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("shards", [1, 5])
def test_the_number_of_shards_changes_no_neighbour(
    finished: Path, catalogue: Path, tmp_path: Path, shards: int
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    index = {"transform": {"type": "pca", "dim": 32}, "shards": shards}
    config = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w", index=index)
    result = run_nightly(load(config), session())
    assert result.run["index"]["shards"] == shards
    assert table_of(tmp_path / "w", "neighbors").equals(table_of(finished, "neighbors"))


def test_recall_below_the_gate_is_not_published(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    index = {"transform": {"type": "pca", "dim": 32}, "nlist": 12, "nprobe": 1}
    evaluate = {"min_recall": 0.999}
    config = write_config(
        tmp_path / "c.yaml", catalogue, tmp_path / "w", index=index, evaluate=evaluate
    )
    with pytest.raises(GateError, match=r"evaluate\.min_recall wants 0\.999.*Raise index\.nprobe"):
        run_nightly(load(config), session())
    assert (tmp_path / "w" / "current.json").read_bytes() == pointer
    statuses = [
        json.loads(p.read_text())["status"] for p in (tmp_path / "w" / "runs").glob("*/run.json")
    ]
    assert "refused" in statuses


def test_duplicate_ids_stop_the_run_with_both_places(catalogue: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalogue / "catalog", data / "catalog")
    shutil.copytree(catalogue / "hard", data / "hard")
    shutil.copy(data / "catalog" / "images-00000.tfrecord", data / "catalog" / "images-00009.tfrecord")
    config = write_config(tmp_path / "c.yaml", data, tmp_path / "w")
    with pytest.raises(KithError, match="20 image ids occur more than once") as caught:
        run_nightly(load(config), session())
    assert "catalog/images-00000.tfrecord row 0, catalog/images-00009.tfrecord row 0" in str(
        caught.value
    )
    assert not (tmp_path / "w" / "current.json").exists()


def test_empty_and_hopeless_catalogues(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    sources = [{"format": "files", "paths": str(tmp_path / "bad" / "*.jpg")}]
    plain = {"images": {"sources": sources}, "evaluate": {}, "export": {}}
    config = write_config(tmp_path / "c.yaml", "x", tmp_path / "w", **plain)
    with pytest.raises(KithError, match="catalogue is empty: no file matches"):
        run_nightly(load(config), session())
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(KithError, match="Every one of the 1 images failed .unsupported_format 1."):
        run_nightly(load(config), session())
    assert not (tmp_path / "w" / "current.json").exists()


@pytest.mark.parametrize(
    ("kind", "suffix", "rerun"),
    [
        ("embeddings", ".parquet", "index"),
        ("index", ".faiss", "neighbors"),
        ("neighbors", ".parquet", "exports"),
    ],
)
def test_a_changed_byte_is_found(
    finished: Path, catalogue: Path, tmp_path: Path, kind: str, suffix: str, rerun: str
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    path = sorted((tmp_path / "w" / kind).rglob(f"*{suffix}"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shutil.rmtree(tmp_path / "w" / rerun)
    if rerun == "exports":
        shutil.rmtree(tmp_path / "w" / "evaluations")
    config = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w")
    with pytest.raises(DatasetError, match="does not match its checksum: got sha256"):
        run_nightly(load(config), session())
    assert (tmp_path / "w" / "current.json").read_bytes() == pointer


def test_a_full_disk_leaves_the_published_run(
    finished: Path, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    pointer = (tmp_path / "w" / "current.json").read_bytes()
    config = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w", join={"k": 4})
    replace = os.replace

    def full(source: str, target: str) -> None:
        if "/neighbors/" in str(target):
            raise OSError(28, os.strerror(28))
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(KithError, match="No space left on the device while writing"):
        run_nightly(load(config), session())
    monkeypatch.undo()
    assert (tmp_path / "w" / "current.json").read_bytes() == pointer
    assert run_nightly(load(config), session()).run["status"] == "published"


def test_search_finds_an_image_of_the_catalogue(
    finished: Path, catalogue: Path, tmp_path: Path
) -> None:
    config = load(write_config(tmp_path / "c.yaml", catalogue, finished))
    pointer = json.loads((finished / "current.json").read_text())
    index = str(finished / pointer["datasets"]["index"])
    images = [str(catalogue / "hard" / name) for name in ("photo.webp", "truncated.jpg")]
    found, failed = search_images(config, index, images, k=3, columns=("item_id",))
    assert found.neighbors[0]["image_id"] == "photo.webp"
    assert found.neighbors[0]["score"] == 1.0
    assert failed.failure is not None
    assert failed.failure.reason == "truncated"
    other = load(tmp_path / "c.yaml", "encoder.resize=pad")
    with pytest.raises(FingerprintError, match="resize: the dataset has 'crop', the configuration"):
        search_images(other, index, images, k=3)


def test_rules_apply_before_selection(finished: Path, catalogue: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "w")
    join = {"k": 5, "rules": {"same": ["category"], "different": ["drawing"]}}
    export = {"columns": ["category", "drawing"]}
    config = write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w", join=join, export=export)
    result = run_nightly(load(config), session())
    rows = table_of(tmp_path / "w", "neighbors").to_pylist()
    for row in rows:
        assert all(c == row["query_category"] for c in row["neighbor_category"])
        assert all(d != row["query_drawing"] for d in row["neighbor_drawing"])
        assert (row["status"] == "filled") == (len(row["neighbor_ids"]) == 5)
    assert result.run["join"]["exhausted"] == sum(len(r["neighbor_ids"]) < 5 for r in rows)


def test_two_runs_cannot_share_a_workspace(finished: Path, catalogue: Path, tmp_path: Path) -> None:
    config = load(write_config(tmp_path / "c.yaml", catalogue, tmp_path / "w"))
    with (
        nightly.workspace_lock(config.workspace),
        pytest.raises(KithError, match="Another run of Kith holds the workspace"),
    ):
        run_nightly(config, session())
