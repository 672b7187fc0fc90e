"""JPEG: its header read from the markers, its pixels by libjpeg-turbo at a reduced size.

Libjpeg decodes at n/8 of the size by leaving frequencies out, which is much faster than decoding
all and resizing. Whatever it finds wrong is refused here, and Pillow asked where that does not
concern the pixels.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from index_builder.errors import ImageError
from transforms.colour_profiles import cmyk_to_srgb, joined_jpeg_profile, to_srgb
from transforms.image_formats import open_image
from transforms.pillow_decoding import PILLOW_ERRORS, image_error, stored_pixels
from transforms.pixel_rules import (
    CORRUPT,
    ORIENTATION_TAG,
    TOO_LARGE,
    TRUNCATED,
    UNSUPPORTED_FORMAT,
    Pixels,
    check_size,
    orient,
)

Needed = Callable[[int, int], tuple[int, int]]

# Each scan of a progressive JPEG goes over the whole picture; encoders write about ten.
_MAX_SCANS = 500

_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_SOS, _EOI, _APP1, _APP2 = 0xDA, 0xD9, 0xE1, 0xE2
# Markers without a length: TEM and the restart markers.
_BARE = frozenset((0x01, *range(0xD0, 0xD8)))
_END = b"\xff\xd9"

_EXIF_MARK, _XMP_MARK = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}  # TIFF types BYTE, SHORT and LONG.

# What libjpeg says of data that end before the picture does, and of data that make no sense.
# It says other things of files whose pixels are sound.
_CUT = ("Premature end of JPEG file", "premature end of data segment")
_DAMAGED = ("bad Huffman code", "bad arithmetic code", "instead of RST")


@dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say; the size is as stored, not upright.

    `frame` is the second byte of the frame marker, `components` the number of colour channels,
    `scan_components` how many of them the first scan holds. `orientation` is that of EXIF or, where
    that has none, of XMP; None when neither has one. `profile` is the ICC profile, empty for none.
    """

    width: int
    height: int
    components: int
    frame: int
    scan_components: int
    orientation: int | None
    profile: bytes


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Reads the segments up to the first scan, in any order, without decoding anything.

    Raises:
        ImageError: `truncated` when the bytes end before a scan begins, `corrupt` for impossible
            segments, `unsupported_format` for 12-bit samples or other than 1, 3 or 4 components.
    """
    frame: tuple[int, int, int, int] | None = None
    exif, xmp, pieces = b"", b"", []
    offset = 2
    while True:
        marker, offset = _next_marker(data, offset)
        if marker in _BARE:
            continue
        if marker == _EOI:
            raise ImageError(CORRUPT, "The jpeg image ends before its first scan.")
        length = int.from_bytes(data[offset : offset + 2], "big")
        if offset + max(length, 2) > len(data):
            raise _cut(data)
        if length < 2:
            raise ImageError(CORRUPT, f"The jpeg image has a segment of {length} bytes.")
        body = offset + 2
        offset += length
        if marker == _APP1:
            if data.startswith(_EXIF_MARK, body):
                exif += data[body + len(_EXIF_MARK) : offset]
            elif data.startswith(_XMP_MARK, body):
                xmp = data[body + len(_XMP_MARK) : offset]
        elif marker == _APP2:
            pieces.append(data[body:offset])
        elif marker in _SOF_MARKERS and frame is None:
            frame = _read_frame(data[body:offset], marker)
        elif marker == _SOS:
            if frame is None:
                raise ImageError(CORRUPT, "The jpeg image has a scan before its frame header.")
            scan_components = data[body] if length > 2 else 0
            width, height, components, kind = frame
            return JpegHeader(
                width,
                height,
                components,
                kind,
                scan_components,
                _orientation(exif, xmp),
                joined_jpeg_profile(pieces),
            )


def _next_marker(data: bytes, offset: int) -> tuple[int, int]:
    """The next marker and the offset after it; skips junk and fill bytes as libjpeg does."""
    while True:
        offset = data.find(b"\xff", offset)
        if offset < 0:
            raise _cut(data)
        while data[offset : offset + 1] == b"\xff":
            offset += 1
        if offset >= len(data):
            raise _cut(data)
        offset += 1
        if data[offset - 1]:
            return data[offset - 1], offset


def _cut(data: bytes) -> ImageError:
    return ImageError(TRUNCATED, f"The jpeg image ends after {len(data)} bytes, in its header.")


def _read_frame(body: bytes, marker: int) -> tuple[int, int, int, int]:
    """The (width, height, components, marker) of a frame header."""
    if len(body) < 6:
        raise ImageError(CORRUPT, "The jpeg image has a frame header that is too short.")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if precision != 8:
        raise ImageError(
            UNSUPPORTED_FORMAT, f"The jpeg image has {precision}-bit samples, only 8 are read."
        )
    if components not in (1, 3, 4):
        raise ImageError(
            UNSUPPORTED_FORMAT, f"The jpeg image has {components} components; 1, 3 and 4 are read."
        )
    return width, height, components, marker


def _orientation(exif: bytes, xmp: bytes) -> int | None:
    """The orientation that EXIF states, or else XMP, as Pillow reads them."""
    found = _exif_orientation(exif)
    if found is None and xmp:
        match = _XMP_ORIENTATION.search(xmp)
        return int(match[1]) if match else None
    return found


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block; an unreadable block has none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return None
    (offset,) = struct.unpack_from(order + "I", exif, 4)
    count = int.from_bytes(exif[offset : offset + 2], "little" if order == "<" else "big")
    entries = exif[offset + 2 : offset + 2 + 12 * count]
    for tag, kind, _, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == ORIENTATION_TAG and kind in _WHOLE_NUMBERS:
            return int(struct.unpack_from(order + _WHOLE_NUMBERS[kind], value)[0])
    return None


def decode_jpeg(
    data: bytes,
    max_pixels: int,
    needed: Needed | None,
    *,
    accept_truncated: bool,
    most_held: int | None = None,
) -> tuple[Pixels, tuple[int, int]]:
    """Decodes a JPEG to upright sRGB and tells its full (width, height), upright.

    The pixels, uint8 [h, w, 3], have the smallest of libjpeg's sizes that is not below
    `needed(width, height)`, or all of them when `needed` is None. With `accept_truncated` what a
    cut or damaged stream holds is decoded, and the rest is grey. Nothing is decoded where libjpeg
    would hold more than `most_held` pixels at once.

    Raises:
        TooManyPixels: more than `max_pixels`, or `most_held`.
        ImageError: `too_large`, `truncated`, `corrupt` or `unsupported_format`.
    """
    header = read_jpeg_header(data)
    check_size(header.width, header.height, max_pixels)
    if header.frame == _PROGRESSIVE and data.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError(TOO_LARGE, f"The jpeg image has more than {_MAX_SCANS} scans.")
    turned = header.orientation in (5, 6, 7, 8)
    size = (header.height, header.width) if turned else (header.width, header.height)
    least = None
    if needed is not None:
        least = needed(*size)
        least = max(least[0], 1), max(least[1], 1)  # Zero would mean any size to libjpeg.
        least = least[::-1] if turned else least
    if most_held is not None:
        check_size(*_held_size(header, least), most_held)
    try:
        pixels = _decode(data, header, least, strict=True)
    except ValueError as error:
        pixels = _decode_faulty(data, header, least, str(error), accept_truncated=accept_truncated)
    return orient(pixels, header.orientation), size


def _held_size(header: JpegHeader, least: tuple[int, int] | None) -> tuple[int, int]:
    """The (width, height) that libjpeg holds: what it returns, or all where scans come in turns.

    Its sizes are n/8 of the full one, rounded up.
    """
    width, height = header.width, header.height
    in_one_scan = header.scan_components == header.components
    if least is None or header.frame not in _SEQUENTIAL or not in_one_scan:
        return width, height
    eighths = min(max(-(-8 * least[0] // width), -(-8 * least[1] // height)), 8)
    return -(-width * eighths // 8), -(-height * eighths // 8)


def _decode(data: bytes, header: JpegHeader, least: tuple[int, int] | None, *, strict: bool) -> Pixels:
    """Decodes to sRGB [h, w, 3] as stored.

    Raises:
        ValueError: libjpeg's first complaint; with `strict` also warnings.
    """
    width, height = least or (0, 0)
    stored = simplejpeg.decode_jpeg(
        data,
        colorspace="CMYK" if header.components == 4 else "RGB",
        min_width=width,
        min_height=height,
        min_factor=1,
        strict=strict,
    )
    if header.components != 4:
        return to_srgb(stored, header.profile)
    # Inverted, for Adobe's programs write 255 for no ink, and no others write such files.
    size = (stored.shape[1], stored.shape[0])
    image = Image.frombuffer("CMYK", size, np.ascontiguousarray(stored), "raw", "CMYK;I", 0, 1)
    return cmyk_to_srgb(image, header.profile)


def _decode_faulty(
    data: bytes,
    header: JpegHeader,
    least: tuple[int, int] | None,
    complaint: str,
    *,
    accept_truncated: bool,
) -> Pixels:
    """Decides about a JPEG that libjpeg complains of, and decodes it if it is taken."""
    cut = any(words in complaint for words in _CUT)
    if cut and header.frame in _SEQUENTIAL and header.scan_components == header.components:
        try:  # Only the end marker may be missing, and all pixels there.
            return _decode(data + _END, header, least, strict=True)
        except ValueError:
            pass  # Pixels are missing as well.
    if cut or any(words in complaint for words in _DAMAGED):
        if accept_truncated:
            return _decode_leniently(data, header, least, complaint)
        raise ImageError(
            TRUNCATED if cut else CORRUPT, f"The jpeg image cannot be decoded: {complaint}"
        )
    try:
        return _decode_with_pillow(data, least)
    except PILLOW_ERRORS as error:
        failure = image_error("jpeg", error)
        if failure.reason == TRUNCATED and accept_truncated:
            return _decode_leniently(data, header, least, complaint)
        if failure.reason == CORRUPT and header.frame not in (*_SEQUENTIAL, _PROGRESSIVE):
            raise ImageError(
                UNSUPPORTED_FORMAT,
                f"The jpeg image is neither baseline nor progressive (frame marker ff "
                f"{header.frame:02x}), and cannot be decoded: {complaint}",
            ) from error
        raise failure from error


def _decode_leniently(
    data: bytes, header: JpegHeader, least: tuple[int, int] | None, complaint: str
) -> Pixels:
    """Decodes what there is of a cut or damaged stream."""
    try:
        return _decode(data, header, least, strict=False)
    except ValueError as error:
        raise ImageError(CORRUPT, f"The jpeg image cannot be decoded: {complaint}; {error}") from error


def _decode_with_pillow(data: bytes, least: tuple[int, int] | None) -> Pixels:
    """Decodes as stored, for libjpeg's sizes of 1/2, 1/4 and 1/8 where they suffice."""
    with open_image("jpeg", data) as image:
        if least is not None:
            image.draft(None, least)
        return stored_pixels(image, accept_truncated=False)
