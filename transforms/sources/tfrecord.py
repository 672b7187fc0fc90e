"""TFRecord files of `tf.train.Example`, plain or gzip.

The framing is read here rather than by TensorFlow, because one damaged record must cost one row in
`failures` and not the file: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import gzip
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import google_crc32c
from pydantic import BaseModel, ConfigDict, Field

from index_builder import storage
from index_builder.errors import ImageError
from transforms.sources.base import ImageRecord, ImageShard, ImageSource, UnreadableRegion

_HEADER_BYTES = 12
_FOOTER_BYTES = 4
_MASK_DELTA = 0xA282EAD8
_GZIP_MAGIC = b"\x1f\x8b\x08"
# A length above this is taken for damage that its own checksum missed, not for an image.
_MAX_RECORD_BYTES = 1 << 30


class TFRecordFeatures(BaseModel):
    """The names of the features in each `tf.train.Example`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field("image/encoded", description="The encoded image (bytes).")
    image_id: str = Field("image_id", description="The id of the image (bytes, UTF-8; or int64).")
    item_id: str | None = Field(
        None, description="The id of the item that the image shows; default: the image's own id."
    )
    metadata: dict[str, str] = Field(
        default_factory=dict,
        description="Metadata column to feature name, where the two differ.",
    )


class TFRecordSource(ImageSource):
    """TFRecord files; every file is one shard."""

    format: Literal["tfrecord"]
    compression: Literal["auto", "none", "gzip"] = Field(
        "auto", description="`auto` looks at the first bytes of each file."
    )
    features: TFRecordFeatures = TFRecordFeatures()

    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Lists one shard a file."""
        return [
            ImageShard(number, f"{self.label}/{self.relative(path)}", storage.content_token(path), path)
            for path in self.find_files()
        ]

    def read(
        self, shard: ImageShard, metadata: Mapping[str, str]
    ) -> Iterator[ImageRecord | UnreadableRegion]:
        """Yields the records of a file; what follows broken framing is one unreadable region."""
        for row, item in enumerate(self._read_frames(shard.path)):
            if isinstance(item, str):
                yield UnreadableRegion(shard.name, item)
            elif isinstance(item, ImageError):
                yield ImageRecord(None, shard.name, row, error=item)
            else:
                yield self._parse(item, shard.name, row, metadata)

    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Reads the file up to the last wanted record, parsing only the wanted ones."""
        path = storage.join(self.base, source_shard.removeprefix(f"{self.label}/"))
        wanted, found = set(rows), {}
        for row, item in enumerate(self._read_frames(path)):
            if row in wanted and isinstance(item, bytes):
                found[row] = self._parse(item, source_shard, row, {}).data
            if row >= max(wanted):
                break
        return found

    def _read_frames(self, path: str) -> Iterator[bytes | ImageError | str]:
        """Yields payloads; an ImageError for a damaged one, a text where the framing is lost."""
        with storage.open_binary(path) as file:
            try:
                yield from _frames(self._decompressed(file))
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield f"The gzip stream of {path} is damaged: {error}"

    def _decompressed(self, file: BinaryIO) -> BinaryIO:
        head = file.read(_HEADER_BYTES)
        file.seek(0)
        packed = self.compression == "gzip" or (
            # The length of a plain first record may happen to spell gzip's magic number.
            self.compression == "auto" and head.startswith(_GZIP_MAGIC) and not _valid_header(head)
        )
        return gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[return-value]

    def _parse(
        self, payload: bytes, source_shard: str, row: int, metadata: Mapping[str, str]
    ) -> ImageRecord:
        from google.protobuf.message import DecodeError
        from tensorflow.core.example import example_pb2

        try:
            features = example_pb2.Example.FromString(payload).features.feature
        except DecodeError as error:
            problem = ImageError("not_an_example", f"The record is no tf.train.Example: {error}")
            return ImageRecord(None, source_shard, row, error=problem)
        image_id: str | None = None
        try:
            image_id = _text(features, self.features.image_id)
            if not image_id:
                raise ImageError(
                    "missing_id",
                    f"Feature {self.features.image_id!r} holds no id; the record has "
                    f"{sorted(features)}. Set images.sources.features.image_id.",
                )
            item = _text(features, self.features.item_id) if self.features.item_id else None
            columns = {
                name: _value(features, self.features.metadata.get(name, name), kind)
                for name, kind in metadata.items()
            }
            images = (
                features[self.features.image].bytes_list.value
                if (self.features.image in features)
                else ()
            )
            if not images:
                raise ImageError(
                    "missing_image",
                    f"Feature {self.features.image!r} holds no image; the record has "
                    f"{sorted(features)}. Set images.sources.features.image.",
                )
        except ImageError as error:
            return ImageRecord(image_id or None, source_shard, row, error=error)
        return ImageRecord(image_id, source_shard, row, images[0], item, columns)


def _frames(file: BinaryIO) -> Iterator[bytes | ImageError | str]:
    position = 0
    while head := file.read(_HEADER_BYTES):
        if not _valid_header(head):
            yield (
                f"The framing is lost at byte {position}: "
                + ("the file ends inside a record" if len(head) < _HEADER_BYTES else
                   "the length of the record does not match its checksum")
            )  # fmt: skip
            return
        length = int.from_bytes(head[:8], "little")
        body = file.read(length + _FOOTER_BYTES)
        if len(body) < length + _FOOTER_BYTES:
            yield f"The file ends inside the record at byte {position} ({length} bytes long)"
            return
        payload = body[:length]
        position += _HEADER_BYTES + length + _FOOTER_BYTES
        if struct.unpack("<I", body[length:])[0] == _masked_crc(payload):
            yield payload
        else:
            yield ImageError("corrupt_record", "The content of the record does not match its checksum.")


def _valid_header(head: bytes) -> bool:
    if len(head) < _HEADER_BYTES or int.from_bytes(head[:8], "little") > _MAX_RECORD_BYTES:
        return False
    return bool(struct.unpack("<I", head[8:])[0] == _masked_crc(head[:8]))


def _masked_crc(data: bytes) -> int:
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _text(features: Any, name: str) -> str | None:
    if name not in features:
        return None
    feature = features[name]
    if feature.int64_list.value:
        return str(feature.int64_list.value[0])
    if not feature.bytes_list.value:
        return None
    return _decode(feature.bytes_list.value[0], name)


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ImageError("bad_metadata", f"Feature {name!r} is not UTF-8: {error}") from error


def _value(features: Any, name: str, kind: str) -> Any:
    """Returns a metadata value as a Python value of a configured type; None where it is absent."""
    if name not in features:
        return None
    feature = features[name]
    values = feature.bytes_list.value or feature.int64_list.value or feature.float_list.value or [None]
    return convert(values[0], name, kind)


def convert(value: Any, name: str, kind: str) -> Any:
    """Converts a found value to a configured type. Raises ImageError `bad_metadata`."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = _decode(value, name)
    try:
        if kind == "string":
            return str(value)
        if kind == "float64":
            return float(value)
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError("has a fraction")
        if kind == "bool" and number not in (0, 1):
            raise ValueError("is neither 0 nor 1")
        if not -(2**63) <= number < 2**63:
            raise ValueError("does not fit into 64 bits")
        return bool(number) if kind == "bool" else number
    except (ValueError, OverflowError) as error:
        raise ImageError(
            "bad_metadata", f"Feature {name!r} is {value!r}, wanted {kind}: {error}"
        ) from error
