"""The structure of a DICOM file, walked to the few elements that say how its pixels are read.

Nothing else of the file leaves this module: neither tags nor values, not in error texts either.
DCMTK, which decodes the pixels under tensorflow-io, believes the lengths that a file states: a few
changed bytes make it allocate gigabytes or run without end. A file whose elements do not fit into
one another is therefore refused here, and DCMTK is given a file that Kith writes (dicom_frame).
"""

import math
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

from index_builder.errors import ImageError
from transforms.pixel_rules import CORRUPT, TOO_LARGE, TRUNCATED, UNSUPPORTED_FORMAT

_START = 132
_UNDEFINED = 0xFFFFFFFF
_MAX_DEPTH = 16
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
UNCOMPRESSED = (_IMPLICIT, "1.2.840.10008.1.2.1", _BIG_ENDIAN, _DEFLATED)
_MAX_INFLATED_BYTES = 512 << 20

_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_TRANSFER_SYNTAX, _PIXEL_DATA = 0x00020010, 0x7FE00010
_FLOAT_PIXELS = (0x7FE00008, 0x7FE00009)
_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES = 0x00280002, 0x00280004, 0x00280006, 0x00280008
_ROWS, _COLUMNS = 0x00280010, 0x00280011
_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_WINDOW_CENTRE, _WINDOW_WIDTH, _WINDOW_FUNCTION = 0x00281050, 0x00281051, 0x00281056
_INTERCEPT, _SLOPE = 0x00281052, 0x00281053
_PALETTE_DESCRIPTORS = (0x00281101, 0x00281102, 0x00281103)
_PALETTE_DATA = (0x00281201, 0x00281202, 0x00281203)
_PALETTE_SEGMENTS = (0x00281221, 0x00281222, 0x00281223)
_WANTED = frozenset(
    (
        *(_TRANSFER_SYNTAX, _SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS),
        *(_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED, _WINDOW_CENTRE, _WINDOW_WIDTH, _WINDOW_FUNCTION),
        *(_INTERCEPT, _SLOPE, *_PALETTE_DESCRIPTORS, *_PALETTE_DATA, *_PALETTE_SEGMENTS),
        *_FLOAT_PIXELS,
    )
)


@dataclass(frozen=True)
class Window:
    """The range of values that is shown, as the file states it first."""

    centre: float
    width: float
    function: str  # LINEAR, LINEAR_EXACT or SIGMOID


@dataclass(frozen=True)
class PaletteChannel:
    """One colour's table: `descriptor` as stated, its entries, whether those are segments."""

    descriptor: tuple[int, int, int]  # entries, first mapped value, bits of an entry
    data: bytes  # little-endian
    segmented: bool


@dataclass(frozen=True, eq=False)
class DicomHeader:
    """What decides how the pixels are read, and the pixel data itself.

    `pixels` holds uncompressed pixels of all frames, little-endian; `fragments` compressed ones,
    without the offset table before them, which is `offsets`.
    """

    syntax: str
    width: int
    height: int
    frames: int
    samples: int
    photometric: str
    planar: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    window: Window | None
    slope: float
    intercept: float
    palette: tuple[PaletteChannel, ...]
    pixels: memoryview
    fragments: tuple[bytes, ...]
    offsets: tuple[int, ...]


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
    pixel_kind: bytes = b""
    pixel_start: int = 0

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
        raise ImageError(CORRUPT, f"The dicom element at byte {offset} has no known type.")

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
                self.pixel_kind, self.pixel_start = kind, value
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

    def number(self, tag: int, default: int = 0) -> int:
        """A top-level unsigned short; `default` where it is absent."""
        value = self.values.get(tag, b"")
        return int(struct.unpack_from(self.order + "H", value)[0]) if len(value) >= 2 else default

    def text(self, tag: int) -> str:
        """A top-level string without its padding; empty where it is absent."""
        return self.values.get(tag, b"").decode("latin-1").strip("\0 ")

    def decimal(self, tag: int, default: float = math.nan) -> float:
        """The first of a top-level element's decimal numbers; `default` where there is none."""
        try:
            return float(self.text(tag).split("\\")[0])
        except ValueError:
            return default


def read_dicom_header(data: bytes) -> DicomHeader:
    """Walks a DICOM file to its pixel data, which must be there and whole.

    Raises:
        ImageError: `truncated` when a value ends after the file, `corrupt` when the structure is
            broken or holds no picture, `too_large` when a deflated file inflates beyond 512 MiB,
            `unsupported_format` for pixels that are no whole numbers.
    """
    try:
        return _read(data)
    except struct.error as error:
        raise ImageError(TRUNCATED, f"The dicom image ends after {len(data)} bytes.") from error
    except zlib.error as error:
        raise ImageError(CORRUPT, f"The dicom image cannot be inflated: {error}") from error


