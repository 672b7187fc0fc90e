"""Reads images out of TFRecord files with nothing but the standard library.

The framing is that of TensorFlow, the payload a `tf.train.Example` of two bytes features; checksums
are not looked at.
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEADER_BYTES = 12
_FOOTER_BYTES = 4
_LENGTH_DELIMITED = 2


class Place(NamedTuple):
    """Where a record's payload lies: the file, its first byte and its length."""

    path: str
    offset: int
    length: int


def find_records(folder: Path, limit: int | None = None) -> list[Place]:
    """Lists the records of all shards of a folder, in order, at most `limit`."""
    places: list[Place] = []
    for path in sorted(folder.glob("*.tfrecord")):
        offset = 0
        with path.open("rb") as file:
            while head := file.read(_HEADER_BYTES):
                length = struct.unpack("<Q", head[:8])[0]
                places.append(Place(str(path), offset + _HEADER_BYTES, length))
                offset += _HEADER_BYTES + length + _FOOTER_BYTES
                file.seek(offset)
    return places[:limit]


def read_record(place: Place) -> tuple[str, bytes]:
    """Returns the id and the encoded image of a record."""
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        features = parse_example(file.read(place.length))
    return features["image_id"].decode(), features["image/encoded"]


def parse_example(payload: bytes) -> dict[str, bytes]:
    """Returns the first value of every bytes feature of a serialised `tf.train.Example`.

    Example.features = 1, Features.feature = 1 (a map entry: key = 1, value = 2),
    Feature.bytes_list = 1, BytesList.value = 1.
    """
    found = {}
    for features in _fields(memoryview(payload), 1):
        for entry in _fields(features, 1):
            name = bytes(next(_fields(entry, 1))).decode()
            for feature in _fields(entry, 2):
                for values in _fields(feature, 1):
                    found[name] = bytes(next(_fields(values, 1)))
    return found


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 != _LENGTH_DELIMITED:
            raise ValueError(f"field {tag >> 3} has wire type {tag & 7}, wanted bytes features only.")
        length, position = _varint(message, position)
        if tag >> 3 == wanted:
            yield message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def report(images: int, seconds: float, note: str, versions: dict[str, str]) -> None:
    """Prints what the benchmark reads: one JSON object on the last line."""
    result = {"images": images, "seconds": seconds, "note": note, "versions": versions}
    print(json.dumps(result), flush=True)
