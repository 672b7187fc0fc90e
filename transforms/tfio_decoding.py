"""WebP and TIFF through tensorflow-io, with headers read before anything is decoded.

tensorflow-io answers bytes that it cannot decode with an error, or with an empty array and no
error; both become ImageError.
"""

import functools
import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from index_builder.errors import ImageError, KithError
from transforms.encoders.keras_runtime import import_tensorflow
from transforms.pillow_decoding import PILLOW_ERRORS
from transforms.pixel_rules import (
    CORRUPT,
    ORIENTATION_TAG,
    TOO_LARGE,
    TRUNCATED,
    UNSUPPORTED_FORMAT,
    Pixels,
    check_size,
    composite_on_white,
    orient,
    premultiplied_on_white,
    to_rgb,
)

_WEBP_ANIMATION_FLAG = 0x02
_BIG_TIFF = 43

_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS = 256, 257, 258
# (offsets, byte counts) of strips and of tiles.
_TIFF_DATA_TAGS = ((273, 279), (324, 325))

_TIFF_SAMPLES, _TIFF_EXTRA, _TIFF_SAMPLE_FORMAT = 277, 338, 339
_UNSIGNED, _NO_FORMAT = 1, 4

_LIBTIFF_BITS = (1, 2, 4, 8, 16)

_TIFF_COMPRESSION, _TIFF_PHOTOMETRIC, _TIFF_PLANES = 259, 262, 284
_UNCOMPRESSED, _CMYK, _SEPARATE = 1, 5, 2
# LZW and two numbers of deflate, whose damage libtiff finds; tensorflow-io keeps that to itself.
_CHECKED_COMPRESSIONS = (5, 8, 32946)

# Pillow's text for compressed data that libtiff finds damaged.
_BROKEN_DATA = "decoder error -2"

# What wraps an error text of TensorFlow.
_GRAPH_NOISE = re.compile(r"\{\{.*?\}\}\s*|\s*\[Op:.*\]")


@functools.cache
def import_tensorflow_io() -> Any:
    """The `tensorflow_io` module, with its native operations loaded.

    Raises:
        KithError: it is not installed, or does not fit the installed TensorFlow.
    """
    tf = import_tensorflow()
    try:
        import tensorflow_io

        # The native library is loaded lazily: name one operation of it.
        tensorflow_io.image.decode_webp(_SMALLEST_WEBP)
    except (ImportError, NotImplementedError, AttributeError, tf.errors.OpError) as error:
        raise KithError(
            f"tensorflow-io cannot be used with TensorFlow {tf.__version__}: {error}. WebP, TIFF "
            "and DICOM need it. Install the versions of Kith's lock file "
            "(tensorflow-io 0.37.1 beside TensorFlow 2.16)."
        ) from error
    return tensorflow_io


# A lossless WebP of one pixel.
_SMALLEST_WEBP = bytes.fromhex("524946461a000000574542505650384c0e0000002f00000000071011fd0f4444ff03")


@dataclass(frozen=True)
class WebPHeader:
    """What a WebP file says of itself: its size as stored, its EXIF block, whether it moves."""

    width: int
    height: int
    exif: bytes
    animated: bool


def read_webp_header(data: bytes) -> WebPHeader:
    """Reads the RIFF chunks of a WebP file without decoding it.

    Raises:
        ImageError: `truncated` when the file is shorter than it says, `corrupt` without a picture.
    """
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError(TRUNCATED, f"The webp image ends after {len(data)} bytes.")
    size: tuple[int, int] | None = None
    exif, animated, offset = b"", False, 12
    while offset + 8 <= len(data):
        kind = data[offset : offset + 4]
        length = int.from_bytes(data[offset + 4 : offset + 8], "little")
        body = data[offset + 8 : offset + 8 + length]
        if kind == b"EXIF":
            exif = body
        elif kind == b"VP8X" and len(body) >= 10:
            animated = bool(body[0] & _WEBP_ANIMATION_FLAG)
        size = size or _webp_chunk_size(kind, body)
        offset += 8 + length + length % 2
    if size is None:
        raise ImageError(CORRUPT, "The webp image holds no picture.")
    return WebPHeader(*size, exif, animated)


