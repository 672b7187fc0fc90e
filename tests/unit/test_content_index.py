"""The content index finds the first row of every picture, however the rows are bucketed."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import content_index
from index_builder.datasets.content_index import ContentIndex, build_content_index
from index_builder.datasets.embeddings import EmbeddingSchema
from index_builder.datasets.manifests import Part, describe_file


def digest_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def write_part(folder: Path, name: str, digests: list[bytes]) -> Part:
    schema = EmbeddingSchema(2)
    count = len(digests)
    columns = {
        "image_id": [f"{name}-{row}" for row in range(count)],
        "item_id": [f"{name}-{row}" for row in range(count)],
        "content_sha256": digests,
        "source_shard": ["s"] * count,
        "row": list(range(count)),
        "width": [1] * count,
        "height": [1] * count,
        "format": ["png"] * count,
    }
    table = schema.table(np.zeros((count, 2), np.float16), columns)
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    return Part(name, name, count, (describe_file(str(folder), f"{name}.parquet"),))


@pytest.mark.parametrize("bucket", [1, 5, 1 << 20])
def test_every_row_is_found_in_any_number_of_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int
) -> None:
    monkeypatch.setattr(content_index, "_BUCKET_ENTRIES", bucket)
    parts = [
        write_part(tmp_path, "a", [digest_of(n) for n in range(40)]),
        write_part(tmp_path, "empty", []),
        write_part(tmp_path, "b", [digest_of(n) for n in range(30, 60)]),
    ]
    build_content_index(str(tmp_path), parts, str(tmp_path / "index.bin"))
    index = ContentIndex(str(tmp_path / "index.bin"))
    for number in range(40):
        assert index.find(digest_of(number)) == (0, number)
    for number in range(40, 60):
        assert index.find(digest_of(number)) == (2, number - 30)
    assert index.find(digest_of(60)) is None
    assert index.find(bytes(32)) is None
    assert index.find(b"\xff" * 32) is None


def test_digests_that_share_their_first_half_are_told_apart(tmp_path: Path) -> None:
    digests = [b"\x07" * 8 + bytes([n]) + bytes(23) for n in range(9)]
    parts = [write_part(tmp_path, "a", digests)]
    build_content_index(str(tmp_path), parts, str(tmp_path / "index.bin"))
    index = ContentIndex(str(tmp_path / "index.bin"))
    assert [index.find(digest) for digest in digests] == [(0, n) for n in range(9)]
    assert index.find(b"\x07" * 8 + b"\x09" + bytes(23)) is None


def test_an_empty_dataset_holds_nothing(tmp_path: Path) -> None:
    build_content_index(str(tmp_path), [write_part(tmp_path, "a", [])], str(tmp_path / "index.bin"))
    assert ContentIndex(str(tmp_path / "index.bin")).find(digest_of(1)) is None
