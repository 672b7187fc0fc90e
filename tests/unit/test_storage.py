"""Files that appear whole or not at all, and the answers when they cannot be written."""

import errno
import os
import re
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import storage
from index_builder.errors import KithError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    """A writer that is stopped by an error."""
    with storage.atomic_path(str(path)) as temporary:
        Path(temporary).write_bytes(b"half")
        raise error


def test_a_write_makes_its_folder_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    storage.write_bytes(str(path), b"one")
    storage.write_bytes(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_nothing_shows_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with storage.atomic_path(str(path)) as temporary:
        Path(temporary).write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert Path(temporary).parent == tmp_path
        assert storage.glob(str(tmp_path / "*")) == [str(path)]
        assert storage.glob(str(tmp_path / ".*")) == []
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # As FAISS reports it.
        RuntimeError("Error in write_index: Write error: No space left on device"),
    ],
)
def test_no_space_left_has_a_clear_message(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "part.parquet"
    message = (
        f"No space left on the device while writing {path} (temporary file in {tmp_path}). "
        "Free some space or set workspace to a larger disk, then run again"
    )
    with pytest.raises(KithError, match=re.escape(message)) as raised:
        write_half(path, error)
    assert raised.value.exit_status == 1
    assert raised.value.__cause__ is error
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_device_that_is_really_full(tmp_path: Path) -> None:
    def fill() -> None:
        with storage.atomic_path(str(tmp_path / "file")), open("/dev/full", "wb") as full:
            full.write(b"x" * 100_000)

    with pytest.raises(KithError, match="No space left on the device while writing"):
        fill()
    assert names(tmp_path) == []


def test_concurrent_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([65 + writer]) * 200_000 for writer in range(8)]
    start = threading.Barrier(8)

    def write(content: bytes) -> None:
        start.wait()
        for _ in range(5):
            storage.write_bytes(str(path), content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_glob_is_sorted_and_skips_temporary_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", f"{storage.TEMPORARY_PREFIX}1-c.json", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.json").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.json").write_bytes(b"")
    found = storage.glob(str(tmp_path / "*.json"))
    assert found == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    deep = storage.glob(str(tmp_path / "**" / "*.json"))
    assert deep == [*found, str(tmp_path / "sub" / "f.json")]
    assert storage.glob(str(tmp_path / "none" / "*")) == []


def test_sweeping_removes_only_temporary_files(tmp_path: Path) -> None:
    (tmp_path / f"{storage.TEMPORARY_PREFIX}77-x").write_bytes(b"left by a killed writer")
    (tmp_path / "kept").write_bytes(b"")
    storage.sweep_temporary(str(tmp_path))
    storage.sweep_temporary(str(tmp_path / "missing"))
    assert names(tmp_path) == ["kept"]


def test_a_scratch_folder_takes_what_it_made_away(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(RuntimeError, match="failed"),
        storage.scratch_folder(str(tmp_path / "there" / "a" / "b")) as folder,
    ):
        Path(folder, "file").write_bytes(b"x")
        raise RuntimeError("failed")
    assert names(tmp_path / "there") == []
    with storage.scratch_folder(str(tmp_path / "there" / "a")) as folder:
        Path(folder).parent.joinpath("of another").write_bytes(b"")
    assert names(tmp_path / "there" / "a") == ["of another"]


def test_an_unnamed_file_can_be_opened_and_is_nowhere(tmp_path: Path) -> None:
    with storage.unnamed_file(str(tmp_path)) as path:
        Path(path).write_bytes(b"content")
        assert Path(path).read_bytes() == b"content"
        assert names(tmp_path) == []
    assert not os.path.exists(path)


def test_content_token_follows_the_content(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    three.write_bytes(b"sama")
    assert storage.content_token(str(one)) == storage.content_token(str(two))
    assert storage.content_token(str(one)) != storage.content_token(str(three))
    before, times = storage.content_token(str(one)), one.stat()
    one.write_bytes(b"SAME")
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert storage.content_token(str(one)) != before
    # The MD5 that a bucket states for the same content.
    assert storage.content_token(str(two)) == "md5:51037a4a37730f52c8732586d3aaa316"


def test_checksum_of_content(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert storage.sha256_of(str(tmp_path / "empty")) == digest


def test_json_has_one_spelling(tmp_path: Path) -> None:
    path = str(tmp_path / "value.json")
    storage.write_json(path, {"b": [1, "é"], "a": None})
    assert storage.read_bytes(path) == '{\n  "a": null,\n  "b": [\n    1,\n    "é"\n  ]\n}\n'.encode()
    assert storage.read_json(path) == {"a": None, "b": [1, "é"]}
    storage.swap_json(path, {"c": 1})
    assert storage.read_json(path) == {"c": 1}


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(b'{"a": ')
    with pytest.raises(KithError, match=r"value\.json is not valid JSON .* Delete it and run"):
        storage.read_json(str(path))
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(KithError, match=r"value\.json is not valid JSON"):
        storage.read_json(str(path))


def test_size_exists_and_remove(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert storage.size(str(path)) == -1
    assert not storage.exists(str(path))
    storage.write_bytes(str(path), b"12345")
    assert storage.size(str(path)) == 5
    assert storage.exists(str(path))
    with storage.local_copy(str(path)) as local, open(local, "rb") as file:
        assert file.read() == b"12345"
    storage.remove(str(path.parent))
    storage.remove(str(path.parent))
    assert not path.parent.exists()


def test_paths_are_joined_for_disks_and_buckets() -> None:
    assert storage.join("/a/b", "../c", "d") == "/a/c/d"
    assert storage.join("gs://bucket/a/b", "../c", "d") == "gs://bucket/a/c/d"
    assert storage.join("relative", "x") == "relative/x"
    assert storage.is_remote("gs://bucket/a")
    assert not storage.is_remote("/a/b")


def test_glob_follows_links_to_files(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.bin").write_bytes(b"a")
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "linked.bin").symlink_to(tmp_path / "real" / "a.bin")
    (tmp_path / "seen" / "own.bin").write_bytes(b"b")
    (tmp_path / "seen" / "broken.bin").symlink_to(tmp_path / "nothing")
    (tmp_path / "seen" / "folder.bin").symlink_to(tmp_path / "real")
    found = storage.glob(str(tmp_path / "seen" / "*.bin"))
    assert found == [str(tmp_path / "seen" / name) for name in ("linked.bin", "own.bin")]


def test_arrow_reads_a_local_file_without_a_python_one(tmp_path: Path) -> None:
    """A Python file would be let go of by Arrow's threads, which aborts a process that ends then."""
    path = str(tmp_path / "table.parquet")
    table = pa.table({"number": range(100_000)})
    pq.write_table(table, path, row_group_size=1000)
    with storage.open_arrow(path) as file:
        assert isinstance(file, pa.OSFile)
        assert pq.read_table(file).equals(table)
    with pytest.raises(FileNotFoundError):
        storage.open_arrow(str(tmp_path / "none"))
    storage.write_bytes("memory://arrow/table.parquet", Path(path).read_bytes())
    with storage.open_arrow("memory://arrow/table.parquet") as file:
        assert pq.read_table(file).equals(table)
    storage.remove("memory://arrow/table.parquet")
