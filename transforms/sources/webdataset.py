"""WebDataset: tar files in which the members of one sample share a name up to the first dot.

https://github.com/webdataset/webdataset#the-webdataset-format
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from index_builder.datasets import storage
from index_builder.errors import ImageError
from transforms.sources.base import (
    ImageRecord,
    ImageShard,
    ImageSource,
    UnreadableRegion,
    wanted_rows,
)
from transforms.sources.byte_stream import GZIP_MAGIC, ByteStream
from transforms.sources.rows import FoundRow, RowNames
from transforms.sources.tar_members import MAX_MEMBER_BYTES, TarMember, read_members

KEY = "__key__"

# The key is what comes before the first dot behind the last slash; a hidden file has none.
_MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


class WebDatasetFields(RowNames):
    """Which members of a sample are its image and its metadata, and the fields of the latter."""

    noun: ClassVar[str] = "Field"
    section: ClassVar[str] = "fields"

    image: tuple[str, ...] = Field(
        (
            "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "dcm", "jp2", "avif", "heic",
            "heif", "ico",
        ),
        min_length=1,
        description="Extensions of the image; the first that a sample has is taken. An extension is "
        "all that follows the first dot, in lower case: `left.jpg` is one.",
    )  # fmt: skip
    json_member: str = Field("json", description="Extension of the member that holds the metadata.")
    image_id: str = Field(
        KEY,
        description=f"`{KEY}` is the name of the sample, its path without extension; else a field of "
        "the metadata.",
    )


class WebDatasetSource(ImageSource):
    """Tar files, plain or gzip, whose members are grouped into samples; every file is one shard."""

    format: Literal["webdataset"]
    fields: WebDatasetFields = WebDatasetFields()

    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Lists one shard a file."""
        return self.one_shard_a_file(number)

    def read(
        self, shard: ImageShard, metadata: Mapping[str, str]
    ) -> Iterator[ImageRecord | UnreadableRegion]:
        """Yields one record a sample; a row is the number of a sample among those found.

        Where a part of the archive cannot be read, samples behind it are read all the same; one
        that lost a member there is what is left of it.
        """
        row = 0
        for item in self._read_samples(shard.path, shard.name):
            if isinstance(item, UnreadableRegion):
                yield item
            else:
                yield self._record(item, shard.name, row, metadata)
                row += 1

    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Reads the archive up to the last wanted sample."""
        samples = self._read_samples(self.path_of(source_shard), source_shard)
        records = {
            row: self._record(sample, source_shard, row, {})
            for row, sample in wanted_rows(samples, rows)
        }
        return {row: record.data for row, record in records.items() if record.error is None}

    def _read_samples(self, path: str, source_shard: str) -> Iterator["_Sample | UnreadableRegion"]:
        kept = frozenset((*self.fields.image, self.fields.json_member))

        def wanted(name: str) -> bool:
            return _split(name)[1] in kept

        with storage.open_binary(path) as file:
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            sample: _Sample | None = None
            for item in read_members(ByteStream(file, packed), source_shard, wanted):
                if isinstance(item, UnreadableRegion):
                    yield item
                    continue
                key, extension = _split(item.name)
                if key is None:
                    continue
                if sample is None or sample.key != key or extension in sample.members:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key)
                sample.members[extension] = item
            if sample is not None:
                yield sample

    def _record(
        self, sample: "_Sample", source_shard: str, row: int, metadata: Mapping[str, str]
    ) -> ImageRecord:
        values: dict[str, Any] | None = None

        def value_of(name: str) -> Any:
            nonlocal values
            if name == KEY:
                return sample.key
            if values is None:
                values = sample.parse_json(self.fields.json_member)
            return values.get(name)

        def names() -> list[str]:
            return [*sample.members, *(values or ())]

        found = FoundRow(source_shard, row, value_of, lambda: self._image(sample, found), names)
        return self.fields.record(found, metadata)

    def _image(self, sample: "_Sample", found: FoundRow) -> bytes:
        for extension in self.fields.image:
            member = sample.members.get(extension)
            if member is None:
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise ImageError(
                    "too_large",
                    f"The member {member.name!a} has {member.size} bytes, wanted at most "
                    f"{MAX_MEMBER_BYTES}.",
                )
            if member.broken:
                raise ImageError(
                    "corrupt_record",
                    f"The member {member.name!a} lacks bytes: the next one begins inside.",
                )
            if member.data is None:
                raise ImageError(
                    "missing_image",
                    f"The member {member.name!a} is a link, wanted the image itself. Write the "
                    "archive with links followed (tar --dereference --hard-dereference).",
                )
            return member.data
        names = ", ".join(self.fields.image)
        raise ImageError("missing_image", self.fields.lacks(found, "image", names, "image"))


class _Sample:
    """The members of one key, by extension."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, TarMember] = {}

    def parse_json(self, extension: str) -> dict[str, Any]:
        """Returns the metadata, none where there is no such member. Raises ImageError."""
        member = self.members.get(extension)
        if member is not None and member.broken:
            raise ImageError(
                "bad_metadata", f"The member {member.name!a} lacks bytes: the next one begins inside."
            )
        if member is None or member.data is None:
            return {}
        try:
            values = json.loads(member.data)
        except (ValueError, RecursionError) as error:
            raise ImageError(
                "bad_metadata", f"The member {member.name!a} is not valid JSON: {error}"
            ) from error
        if not isinstance(values, dict):
            raise ImageError(
                "bad_metadata",
                f"The member {member.name!a} holds {type(values).__name__}, wanted an object with "
                "fields.",
            )
        return values


def _split(name: str) -> tuple[str | None, str]:
    """Splits a member's name into key and extension; the key is None where it is of no sample."""
    match = _MEMBER_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (None, "")
