"""Every source reads from a bucket what it reads from a disk; a storage emulator stands in for it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from index_builder.datasets import storage
from index_builder.errors import ConfigError
from transforms.sources.base import ImageRecord, ImageSource
from transforms.sources.registry import FORMATS, AnySource

SAMPLES = Path(__file__).parents[2] / "samples"
PATHS = {
    "files": "files/objects/*.jpg",
    "tfrecord": "small/*.tfrecord",
    "webdataset": "webdataset/*.tar",
    "parquet": "parquet/*.parquet",
    "table": "table/*.csv",
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with some samples, of which gs://kith/samples holds a copy."""
    local = tmp_path_factory.mktemp("local") / "samples"
    for folder in ("files", "webdataset", "parquet", "table"):
        for path in (SAMPLES / folder).rglob("*.*"):
            target = local / path.relative_to(SAMPLES)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    # A cut TFRecord file, so that reading ahead meets the end of an object.
    shard = sorted((SAMPLES / "catalog").iterdir())[0]
    (local / "small").mkdir()
    (local / "small" / "a.tfrecord").write_bytes(shard.read_bytes()[:100_000])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-c",
        "from gcp_storage_emulator.server import create_server; import time;"
        f"s = create_server('127.0.0.1', {port}, in_memory=True, default_bucket='kith');"
        "s.start(); time.sleep(600)",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
            for path in local.rglob("*.*"):
                name = path.relative_to(local).as_posix()
                storage.write_bytes(f"gs://kith/samples/{name}", path.read_bytes())
            yield local
    finally:
        process.kill()
        process.wait()


def read_from(name: str, root: str, scratch: str) -> tuple[ImageSource, list[list[object]]]:
    source: ImageSource = TypeAdapter(AnySource).validate_python(
        {"format": name, "paths": f"{root}/{PATHS[name]}"}
    )
    items = [
        [
            shard.name,
            [
                (i.image_id, i.row, i.data, i.item_id, dict(i.metadata), i.error)
                if isinstance(i, ImageRecord)
                else (i.offset,)
                for i in source.read(shard, {"category": "string"})
            ],
        ]
        for shard in source.list_shards(0, scratch)
    ]
    return source, items


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_bucket_gives_what_a_disk_gives(bucket: Path, tmp_path: Path, name: str) -> None:
    _, local = read_from(name, str(bucket), str(tmp_path / "listings"))
    source, remote = read_from(name, "gs://kith/samples", "gs://kith/listings")
    assert remote == local
    assert sum(len(items) for _, items in remote if isinstance(items, list)) >= 6
    for shard, items in remote:
        assert isinstance(shard, str)
        assert isinstance(items, list)
        images = {item[1]: item[2] for item in items if len(item) > 1}
        if name != "files":
            assert source.fetch(shard, list(images)) == images


def test_the_tokens_of_a_table_in_a_bucket_follow_its_images(bucket: Path) -> None:
    source: ImageSource = TypeAdapter(AnySource).validate_python(
        {"format": "table", "paths": "gs://kith/samples/table/images.csv", "rows_per_shard": 6}
    )
    before = source.list_shards(0, "gs://kith/listings")
    assert source.list_shards(0, "gs://kith/listings") == before
    changed = "gs://kith/samples/files/objects/fluent3d-1f3b8.jpg"
    data = storage.read_bytes(changed)
    try:
        storage.write_bytes(changed, b"another")
        after = source.list_shards(0, "gs://kith/listings")
    finally:
        storage.write_bytes(changed, data)
    assert [a.token == b.token for a, b in zip(before, after, strict=True)] == [False, True]
    assert source.list_shards(0, "gs://kith/listings") == before


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_folder_that_a_bucket_lacks_is_refused(bucket: Path, name: str) -> None:
    source: ImageSource = TypeAdapter(AnySource).validate_python(
        {"format": name, "paths": "gs://kith/none/a.x"}
    )
    with pytest.raises(ConfigError, match="gs://kith/none/a.x does not exist"):
        source.list_shards(0, "gs://kith/listings")
