"""TFRecord files written by hand, byte by byte, so that they can be damaged at a known place."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorflow.core.example import example_pb2

HEADER_BYTES = 12
FOOTER_BYTES = 4


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) bit by bit: slow, and independent of the library under test."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    """The checksum as the TFRecord format stores it: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def frame(payload: bytes) -> bytes:
    """One record: length, its checksum, payload, its checksum."""
    length = struct.pack("<Q", len(payload))
    checksums = [struct.pack("<I", masked_crc(part)) for part in (length, payload)]
    return length + checksums[0] + payload + checksums[1]


def example(**features: Any) -> bytes:
    """A serialised tf.train.Example; int, float, bytes and str values, or lists of one kind.

    A `__` in a name stands for the `/` of a feature's name.
    """
    message = example_pb2.Example()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = message.features.feature[name.replace("__", "/")]
        if not values or isinstance(values[0], bytes | str):
            encoded = [v.encode() if isinstance(v, str) else v for v in values]
            feature.bytes_list.value.extend(encoded)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return bytes(message.SerializeToString(deterministic=True))


def write_records(path: Path, payloads: Sequence[bytes], compress: bool = False) -> Path:
    """Writes a TFRecord file and returns its path."""
    data = b"".join(map(frame, payloads))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if compress else data)
    return path
