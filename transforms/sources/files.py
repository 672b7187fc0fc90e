"""Plain image files by path or glob; the image id is the path below the source's folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from index_builder.datasets import storage
from index_builder.errors import ImageError
from transforms.sources.base import ImageRecord, ImageShard, ImageSource


class FilesSource(ImageSource):
    """Image files; a shard is a range of the sorted listing. Files carry no metadata (nulls)."""

    format: Literal["files"]
    files_per_shard: int = Field(1024, ge=1, description="Images in one shard.")

    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Lists the files once, keeps the listing under its own hash, and cuts it into shards."""
        names = [self.relative(path) for path in self.find_files()]
        tokens = storage.content_tokens([storage.join(self.base, name) for name in names])
        content = _encode(names)
        digest = hashlib.sha256(content).hexdigest()[:16]
        listing = storage.join(scratch, f"{self.label}-{digest}.json")
        if not storage.exists(listing):
            storage.write_bytes(listing, content)
        shards = []
        for start in range(0, len(names), self.files_per_shard):
            stop = min(start + self.files_per_shard, len(names))
            content = _encode(list(zip(names[start:stop], tokens[start:stop], strict=True)))
            token = "sha256:" + hashlib.sha256(content).hexdigest()
            name = f"{self.label}#{start // self.files_per_shard:05d}"
            shards.append(ImageShard(number, name, token, listing, start, stop))
        return shards

    def read(self, shard: ImageShard, metadata: Mapping[str, str]) -> Iterator[ImageRecord]:
        """Yields one record a file; a file that is gone by now is a record with an error."""
        names = storage.read_json(shard.path)[shard.start : shard.stop]
        nulls = dict.fromkeys(metadata)
        for name in names:
            where = f"{self.label}/{name}"
            if not _is_text(name):
                where = where.encode("utf-8", "backslashreplace").decode()
                text = "The name of the file is not UTF-8, so it cannot be an id. Rename the file."
                problem = ImageError("unreadable_file", text)
                yield ImageRecord(None, where, 0, metadata=nulls, error=problem)
                continue
            try:
                data = storage.read_bytes(storage.join(self.base, name))
            except OSError as error:
                problem = ImageError("unreadable_file", f"The file cannot be read: {error}")
                yield ImageRecord(name, where, 0, metadata=nulls, error=problem)
            else:
                yield ImageRecord(name, where, 0, data, None, nulls)

    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Reads the file; it has one row, number 0."""
        path = storage.join(self.base, source_shard.removeprefix(f"{self.label}/"))
        try:
            return {0: storage.read_bytes(path)} if 0 in rows else {}
        except FileNotFoundError:
            return {}


def _encode(value: Any) -> bytes:
    """Returns JSON in ASCII, which also holds names that are not UTF-8."""
    return json.dumps(value).encode("ascii")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