def _webp_chunk_size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    """The (width, height) that a VP8X, VP8 or VP8L chunk states."""
    if kind == b"VP8X" and len(body) >= 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8 " and len(body) >= 10:
        sizes = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return sizes[0] & 0x3FFF, sizes[1] & 0x3FFF
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def decode_webp(data: bytes, header: WebPHeader) -> Pixels:
    """Decodes a still WebP that has already been found small enough, to upright uint8 [h, w, 3]."""
    rgba = _run("webp", import_tensorflow_io().image.decode_webp, data)
    return orient(composite_on_white(rgba), _exif_orientation(header.exif))


def _exif_orientation(exif: bytes) -> object:
    """The orientation in an EXIF block; an unreadable block counts as none."""
    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(ORIENTATION_TAG)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, EOFError):
        return None


def decode_tiff(data: bytes, max_pixels: int) -> Pixels:
    """Decodes the first page of a TIFF to upright uint8 [h, w, 3].

    What libtiff does not show, Pillow may.

    Raises:
        ImageError: `truncated`, `corrupt`, `too_large`, or `unsupported_format` for samples that
            are no unsigned whole numbers of up to 16 bits.
    """
    tags = _read_tiff_tags(data)
    width, height = _whole(tags.get(_TIFF_WIDTH)), _whole(tags.get(_TIFF_HEIGHT))
    check_size(width, height, max_pixels)
    _check_tiff_samples(tags)
    _check_tiff_planes(tags)
    for offsets_tag, counts_tag in _TIFF_DATA_TAGS:
        ranges = zip(_values(tags.get(offsets_tag)), _values(tags.get(counts_tag)), strict=False)
        if any(_whole(offset) + _whole(count) > len(data) for offset, count in ranges):
            raise ImageError(TRUNCATED, f"The tiff image ends after {len(data)} bytes.")
    samples = _whole(tags.get(_TIFF_SAMPLES, 1))
    # libtiff shows grey with alpha without the alpha.
    if samples == 2 or _tiff_bits(tags) not in _LIBTIFF_BITS:
        return _tiff_with_pillow(data, max_pixels)
    if _whole(tags.get(_TIFF_COMPRESSION)) in _CHECKED_COMPRESSIONS:
        _check_tiff_data(data)
    try:
        rgba = _run("tiff", import_tensorflow_io().experimental.image.decode_tiff, data)
    except ImageError as error:
        if error.reason != CORRUPT:
            raise
        return _tiff_with_pillow(data, max_pixels)
    orientation = tags.get(ORIENTATION_TAG)
    stored = _undo_libtiff(rgba, orientation)
    return orient(_tiff_on_white(stored, samples, _values(tags.get(_TIFF_EXTRA))), orientation)


