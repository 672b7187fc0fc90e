"""Manifests and markers: what counts as finished, and what damaged datasets answer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from index_builder.datasets import manifests, storage
from index_builder.datasets.fingerprints import fingerprint, short
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import DatasetError, KithError

REPOSITORY = Path(__file__).parents[2]


def make_part(folder: Path, name: str, content: bytes = b"content", key: str = "key") -> Part:
    storage.write_bytes(str(folder / f"{name}.bin"), content)
    file = manifests.describe_file(str(folder), f"{name}.bin")
    return Part(name, key, len(content), (file,), {"figure": 1})


def make_manifest(parts: list[Part], fingerprint_of_inputs: str = "inputs") -> Manifest:
    schema = [{"name": "image_id", "type": "string"}]
    return Manifest("embeddings", fingerprint_of_inputs, {"a": 1}, schema, tuple(parts), {"dim": 3})


def make_dataset(folder: Path) -> Manifest:
    manifest = make_manifest([make_part(folder, "p0"), make_part(folder, "p1", b"longer content")])
    manifests.commit(str(folder), manifest)
    return manifest


def edit(folder: Path, **changes: Any) -> None:
    path = folder / manifests.MANIFEST_NAME
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(value))


def test_a_committed_dataset_is_read_back(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    read = manifests.load(str(tmp_path), "embeddings")
    assert read == manifest
    assert read.rows == 7 + 14
    assert read.bytes == 7 + 14
    assert read.content == manifest.content
    assert read.parts[0].file(".bin").path == "p0.bin"
    with pytest.raises(DatasetError, match=r"Part p0 has no \.parquet file, only \['p0\.bin'\]"):
        read.parts[0].file(".parquet")


def test_committing_comes_last_and_clears_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = make_part(tmp_path, "p0")
    manifests.mark_part(str(tmp_path), part)
    (tmp_path / f"{storage.TEMPORARY_PREFIX}1-x").write_bytes(b"left by a killed writer")
    assert not manifests.is_complete(str(tmp_path))
    assert manifests.count_finished(str(tmp_path)) == 1

    # Markers go only when the manifest is in place, so a crash in between loses nothing.
    removed_with_manifest = []
    remove = storage.remove

    def watch(path: str) -> None:
        removed_with_manifest.append(manifests.is_complete(str(tmp_path)))
        remove(path)

    monkeypatch.setattr(storage, "remove", watch)
    manifests.commit(str(tmp_path), make_manifest([part]))
    assert removed_with_manifest == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_manifest.json", "p0.bin"]
    assert manifests.count_finished(str(tmp_path)) == 0


def test_equal_datasets_have_equal_manifests(tmp_path: Path) -> None:
    one = make_dataset(tmp_path / "one")
    two = make_dataset(tmp_path / "two")
    name = manifests.MANIFEST_NAME
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    other = make_manifest([make_part(tmp_path / "three", "p0"), one.parts[0]])
    assert one.content == two.content != other.content


def test_markers_resume_finished_parts_only(tmp_path: Path) -> None:
    folder = str(tmp_path)
    part = make_part(tmp_path, "p0")
    assert manifests.finished_part(folder, "p0", "key") is None
    manifests.mark_part(folder, part)
    assert manifests.finished_part(folder, "p0", "key") == part
    assert manifests.finished_part(folder, "p0", "another key") is None
    assert manifests.finished_part(folder, "p1", "key") is None
    (tmp_path / "p0.bin").write_bytes(b"shorter"[:-1])
    assert manifests.finished_part(folder, "p0", "key") is None
    (tmp_path / "p0.bin").unlink()
    assert manifests.finished_part(folder, "p0", "key") is None


def test_collecting_wants_every_part(tmp_path: Path) -> None:
    folder = str(tmp_path)
    first, second = make_part(tmp_path, "p0", key="k0"), make_part(tmp_path, "p1", key="k1")
    manifests.mark_part(folder, second)
    with pytest.raises(DatasetError, match=r"is incomplete: part p0 was not finished\. Run the"):
        manifests.collect_parts(folder, ["p0", "p1"], ["k0", "k1"])
    manifests.mark_part(folder, first)
    assert manifests.collect_parts(folder, ["p0", "p1"], ["k0", "k1"]) == (first, second)
    with pytest.raises(DatasetError, match="part p1 was not finished"):
        manifests.collect_parts(folder, ["p0", "p1"], ["k0", "k0"])


def test_a_usable_dataset_has_the_fingerprint_and_all_files(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert manifests.load_if_usable(folder, "embeddings", "inputs") is None
    manifest = make_dataset(tmp_path)
    assert manifests.load_if_usable(folder, "embeddings", "inputs") == manifest
    assert manifests.load_if_usable(folder, "embeddings", "other inputs") is None
    content = (tmp_path / "p1.bin").read_bytes()
    (tmp_path / "p1.bin").write_bytes(content + b"x")
    assert manifests.load_if_usable(folder, "embeddings", "inputs") is None
    (tmp_path / "p1.bin").write_bytes(content)
    assert manifests.load_if_usable(folder, "embeddings", "inputs") == manifest
    (tmp_path / "p1.bin").unlink()
    assert manifests.load_if_usable(folder, "embeddings", "inputs") is None


def test_a_checksum_that_differs(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    file = manifest.parts[0].files[0]
    assert manifests.verify_file(str(tmp_path), file) == str(tmp_path / "p0.bin")
    (tmp_path / "p0.bin").write_bytes(b"Content")
    wanted = (
        rf"p0\.bin does not match its checksum: got sha256 [0-9a-f]{{64}}, the manifest says "
        rf"{file.sha256}\. The file was changed or damaged: delete it and run the stage again"
    )
    with pytest.raises(DatasetError, match=wanted):
        manifests.verify_file(str(tmp_path), file)
    (tmp_path / "p0.bin").unlink()
    with pytest.raises(DatasetError, match=r"p0\.bin is missing, but .*_manifest\.json lists it"):
        manifests.verify_file(str(tmp_path), file)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    message = r"is not a complete embeddings dataset: it has no _manifest\.json\. Run the stage"
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(DatasetError, match=message):
            manifests.load(str(folder), "embeddings")


def test_a_dataset_of_another_kind(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    with pytest.raises(DatasetError, match="holds a dataset of kind 'embeddings', wanted 'index'"):
        manifests.load(str(tmp_path), "index")


@pytest.mark.parametrize(("version", "shown"), [(99, "99"), (None, "None"), ("1", "1")])
def test_another_schema_version(tmp_path: Path, version: object, shown: str) -> None:
    make_dataset(tmp_path)
    edit(tmp_path, schema_version=version)
    message = f"has schema version {shown}, this version of Kith reads 1. Make the dataset again"
    with pytest.raises(DatasetError, match=message):
        manifests.load(str(tmp_path), "embeddings")


def test_damaged_manifests(tmp_path: Path) -> None:
    path = tmp_path / manifests.MANIFEST_NAME
    make_dataset(tmp_path)
    whole = path.read_text()

    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(KithError, match=r"_manifest\.json is not valid JSON"):
        manifests.load(str(tmp_path), "embeddings")

    path.write_text("[]")
    with pytest.raises(DatasetError, match="has schema version list"):
        manifests.load(str(tmp_path), "embeddings")

    path.write_text(whole)
    edit(tmp_path, parts=[{"name": "p0"}])
    with pytest.raises(DatasetError, match="is damaged: KeyError"):
        manifests.load(str(tmp_path), "embeddings")

    path.write_text(whole)
    edit(tmp_path, parts=None)
    with pytest.raises(DatasetError, match="is damaged: TypeError"):
        manifests.load(str(tmp_path), "embeddings")

    path.write_text(whole)
    edit(tmp_path, parts=json.loads(whole)["parts"][:1])
    with pytest.raises(DatasetError, match=r"is damaged: its content digest is [0-9a-f]{64},"):
        manifests.load(str(tmp_path), "embeddings")


def test_a_part_is_named_from_a_sibling_dataset(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    part = make_dataset(old).parts[0]
    moved = manifests.relocate(part, str(old), str(new))
    assert moved.files[0].path == "../old/p0.bin"
    new.mkdir()
    path = manifests.verify_file(str(new), moved.files[0])
    assert os.path.samefile(path, old / "p0.bin")
    assert manifests.is_intact(str(new), moved)
    # A part that was itself taken over points to the first home, without piling up.
    newer = manifests.relocate(moved, str(new), str(tmp_path / "newer"))
    assert newer.files[0].path == "../old/p0.bin"
    back = manifests.relocate(moved, str(new), str(old))
    assert os.path.samefile(manifests.verify_file(str(old), back.files[0]), path)
    remote = manifests.relocate(part, "gs://bucket/w/old", "gs://bucket/w/new")
    assert remote.files[0].path == "../old/p0.bin"
    assert storage.join("gs://bucket/w/new", remote.files[0].path) == "gs://bucket/w/old/p0.bin"


def test_fingerprints_are_the_same_in_every_process() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "日本", "x": ""}, "c": sorted({"q", "r", "s"})}
    program = (
        "import json, sys; from index_builder.datasets.fingerprints import fingerprint; "
        "print(fingerprint(json.loads(sys.argv[1])))"
    )
    found = set()
    for seed in ("0", "1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program, json.dumps(value)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(result.stdout.strip())
    assert found == {fingerprint(value)}
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


def test_fingerprints_of_different_values_differ() -> None:
    values: list[Any] = [None, 0, 1, "1", "", [], {}, {"a": 1}, {"a": 2}, [1], [[1]], False]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert short(fingerprint(1)) == fingerprint(1)[:16]
    with pytest.raises(TypeError):
        fingerprint({"a": {1, 2}})
