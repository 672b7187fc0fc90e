"""TFRecord files of `tf.train.Example`, plain or gzip.

The framing is read here rather than by TensorFlow, because one damaged record must cost one row in
`failures` and not the file: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray
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

_HEADER_BYTES = 12
_FOOTER_BYTES = 4
_MASK_DELTA = 0xA282EAD8
# A length above this is taken for damage that its own checksum missed, not for an image.
_MAX_RECORD_BYTES = 1 << 30
_SCAN_BYTES = 1 << 20


class TFRecordFeatures(RowNames):
    """The names of the features in each `tf.train.Example`."""

    noun: ClassVar[str] = "Feature"
    section: ClassVar[str] = "features"

    image: str = Field("image/encoded", description="The encoded image (bytes).")


class TFRecordSource(ImageSource):
    """TFRecord files; every file is one shard."""

    format: Literal["tfrecord"]
    compression: Literal["auto", "none", "gzip"] = Field(
        "auto", description="`auto` looks at the first bytes of each file."
    )
    features: TFRecordFeatures = TFRecordFeatures()

    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Lists one shard a file."""
        return self.one_shard_a_file(number)

    def read(
        self, shard: ImageShard, metadata: Mapping[str, str]
    ) -> Iterator[ImageRecord | UnreadableRegion]:
        """Yields the records of a file, those behind broken framing too.

        A row is the number of a record among those found; a stretch without framing has none.
        """
        row = 0
        for item in self._read_frames(shard.path, shard.name):
            if isinstance(item, UnreadableRegion):
                yield item
                continue
            if isinstance(item, ImageError):
                yield ImageRecord(None, shard.name, row, error=item)
            else:
                yield self._parse(item, shard.name, row, metadata)
            row += 1

    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Reads the file up to the last wanted record, parsing only the wanted ones."""
        frames = self._read_frames(self.path_of(source_shard), source_shard)
        return {
            row: self._parse(item, source_shard, row, {}).data
            for row, item in wanted_rows(frames, rows)
            if isinstance(item, bytes)
        }

    def _read_frames(
        self, path: str, source_shard: str
    ) -> Iterator[bytes | ImageError | UnreadableRegion]:
        """Yields payloads; an ImageError for a damaged one, a region where the framing is lost."""
        with storage.open_binary(path) as file:
            head = file.read(_HEADER_BYTES)
            file.seek(0)
            packed = self.compression == "gzip" or (
                # The length of a plain first record may happen to spell gzip's magic number.
                self.compression == "auto" and head.startswith(GZIP_MAGIC) and not _valid_header(head)
            )
            yield from _frames(ByteStream(file, packed), source_shard, path)

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
        name = self.features.image

        def image() -> bytes:
            images = features[name].bytes_list.value if name in features else ()
            if not images:
                raise ImageError("missing_image", self.features.lacks(found, "image", name, "image"))
            return bytes(images[0])

        found = FoundRow(
            source_shard, row, lambda name: _first_value(features, name), image, lambda: features
        )
        return self.features.record(found, metadata)


def _first_value(features: Any, name: str) -> Any:
    if name not in features:
        return None
    feature = features[name]
    values = feature.bytes_list.value or feature.int64_list.value or feature.float_list.value or [None]
    return values[0]


def _frames(
    stream: ByteStream, source_shard: str, path: str
) -> Iterator[bytes | ImageError | UnreadableRegion]:
    while head := stream.peek(_HEADER_BYTES):
        start = lost = stream.position
        if not _valid_header(head):
            problem = (
                "the file ends inside a record"
                if len(head) < _HEADER_BYTES
                else "the length of the record does not match its checksum"
            )
            stream.skip(1)
        else:
            length = int.from_bytes(head[:8], "little")
            payload = stream.peek(length, _HEADER_BYTES)
            footer = stream.peek(_FOOTER_BYTES, _HEADER_BYTES + length)
            whole = _HEADER_BYTES + length + _FOOTER_BYTES
            if len(footer) < _FOOTER_BYTES:
                problem = f"the file ends inside the record ({length} bytes long)"
                stream.skip(1)
            elif _matches(payload, footer):
                yield payload
                stream.skip(whole)
                continue
            else:
                yield ImageError(
                    "corrupt_record", "The content of the record does not match its checksum."
                )
                behind = stream.peek(_HEADER_BYTES, whole)
                if not behind or _valid_header(behind):
                    stream.skip(whole)
                    continue
                # Bytes are missing or too many in it, so that the next one may begin inside.
                problem = "no record begins behind one that does not match its checksum"
                stream.skip(_HEADER_BYTES)
                lost = start + whole
        found = _seek_record(stream)
        yield _region(stream, source_shard, path, min(lost, stream.position), problem, found)
        if not found:
            return
    if stream.damage:
        yield _region(stream, source_shard, path, stream.position, "", False)


def _region(
    stream: ByteStream, source_shard: str, path: str, lost: int, problem: str, found: bool
) -> UnreadableRegion:
    """Describes the bytes from `lost` to where the stream is now."""
    length = stream.position - lost
    if found:
        text = (
            f"The framing is lost at byte {lost}: {problem}. {length} bytes were passed over up to "
            f"byte {stream.position}, where the next whole record begins."
        )
    elif stream.damage:
        text = (
            f"The gzip stream of {path} is damaged: {stream.damage}. Of its content, nothing is read "
            f"from byte {lost} on ({length} bytes of it could be decompressed)."
        )
    else:
        text = (
            f"The framing is lost at byte {lost}: {problem}. No whole record follows in the "
            f"{length} bytes up to the end."
        )
    return UnreadableRegion(source_shard, text, lost)


def _seek_record(stream: ByteStream) -> bool:
    """Goes to the next whole record whose checksums hold, or to the end; tells whether one is there."""
    while True:
        block = stream.peek(_SCAN_BYTES)
        base = stream.position
        for place in _find_headers(block):
            stream.skip(base + place - stream.position)
            length = int.from_bytes(stream.peek(8), "little")
            footer = stream.peek(_FOOTER_BYTES, _HEADER_BYTES + length)
            payload = stream.peek(length, _HEADER_BYTES)
            if len(footer) == _FOOTER_BYTES and _matches(payload, footer):
                return True
        if len(block) < _SCAN_BYTES:
            stream.skip(base + len(block) - stream.position)
            return False
        # A header may begin in the last bytes of the block.
        stream.skip(base + len(block) - (_HEADER_BYTES - 1) - stream.position)


def _find_headers(block: bytes) -> list[int]:
    """Returns, ascending, where 8 bytes are a possible length and the next 4 its checksum."""
    found: list[int] = []
    for lane in range(4):
        count = (len(block) - lane) // 4
        if count < 3:
            continue
        words = np.frombuffer(block, "<u4", count, lane)
        lengths, upper, checksums = words[:-2], words[1:-1], words[2:]
        # The upper half of a length is zero: that alone leaves next to nothing of most data. Of
        # zeros it leaves everything, but the checksum of length 0 is a constant.
        possible = (upper == 0) & (lengths <= _MAX_RECORD_BYTES)
        possible &= (lengths != 0) | (checksums == _EMPTY_CHECKSUM)
        places = np.flatnonzero(possible)
        matching = _checksums_of_lengths(lengths[places]) == checksums[places]
        found += (places[matching] * 4 + lane).tolist()
    return sorted(found)


def _checksums_of_lengths(lengths: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Returns the masked CRC-32C of many lengths below 2^32, each as 8 bytes.

    A CRC is affine: that of 8 bytes is that of zeros, changed by what each byte contributes alone.
    """
    tables = _contributions()
    crc = np.full(lengths.shape, google_crc32c.value(bytes(8)), np.uint32)
    for place in range(4):
        crc ^= tables[place][(lengths >> np.uint32(8 * place)) & np.uint32(0xFF)]
    masked = (crc >> np.uint32(15)) | (crc << np.uint32(17))
    return np.asarray(masked + np.uint32(_MASK_DELTA), np.uint32)


@functools.cache
def _contributions() -> NDArray[np.uint32]:
    """Returns what a byte at one of the first 4 places changes in the CRC of 8 bytes, [4, 256]."""
    zeros = int(google_crc32c.value(bytes(8)))

    def alone(byte: int, place: int) -> int:
        return int(google_crc32c.value((byte << 8 * place).to_bytes(8, "little"))) ^ zeros

    return np.array([[alone(byte, place) for byte in range(256)] for place in range(4)], np.uint32)


def _valid_header(head: bytes) -> bool:
    if len(head) < _HEADER_BYTES or int.from_bytes(head[:8], "little") > _MAX_RECORD_BYTES:
        return False
    return _matches(head[:8], head[8:])


def _matches(data: bytes, checksum: bytes) -> bool:
    return bool(struct.unpack("<I", checksum)[0] == _masked_crc(data))


def _masked_crc(data: bytes) -> int:
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


_EMPTY_CHECKSUM = np.uint32(_masked_crc(bytes(8)))
