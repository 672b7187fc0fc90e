"""The structure of a DICOM file, walked before DCMTK sees it.

DCMTK, which decodes the pixels under tensorflow-io, believes the lengths that a file states: a few
changed bytes make it allocate gigabytes or run without end. A file whose elements do not fit into
one another is therefore refused here.
"""

import struct
import zlib
from dataclasses import dataclass, field

from index_builder.errors import ImageError
from transforms.dicom_jpeg import JPEG_SYNTAXES, check_jpeg_streams
from transforms.pixel_rules import CORRUPT, TRUNCATED

_START = 132
_UNDEFINED = 0xFFFFFFFF
_MAX_DEPTH = 16
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_UNCOMPRESSED = (_IMPLICIT, "1.2.840.10008.1.2.1", _BIG_ENDIAN, _DEFLATED)

_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_TRANSFER_SYNTAX, _PIXEL_DATA = 0x00020010, 0x7FE00010
_SAMPLES, _PHOTOMETRIC, _FRAMES = 0x00280002, 0x00280004, 0x00280008
_ROWS, _COLUMNS, _ALLOCATED, _STORED = 0x00280010, 0x00280011, 0x00280100, 0x00280101
_WANTED = frozenset(
    (_TRANSFER_SYNTAX, _SAMPLES, _PHOTOMETRIC, _FRAMES, _ROWS, _COLUMNS, _ALLOCATED, _STORED)
)


@dataclass(frozen=True)
class DicomHeader:
    """What decides how the pixels are read; `end` is where the file's pixel data ends."""

    width: int
    height: int
    frames: int
    bits_stored: int
    end: int


@dataclass
class _Walk:
    """One pass over elements in one encoding.

    `values` holds the wanted elements of the top level, `fragments` its compressed pixels.
    """

    data: bytes
    explicit: bool
    order: str
    values: dict[int, bytes] = field(default_factory=dict)
    fragments: list[bytes] = field(default_factory=list)

    def element(self, offset: int) -> tuple[int, bytes, int, int]:
        """The (tag, value representation, length, offset of the value) of one element."""
        group, number = struct.unpack_from(self.order + "HH", self.data, offset)
        tag = group << 16 | number
        if not self.explicit or group == 0xFFFE:
            return tag, b"", *self._length("I", offset + 4)
        kind = self.data[offset + 4 : offset + 6]
        if kind in _SHORT_VRS:
            return tag, kind, *self._length("H", offset + 6)
        if kind in _LONG_VRS:
            return tag, kind, *self._length("I", offset + 8)
        raise ImageError(CORRUPT, f"The dicom element at byte {offset} has the type {kind!r}.")

    def _length(self, code: str, offset: int) -> tuple[int, int]:
        (length,) = struct.unpack_from(self.order + code, self.data, offset)
        return length, offset + struct.calcsize(self.order + code)

    def elements(self, offset: int, end: int, depth: int, stop: int | None = None) -> int:
        """Walks elements up to `end`, a delimiter, or past the tag `stop`; where it came to."""
        if depth > _MAX_DEPTH:
            raise ImageError(CORRUPT, f"The dicom sequences are nested over {_MAX_DEPTH} deep.")
        while offset < end:
            tag, kind, length, value = self.element(offset)
            if tag in (_ITEM_END, _SEQUENCE_END):
                return value
            offset = self.value(tag, kind, length, value, end, depth)
            if depth == 0 and tag in _WANTED:
                if tag in self.values:  # DCMTK may believe the other one.
                    raise ImageError(CORRUPT, f"The dicom element {tag:08x} is there twice.")
                self.values[tag] = self.data[value:offset]
            if tag == stop:
                return offset
        return offset

    def value(self, tag: int, kind: bytes, length: int, offset: int, end: int, depth: int) -> int:
        """Walks one value; the offset after it."""
        if length == _UNDEFINED:
            if kind == b"UN":  # Its items are in the implicit encoding, whatever the file's.
                return _Walk(self.data, False, "<").items(offset, end, depth)
            return self.items(offset, end, depth, fragments=tag == _PIXEL_DATA)
        _check_fits(self.data, offset + length, end)
        if kind == b"SQ":
            self.items(offset, offset + length, depth)
        return offset + length

    def items(self, offset: int, end: int, depth: int, fragments: bool = False) -> int:
        """Walks the items of a sequence, or the fragments of compressed pixels."""
        while offset < end:
            tag, _, length, value = self.element(offset)
            if tag == _SEQUENCE_END:
                return value
            if tag != _ITEM or (fragments and length == _UNDEFINED):
                raise ImageError(CORRUPT, f"The dicom sequence at byte {offset} is broken.")
            if length == _UNDEFINED:
                offset = self.elements(value, end, depth + 1)
                continue
            _check_fits(self.data, value + length, end)
            if fragments and depth == 0:
                self.fragments.append(self.data[value : value + length])
            elif not fragments:
                self.elements(value, value + length, depth + 1)
            offset = value + length
        return offset

    def number(self, tag: int) -> int:
        """A top-level unsigned short; 0 where it is absent."""
        value = self.values.get(tag, b"")
        return int(struct.unpack_from(self.order + "H", value)[0]) if len(value) >= 2 else 0

    def text(self, tag: int) -> str:
        """A top-level string without its padding; empty where it is absent."""
        return self.values.get(tag, b"").decode("latin-1").strip("\0 ")


