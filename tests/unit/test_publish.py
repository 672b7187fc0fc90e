"""The pointer: what it says, and what is said where it is missing or damaged."""

import json
import shutil
from pathlib import Path

import pytest

from index_builder.errors import DatasetError, KithError
from pipelines.publish import publish, published_folder, read_pointer, require_published


def publish_one(workspace: Path, run: str = "r1", fingerprint: str = "abc") -> Path:
    datasets = {kind: f"{workspace}/{kind}/{fingerprint}" for kind in ("index", "neighbors")}
    return Path(publish(str(workspace), run, datasets))


def test_the_pointer_is_relative_to_the_workspace(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    path = publish_one(workspace)
    assert path == workspace / "current.json"
    assert json.loads(path.read_text()) == {
        "schema_version": 1,
        "run": "r1",
        "run_path": "runs/r1",
        "datasets": {"index": "index/abc", "neighbors": "neighbors/abc"},
    }
    assert published_folder(str(workspace), "index") == str(workspace / "index/abc")
    assert require_published(str(workspace), "neighbors") == str(workspace / "neighbors/abc")


def test_a_workspace_that_was_moved_is_still_published(tmp_path: Path) -> None:
    publish_one(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert require_published(str(tmp_path / "new"), "index") == str(tmp_path / "new/index/abc")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_slash_at_the_end_of_the_workspace_is_no_matter(tmp_path: Path, slash: str) -> None:
    path = publish(f"{tmp_path}{slash}", "r1", {"index": f"{tmp_path}/index/abc"})
    assert json.loads(Path(path).read_text())["datasets"] == {"index": "index/abc"}


def test_publishing_again_replaces_the_pointer(tmp_path: Path) -> None:
    publish_one(tmp_path, "r1", "abc")
    publish_one(tmp_path, "r2", "def")
    pointer = read_pointer(str(tmp_path))
    assert pointer is not None
    assert pointer["run"] == "r2"
    assert require_published(str(tmp_path), "index") == str(tmp_path / "index/def")
    assert [path.name for path in tmp_path.iterdir()] == ["current.json"]


def test_before_the_first_run_nothing_is_published(tmp_path: Path) -> None:
    assert read_pointer(str(tmp_path)) is None
    assert published_folder(str(tmp_path), "index") is None
    with pytest.raises(DatasetError) as caught:
        require_published(str(tmp_path), "index")
    assert str(caught.value) == (
        f"Nothing is published in {tmp_path}: it has no current.json. Run kith nightly first, or give "
        "the folder of a dataset."
    )


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 2, "datasets": {}}', "null"])
def test_a_pointer_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "current.json").write_text(text)
    for look in (
        lambda: read_pointer(str(tmp_path)),
        lambda: require_published(str(tmp_path), "index"),
    ):
        with pytest.raises(KithError) as caught:
            look()
        assert str(caught.value) == (
            f"{tmp_path}/current.json is no pointer of schema version 1. Restore it, or delete it and "
            "publish a new run."
        )


def test_a_damaged_pointer_is_refused(tmp_path: Path) -> None:
    path = publish_one(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(KithError, match=r"current\.json is not valid JSON .*Delete it"):
        read_pointer(str(tmp_path))


def test_a_pointer_without_the_wanted_dataset_is_refused(tmp_path: Path) -> None:
    publish_one(tmp_path)
    with pytest.raises(KithError, match=r"current\.json names no dataset 'embeddings'\."):
        require_published(str(tmp_path), "embeddings")