def _tiff_bits(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    return max((_whole(value) for value in _values(tags.get(_TIFF_BITS, 1))), default=1)


def _check_tiff_samples(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    bits = _tiff_bits(tags)
    formats = {_whole(value) for value in _values(tags.get(_TIFF_SAMPLE_FORMAT, _UNSIGNED))}
    if bits > 16 or not formats <= {_UNSIGNED, _NO_FORMAT}:
        kind = "unsigned" if formats <= {_UNSIGNED, _NO_FORMAT} else "signed or floating-point"
        raise ImageError(
            UNSUPPORTED_FORMAT,
            f"The tiff image has {kind} samples of {bits} bits; unsigned ones of at most 16 bits "
            "are read, for others have no stated range.",
        )


def _check_tiff_planes(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    """Refuses planes that libtiff does not show, and of which Pillow makes another picture."""
    with_alpha = _whole(tags.get(_TIFF_SAMPLES, 1)) == 2
    deep_ink = _whole(tags.get(_TIFF_PHOTOMETRIC)) == _CMYK and _tiff_bits(tags) == 16
    as_is = _whole(tags.get(_TIFF_COMPRESSION, _UNCOMPRESSED)) == _UNCOMPRESSED
    if _whole(tags.get(_TIFF_PLANES)) == _SEPARATE and (with_alpha or (deep_ink and as_is)):
        raise ImageError(
            UNSUPPORTED_FORMAT,
            "The tiff image has planes of a kind that is not read: grey and alpha, or uncompressed "
            "16-bit CMYK.",
        )


def _check_tiff_data(data: bytes) -> None:
    """Asks Pillow, which passes on what libtiff says; without it the rest of a strip would be black.

    Raises:
        ImageError: `corrupt`. What Pillow cannot show for another reason is no matter of the data.
    """
    try:
        with TiffImagePlugin.TiffImageFile(io.BytesIO(data)) as image:
            image.load()
    except PILLOW_ERRORS as error:
        if _BROKEN_DATA in str(error):
            raise ImageError(
                CORRUPT, "The tiff image cannot be decoded: its compressed data are damaged."
            ) from error


def _tiff_on_white(rgba: Pixels, samples: int, extra: tuple[Any, ...]) -> Pixels:
    """Libtiff multiplies colours by an alpha that the file calls unassociated, and no other."""
    if samples < 4 or (extra and not _whole(extra[0])):
        return np.ascontiguousarray(rgba[..., :3])  # Extra samples of no stated meaning.
    return premultiplied_on_white(rgba) if extra else composite_on_white(rgba)


def _tiff_with_pillow(data: bytes, max_pixels: int) -> Pixels:
    """The first page, which Pillow turns upright itself; its errors go to the caller."""
    try:
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except SyntaxError as error:
        if "unknown" not in str(error):
            raise
        raise ImageError(
            UNSUPPORTED_FORMAT, f"The tiff image has pixels of a kind that is not read: {error}"
        ) from error
    with image:
        check_size(image.width, image.height, max_pixels)
        layout = image.tile[0].args
        is_12_bit = isinstance(layout, tuple) and layout[0] == "I;12"
        image.load()
        if is_12_bit:
            return np.repeat((np.asarray(image)[..., None] >> 4).astype(np.uint8), 3, axis=2)
        return to_rgb(image)


def _read_tiff_tags(data: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The tags of the first page; errors of Pillow's parser go to the caller."""
    big = _BIG_TIFF in data[2:4]
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if big else data[:8])
    numbers = _tiff_tag_numbers(data, directory.next, big)
    if numbers.count(_TIFF_WIDTH) > 1 or numbers.count(_TIFF_HEIGHT) > 1:
        # Pillow believes the last one and libtiff the first, so the size could not be trusted.
        raise ImageError(CORRUPT, "The tiff image states its size more than once.")
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return directory


def _tiff_tag_numbers(data: bytes, offset: int, big: bool) -> list[int]:
    """The tag numbers of the directory at `offset`, in the order of the file."""
    order = "<" if data.startswith(b"II") else ">"
    count_code, entry_bytes = ("Q", 20) if big else ("H", 12)
    (count,) = struct.unpack_from(order + count_code, data, offset)
    start = offset + struct.calcsize(order + count_code)
    stop = min(start + count * entry_bytes, len(data) - 1)
    return [
        int(struct.unpack_from(order + "H", data, entry)[0])
        for entry in range(start, stop, entry_bytes)
    ]


def _values(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _whole(value: Any) -> int:
    """A number of a header as an int; 0 where there is none."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return 0


def _undo_libtiff(rgba: Pixels, orientation: object) -> Pixels:
    """Takes back libtiff's own handling of the orientation, which mirrors but never transposes."""
    if orientation in (2, 6):
        return rgba[:, ::-1]
    if orientation in (3, 7):
        return rgba[::-1, ::-1]
    if orientation in (4, 8):
        return rgba[::-1]
    return rgba


def _run(name: str, operation: Callable[..., Any], data: bytes) -> Pixels:
    """Runs a decoder that returns uint8 [h, w, 4]."""
    rgba = run_operation(name, operation, data)
    if rgba.ndim != 3 or rgba.size == 0 or rgba.shape[2] != 4:
        raise ImageError(CORRUPT, f"The {name} image cannot be decoded: no pixels came out.")
    pixels: Pixels = rgba
    return pixels


def run_operation(
    name: str, operation: Callable[..., Any], data: bytes, **options: Any
) -> NDArray[Any]:
    """Runs an operation of tensorflow-io on an image of the format `name`.

    Raises:
        ImageError: `corrupt` or `too_large`.
    """
    tf = import_tensorflow()
    try:
        result: NDArray[Any] = operation(data, **options).numpy()
    except tf.errors.ResourceExhaustedError as error:
        raise ImageError(TOO_LARGE, f"The {name} image does not fit in memory.") from error
    except tf.errors.OpError as error:
        text = _GRAPH_NOISE.sub("", error.message)
        raise ImageError(CORRUPT, f"The {name} image cannot be decoded: {text}") from error
    return result
