"""WebP, TIFF and DICOM through tensorflow-io, with headers read before anything is decoded.

tensorflow-io answers bytes that it cannot decode with an error, or with an empty array and no
error; both become ImageError.
"""

import functools
import io
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from index_builder.errors import ImageError, KithError
from transforms.dicom_header import read_dicom_header
from transforms.encoders.keras_runtime import import_tensorflow
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
)

_WEBP_ANIMATION_FLAG = 0x02
_BIG_TIFF = 43

_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS = 256, 257, 258
# (offsets, byte counts) of strips and of tiles.
_TIFF_DATA_TAGS = ((273, 279), (324, 325))

# Three samples of 32 bits, and as much again for everything else in the file.
_MAX_BYTES_PER_PIXEL = 24

# DCMTK, under tensorflow-io, registers its codecs process-wide.
_dicom_lock = threading.Lock()


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
    """Decodes a still WebP, already found small enough, to upright uint8 [h, w, 3]."""
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

    Raises:
        ImageError: `truncated`, `corrupt`, `too_large`, or `unsupported_format` for samples of
            more than 16 bits.
    """
    tags = _read_tiff_tags(data)
    width, height = _whole(tags.get(_TIFF_WIDTH)), _whole(tags.get(_TIFF_HEIGHT))
    check_size(width, height, max_pixels)
    bits = max((_whole(value) for value in _values(tags.get(_TIFF_BITS, 1))), default=1)
    if bits > 16:
        raise ImageError(
            UNSUPPORTED_FORMAT, f"The tiff image has {bits}-bit samples, at most 16 are read."
        )
    for offsets_tag, counts_tag in _TIFF_DATA_TAGS:
        ranges = zip(_values(tags.get(offsets_tag)), _values(tags.get(counts_tag)), strict=False)
        if any(_whole(offset) + _whole(count) > len(data) for offset, count in ranges):
            raise ImageError(TRUNCATED, f"The tiff image ends after {len(data)} bytes.")
    rgba = _run("tiff", import_tensorflow_io().experimental.image.decode_tiff, data)
    orientation = tags.get(ORIENTATION_TAG)
    return orient(premultiplied_on_white(_undo_libtiff(rgba, orientation)), orientation)


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


def decode_dicom(data: bytes, max_pixels: int) -> Pixels:
    """Decodes the first frame of a DICOM file to uint8 [h, w, 3].

    Colour is scaled by its full range and 8-bit grey is kept; other grey is stretched so that the
    frame's smallest value is black and its largest white.
    """
    header = read_dicom_header(data, max_pixels * _MAX_BYTES_PER_PIXEL)
    check_size(header.width, header.height, max_pixels, header.frames)
    data = data[: header.end]  # DCMTK would go on to read what follows the picture.
    frame = _dicom_frame(data, "uint8", "auto")
    if frame.shape[2] == 3:
        return np.ascontiguousarray(frame)
    if header.bits_stored != 8:
        frame = _stretch(_dicom_frame(data, "float32", "preserve"))
    return np.repeat(frame, 3, axis=2)


def _dicom_frame(data: bytes, dtype: str, scale: str) -> NDArray[Any]:
    """Frame 0, [h, w, 1 or 3], of the given type."""
    tf = import_tensorflow()
    decode = import_tensorflow_io().image.decode_dicom_image
    with _dicom_lock:
        frames = _run_any(
            "dicom", decode, data,
            color_dim=True, on_error="lossy", scale=scale, dtype=tf.as_dtype(dtype),
        )  # fmt: skip
    if frames.ndim != 4 or frames.size == 0 or frames.shape[3] not in (1, 3):
        raise ImageError(
            CORRUPT,
            "The dicom image cannot be decoded: tensorflow-io found no picture in it, or one in a "
            "compression that it does not read.",
        )
    frame: NDArray[Any] = frames[0]
    return frame


def _stretch(frame: NDArray[np.float32]) -> Pixels:
    """Maps the frame's range to 0..255, rounded; a frame of one value becomes black."""
    values = frame.astype(np.float64)
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(frame.shape, np.uint8)
    stretched: Pixels = np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)
    return stretched


def _run(name: str, operation: Callable[..., Any], data: bytes) -> Pixels:
    """Runs a decoder that returns uint8 [h, w, 4]."""
    rgba = _run_any(name, operation, data)
    if rgba.ndim != 3 or rgba.size == 0 or rgba.shape[2] != 4:
        raise ImageError(CORRUPT, f"The {name} image cannot be decoded: no pixels came out.")
    pixels: Pixels = rgba
    return pixels


def _run_any(name: str, operation: Callable[..., Any], data: bytes, **options: Any) -> NDArray[Any]:
    tf = import_tensorflow()
    try:
        result: NDArray[Any] = operation(data, **options).numpy()
    except tf.errors.ResourceExhaustedError as error:
        raise ImageError(TOO_LARGE, f"The {name} image does not fit in memory.") from error
    except tf.errors.OpError as error:
        raise ImageError(CORRUPT, f"The {name} image cannot be decoded: {error.message}") from error
    return result
