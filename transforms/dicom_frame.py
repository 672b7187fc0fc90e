"""One frame of a DICOM file, alone in a file that holds nothing else.

DCMTK is given this file in place of the one that was read: it decodes the frame that is wanted, not
all of them, and meets no element but those that Kith has checked and written itself.
"""

import struct
from itertools import pairwise

import numpy as np

from index_builder.errors import ImageError
from transforms.dicom_header import UNCOMPRESSED, DicomHeader
from transforms.dicom_jpeg import JPEG_SYNTAXES, check_jpeg_stream
from transforms.pixel_rules import CORRUPT, TRUNCATED

_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
JPEG2000_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))
_STREAM_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")


def cut_frame(header: DicomHeader, index: int) -> bytes:
    """The pixel data of frame `index`: samples, or the one compressed stream that makes it.

    Raises:
        ImageError: `truncated` or `corrupt`.
    """
    if header.syntax in UNCOMPRESSED or not header.fragments:
        return _cut_samples(header, index)
    streams = _streams(header)
    if len(streams) != header.frames:
        raise ImageError(
            CORRUPT, f"The dicom image has {len(streams)} streams, wanted {header.frames}."
        )
    stream = streams[index]
    if header.syntax in JPEG_SYNTAXES:
        check_jpeg_stream(stream, header.width, header.height, header.samples)
    return stream


def _cut_samples(header: DicomHeader, index: int) -> bytes:
    if header.syntax not in UNCOMPRESSED:
        raise ImageError(CORRUPT, "The dicom image should be compressed and is not.")
    # Two pixels of 4:2:2 share their colour: four samples in place of six.
    samples = 2 if _is_subsampled(header) else header.samples
    bits = header.width * header.height * samples * header.bits_allocated
    if bits * (index + 1) > len(header.pixels) * 8:
        raise ImageError(
            TRUNCATED, f"The dicom image holds fewer than {bits * header.frames // 8} pixel bytes."
        )
    first, last = index * bits // 8, -(-(index + 1) * bits // 8)
    part = header.pixels[first:last]
    if bits % 8 == 0:
        return bytes(part)
    # Frames of single bits do not begin at whole bytes.
    stored = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")
    skipped = index * bits - first * 8
    return np.packbits(stored[skipped : skipped + bits], bitorder="little").tobytes()


def _is_subsampled(header: DicomHeader) -> bool:
    return header.samples == 3 and "422" in header.photometric


def _streams(header: DicomHeader) -> list[bytes]:
    """The compressed stream of every frame, which may lie in several fragments."""
    fragments = header.fragments
    if header.frames == 1:
        return [b"".join(fragments)]
    if len(fragments) == header.frames:
        return list(fragments)
    if len(header.offsets) == header.frames:
        starts = set(header.offsets)
        position, firsts = 0, []
        for number, fragment in enumerate(fragments):
            if position in starts:
                firsts.append(number)
            position += 8 + len(fragment)
    else:
        firsts = [i for i, fragment in enumerate(fragments) if fragment.startswith(_STREAM_STARTS)]
    bounds = pairwise([*firsts, len(fragments)])
    return [b"".join(fragments[first:last]) for first, last in bounds]


def single_frame_file(header: DicomHeader, frame: bytes) -> bytes:
    """A DICOM file of one frame, as `cut_frame` gives it, of stored values.

    It says nothing of windows, rescaling or palettes: grey and palette indices come out as stored.
    """
    compressed = header.syntax not in UNCOMPRESSED
    photometric = header.photometric if header.samples > 1 else "MONOCHROME2"
    syntax = header.syntax if compressed else _EXPLICIT_LITTLE_ENDIAN
    syntax_element = _element(0x0002, 0x0010, b"UI", _padded(syntax.encode(), b"\0"))
    numbers = (
        (0x0002, header.samples),
        (0x0006, header.planar),
        (0x0010, header.height),
        (0x0011, header.width),
        (0x0100, header.bits_allocated),
        (0x0101, header.bits_stored),
        (0x0102, header.high_bit),
        (0x0103, int(header.signed)),
    )
    elements = [
        (0x0004, _element(0x0028, 0x0004, b"CS", _padded(photometric.encode("latin-1"), b" "))),
        *((n, _element(0x0028, n, b"US", struct.pack("<H", value))) for n, value in numbers),
    ]
    return b"".join(
        (
            bytes(128) + b"DICM",
            _element(0x0002, 0x0000, b"UL", struct.pack("<I", len(syntax_element))),
            syntax_element,
            *(element for _, element in sorted(elements)),
            _encapsulated(frame) if compressed else _native(frame, header.bits_allocated),
        )
    )


def _element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


def _padded(value: bytes, filling: bytes) -> bytes:
    return value + filling * (len(value) % 2)


def _native(frame: bytes, bits_allocated: int) -> bytes:
    kind = b"OB" if bits_allocated <= 8 else b"OW"
    return struct.pack("<HH2sHI", 0x7FE0, 0x0010, kind, 0, len(frame) + len(frame) % 2) + _padded(
        frame, b"\0"
    )


def _encapsulated(stream: bytes) -> bytes:
    item, end = struct.pack("<HH", 0xFFFE, 0xE000), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    stream = _padded(stream, b"\0")
    start = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    return start + item + bytes(4) + item + struct.pack("<I", len(stream)) + stream + end