def read_dicom_header(data: bytes, max_bytes: int) -> DicomHeader:
    """Walks a DICOM file; a deflated one is inflated up to `max_bytes` for that.

    Raises:
        ImageError: `truncated` when a value ends after the file, `corrupt` when the structure is
            broken or holds no picture.
    """
    try:
        return _read(data, max_bytes)
    except struct.error as error:
        raise ImageError(TRUNCATED, f"The dicom image ends after {len(data)} bytes.") from error
    except zlib.error as error:
        raise ImageError(CORRUPT, f"The dicom image cannot be inflated: {error}") from error


def _read(data: bytes, max_bytes: int) -> DicomHeader:
    meta = _Walk(data, True, "<")
    offset = _START
    while data[offset : offset + 2] == b"\x02\x00":
        tag, kind, length, value = meta.element(offset)
        offset = meta.value(tag, kind, length, value, len(data), 0)
        meta.values[tag] = data[value:offset]
    syntax = meta.text(_TRANSFER_SYNTAX)
    body, start = data, offset
    if syntax == _DEFLATED:
        body, start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[offset:], max_bytes), 0
    walk = _Walk(body, syntax != _IMPLICIT, ">" if syntax == _BIG_ENDIAN else "<")
    end = _walk_to_pixels(walk, start, syntax)
    return DicomHeader(
        width=walk.number(_COLUMNS),
        height=walk.number(_ROWS),
        frames=_frames(walk),
        bits_stored=walk.number(_STORED),
        end=len(data) if syntax == _DEFLATED else end,
    )


def _walk_to_pixels(walk: _Walk, start: int, syntax: str) -> int:
    """Walks to the end of the pixel data, which must be there and whole."""
    size = len(walk.data)
    end = walk.elements(start, size, 0, stop=_PIXEL_DATA)
    if _ROWS not in walk.values or end > size:
        raise ImageError(CORRUPT, "The dicom image holds no picture.")
    width, height, frames = walk.number(_COLUMNS), walk.number(_ROWS), _frames(walk)
    samples = max(walk.number(_SAMPLES), 1)
    if syntax in JPEG_SYNTAXES:
        check_jpeg_streams(walk.fragments[1:], frames, width, height, samples)
    subsampled = "42" in walk.text(_PHOTOMETRIC)
    expected = width * height * frames * samples * walk.number(_ALLOCATED) // 8
    if syntax in _UNCOMPRESSED and not subsampled and expected > end - start:
        raise ImageError(TRUNCATED, f"The dicom image holds fewer than {expected} pixel bytes.")
    return end


def _frames(walk: _Walk) -> int:
    """The number of frames; 1 where it is absent or no number."""
    text = walk.text(_FRAMES)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1


def _check_fits(data: bytes, stop: int, end: int) -> None:
    if stop > len(data):
        raise ImageError(TRUNCATED, f"The dicom image ends after {len(data)} bytes.")
    if stop > end:
        raise ImageError(CORRUPT, "The dicom image has a value that leaves its sequence.")
