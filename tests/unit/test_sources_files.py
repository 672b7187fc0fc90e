"""Plain image files: ids, shards that stay the same, and what is missing."""

import os
from pathlib import Path
from typing import Any

import pytest

from index_builder.datasets import storage
from index_builder.errors import ConfigError, KithError
from transforms.sources.base import ImageRecord, fixed_folder
from transforms.sources.files import FilesSource

NAMES = ["a.png", "b/c.jpg", "b/with space.jpg", "b/ü/日本.webp", "z.gif"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {name}".encode())
    return folder


def source_of(*paths: Path, **settings: Any) -> FilesSource:
    return FilesSource(format="files", paths=tuple(map(str, paths)), **settings)


def read_all(source: FilesSource, scratch: Path) -> list[ImageRecord]:
    return [
        record
        for shard in source.list_shards(0, str(scratch))
        for record in source.read(shard, {"brand": "string"})
    ]


def test_ids_are_paths_below_the_common_folder(pictures: Path, tmp_path: Path) -> None:
    records = read_all(source_of(pictures / "**" / "*.*"), tmp_path / "listings")
    assert [r.image_id for r in records] == NAMES
    assert [r.source_shard for r in records] == [f"pictures/{name}" for name in NAMES]
    assert [r.data.decode() for r in records] == [f"bytes of {name}" for name in NAMES]
    assert {(r.row, r.item_id, r.error) for r in records} == {(0, None, None)}
    assert all(r.metadata == {"brand": None} for r in records)


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["*"], ["a.png", "z.gif"]),
        (["**/*"], NAMES),
        (["**"], NAMES),
        (["**/*.jpg"], ["b/c.jpg", "b/with space.jpg"]),
        (["b/*.jpg"], ["b/c.jpg", "b/with space.jpg"]),
        (["b/**/*.webp"], ["b/ü/日本.webp"]),
        (["[az].*"], ["a.png", "z.gif"]),
        (["?.gif"], ["z.gif"]),
        (["z.gif"], ["z.gif"]),
        (["*.gif", "z.*", "a.png"], ["a.png", "z.gif"]),
        (["b/*", "*.gif"], ["b/c.jpg", "b/with space.jpg", "z.gif"]),
    ],
)
def test_globs(pictures: Path, patterns: list[str], wanted: list[str]) -> None:
    found = source_of(*(pictures / pattern for pattern in patterns)).find_files()
    assert found == [str(pictures / name) for name in wanted]


def test_shards_are_ranges_of_the_listing(pictures: Path, tmp_path: Path) -> None:
    source = source_of(pictures / "**" / "*", files_per_shard=2)
    shards = source.list_shards(7, str(tmp_path / "listings"))
    assert [s.name for s in shards] == ["pictures#00000", "pictures#00001", "pictures#00002"]
    assert [(s.start, s.stop) for s in shards] == [(0, 2), (2, 4), (4, 5)]
    assert {s.source for s in shards} == {7}
    found = [[r.image_id for r in source.read(s, {})] for s in shards]
    assert found == [NAMES[:2], NAMES[2:4], NAMES[4:]]


def test_listing_again_gives_the_same_shards(pictures: Path, tmp_path: Path) -> None:
    source = source_of(pictures / "**" / "*", files_per_shard=2)
    scratch = tmp_path / "listings"
    first = source.list_shards(0, str(scratch))
    for path in sorted(pictures.rglob("*.*")):
        os.utime(path, (1, 1))  # content decides, not the clock
    assert source.list_shards(0, str(scratch)) == first
    assert len(list(scratch.iterdir())) == 1