def _read(data: bytes) -> DicomHeader:
    meta = _Walk(data, True, "<")
    offset = _START
    while data[offset : offset + 2] == b"\x02\x00":
        tag, kind, length, value = meta.element(offset)
        offset = meta.value(tag, kind, length, value, len(data), 0)
        meta.values[tag] = data[value:offset]
    syntax = meta.text(_TRANSFER_SYNTAX)
    body, start = data, offset
    if syntax == _DEFLATED:
        body, start = _inflate(data[offset:]), 0
    walk = _Walk(body, _is_explicit(body, start, syntax), ">" if syntax == _BIG_ENDIAN else "<")
    end = walk.elements(start, len(body), 0, stop=_PIXEL_DATA)
    if any(tag in walk.values for tag in _FLOAT_PIXELS):
        raise ImageError(UNSUPPORTED_FORMAT, "The dicom image has floating-point pixels.")
    if _ROWS not in walk.values or not walk.pixel_start:
        raise ImageError(CORRUPT, "The dicom image holds no picture.")
    return _header(walk, syntax, end)


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data, _MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise ImageError(
            TOO_LARGE, f"The dicom image inflates to more than {_MAX_INFLATED_BYTES >> 20} MiB."
        )
    return body


def _is_explicit(body: bytes, start: int, syntax: str) -> bool:
    """Whether elements state their type; some writers contradict the syntax they announce."""
    kind = body[start + 4 : start + 6]
    if kind in _SHORT_VRS or kind in _LONG_VRS:
        return True
    return syntax != _IMPLICIT and bool(kind.isalpha())


def _header(walk: _Walk, syntax: str, end: int) -> DicomHeader:
    allocated = walk.number(_ALLOCATED)
    stored = walk.number(_STORED, allocated)
    frames = walk.text(_FRAMES)
    pixels = memoryview(walk.data)[walk.pixel_start : end] if not walk.fragments else memoryview(b"")
    if walk.order == ">" and not walk.fragments:
        pixels = _little_endian(pixels, allocated, walk.pixel_kind)
    offsets = walk.fragments[0] if walk.fragments else b""
    slope = walk.decimal(_SLOPE, 1.0)
    intercept = walk.decimal(_INTERCEPT, 0.0)
    return DicomHeader(
        syntax=syntax,
        width=walk.number(_COLUMNS),
        height=walk.number(_ROWS),
        # Absent or no number: one frame.
        frames=int(frames) if frames.isascii() and frames.isdigit() and len(frames) < 10 else 1,
        samples=walk.number(_SAMPLES, 1),
        photometric=walk.text(_PHOTOMETRIC),
        planar=walk.number(_PLANAR),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=walk.number(_HIGH_BIT, stored - 1),
        signed=walk.number(_SIGNED) == 1,
        window=_window(walk),
        slope=slope if math.isfinite(slope) and slope else 1.0,
        intercept=intercept if math.isfinite(intercept) else 0.0,
        palette=_palette(walk),
        pixels=pixels,
        fragments=tuple(walk.fragments[1:]),
        offsets=struct.unpack(f"<{len(offsets) // 4}I", offsets[: len(offsets) // 4 * 4]),
    )


def _window(walk: _Walk) -> Window | None:
    centre, width = walk.decimal(_WINDOW_CENTRE), walk.decimal(_WINDOW_WIDTH)
    function = walk.text(_WINDOW_FUNCTION) or "LINEAR"
    usable = math.isfinite(centre) and math.isfinite(width)
    least = 1 if function == "LINEAR" else 0
    if not usable or width < least or width <= 0:
        return None
    return Window(centre, width, function)


def _palette(walk: _Walk) -> tuple[PaletteChannel, ...]:
    """The tables of red, green and blue; empty when one of them is missing."""
    channels = []
    tags = zip(_PALETTE_DESCRIPTORS, _PALETTE_DATA, _PALETTE_SEGMENTS, strict=True)
    for descriptor_tag, data_tag, segments_tag in tags:
        descriptor = walk.values.get(descriptor_tag, b"")
        data = walk.values.get(data_tag) or walk.values.get(segments_tag)
        if len(descriptor) < 6 or not data:
            return ()
        if walk.order == ">":
            data = bytes(_little_endian(memoryview(data), 16, b"OW"))
        numbers = struct.unpack_from(walk.order + "HHH", descriptor)
        channels.append(PaletteChannel(numbers, data, data_tag not in walk.values))
    return tuple(channels)


def _little_endian(pixels: memoryview, allocated: int, kind: bytes) -> memoryview:
    """Big-endian words turned round; bytes (OB) have no order."""
    if kind == b"OB":
        return pixels
    size = max(allocated // 8, 2)
    whole = np.frombuffer(pixels[: len(pixels) // size * size], f">u{size}")
    return memoryview(whole.astype(f"<u{size}").tobytes())


def _check_fits(data: bytes, stop: int, end: int) -> None:
    if stop > len(data):
        raise ImageError(TRUNCATED, f"The dicom image ends after {len(data)} bytes.")
    if stop > end:
        raise ImageError(CORRUPT, "The dicom image has a value that leaves its sequence.")