def test_the_token_of_one_shard_changes_with_a_file(pictures: Path, tmp_path: Path) -> None:
    source = source_of(pictures / "**" / "*", files_per_shard=2)
    scratch = str(tmp_path / "listings")
    before = source.list_shards(0, scratch)
    stat = (pictures / "z.gif").stat()
    (pictures / "z.gif").write_bytes(b"Bytes of z.gif")  # as many bytes, at the same time
    os.utime(pictures / "z.gif", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = source.list_shards(0, scratch)
    assert [a.token == b.token for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert [a.name for a in before] == [b.name for b in after]


def test_a_renamed_file_changes_the_token(pictures: Path, tmp_path: Path) -> None:
    source = source_of(pictures / "**" / "*")
    (before,) = source.list_shards(0, str(tmp_path / "listings"))
    (pictures / "z.gif").rename(pictures / "zz.gif")
    (after,) = source.list_shards(0, str(tmp_path / "listings"))
    assert before.token != after.token
    # Each shard reads its own listing: an earlier run's work is still described.
    assert before.path != after.path
    assert len(storage.read_json(before.path)) == len(storage.read_json(after.path)) == 5


def test_a_file_that_vanishes_after_listing_is_one_failure(pictures: Path, tmp_path: Path) -> None:
    source = source_of(pictures / "**" / "*")
    (shard,) = source.list_shards(0, str(tmp_path / "listings"))
    (pictures / "b" / "c.jpg").unlink()
    records = list(source.read(shard, {}))
    assert [r.image_id for r in records] == NAMES
    assert [r.error is not None for r in records] == [False, True, False, False, False]
    error = records[1].error
    assert error is not None
    assert error.reason == "unreadable_file"
    assert error.message.startswith("The file cannot be read: ")
    assert str(pictures / "b" / "c.jpg") in error.message


def test_fetch_returns_the_bytes_of_a_file(pictures: Path, tmp_path: Path) -> None:
    source = source_of(pictures / "**" / "*")
    for record in read_all(source, tmp_path / "listings"):
        assert source.fetch(record.source_shard, [0]) == {0: record.data}
    assert source.fetch("pictures/a.png", [1]) == {}
    assert source.fetch("pictures/none.png", [0]) == {}


def test_a_path_that_does_not_exist_is_refused(pictures: Path) -> None:
    for path, missing in ((pictures / "none.png", "none.png"), (pictures / "none" / "*.png", "none")):
        with pytest.raises(ConfigError) as caught:
            source_of(path, name="shop").find_files()
        assert str(caught.value) == (
            f"images.sources (shop).paths: {pictures / missing} does not exist, wanted image files. "
            "Correct the path; a relative path in a config file is relative to that file's folder."
        )


def test_a_pattern_without_files_is_an_empty_catalogue(pictures: Path) -> None:
    with pytest.raises(KithError) as caught:
        source_of(pictures / "*.bmp").find_files()
    assert not isinstance(caught.value, ConfigError)
    assert str(caught.value) == (
        f"The catalogue is empty: no file matches {pictures}/*.bmp (images.sources, pictures). "
        "Put images there or correct the pattern."
    )


def test_one_of_several_paths_without_files_is_refused_too(pictures: Path) -> None:
    with pytest.raises(KithError, match=r"no file matches .*\*\.bmp"):
        source_of(pictures / "*.gif", pictures / "*.bmp").find_files()


def test_unfinished_writes_are_no_images(pictures: Path) -> None:
    (pictures / ".writing-1-x.gif").write_bytes(b"half")
    found = source_of(pictures / "*").find_files()
    assert found == [str(pictures / name) for name in ("a.png", "z.gif")]


def test_a_name_that_is_not_utf8_is_one_failure(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "good.png").write_bytes(b"good")
    with open(os.path.join(os.fsencode(folder), b"bad\xff.png"), "wb") as file:
        file.write(b"bad")
    bad, good = read_all(source_of(folder / "*"), tmp_path / "listings")
    assert (good.image_id, good.data) == ("good.png", b"good")
    assert (bad.image_id, bad.source_shard) == (None, "odd/bad\\udcff.png")
    assert bad.error is not None
    assert bad.error.reason == "unreadable_file"
    assert bad.error.message.endswith("Rename the file.")


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("/a/b/c.png", "/a/b"),
        ("/a/b/*.png", "/a/b"),
        ("/a/*/c/d.png", "/a"),
        ("/a/b?/c.png", "/a"),
        ("/*", "/"),
        ("gs://bucket/a/**", "gs://bucket/a"),
        ("gs://bucket/*.png", "gs://bucket"),
    ],
)
def test_the_folder_before_the_first_wildcard(path: str, folder: str) -> None:
    assert fixed_folder(path) == folder


def test_labels_come_from_the_common_folder(pictures: Path) -> None:
    assert source_of(pictures / "b" / "*").label == "b"
    assert source_of(pictures / "b" / "*", pictures / "*.gif").label == "pictures"
    assert source_of(pictures / "b" / "*", name="mine").label == "mine"
    assert source_of(Path("/*")).label == "images"
