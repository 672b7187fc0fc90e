"""Decoding of one image of any supported format to upright 8-bit RGB."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from index_builder.errors import ImageError
from transforms import tfio_decoding
from transforms.pixel_rules import (
    CORRUPT,
    EMPTY,
    ORIENTATION_TAG,
    TOO_LARGE,
    TRUNCATED,
    UNSUPPORTED_FORMAT,
    Pixels,
    check_size,
    orient,
    to_rgb,
)

DEFAULT_MAX_PIXELS = 178_956_970

# Pillow's plugins are called themselves: Image.open would try every format that is installed, and
# has a process-wide size limit of its own.
_PILLOW: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)
_PNG_BIT_DEPTH_OFFSET = 24

# What Pillow's parsers raise on hostile bytes.
_PILLOW_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# The ones of them that a header which ends too early gives.
_ENDED_EARLY = (EOFError, IndexError, struct.error)


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One image as it is displayed: pixels uint8 [height, width, 3], RGB, upright.

    `format` is one of jpeg, png, gif, bmp, webp, tiff, dicom.
    """

    pixels: Pixels
    width: int
    height: int
    format: str


def sniff_format(data: bytes) -> str | None:
    """The format that the first bytes announce, or None when they are no known image."""
    if data[128:132] == b"DICM":  # First: the 128 bytes before may be those of a TIFF header.
        return "dicom"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "bmp"
    return None


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> DecodedImage:
    """Decodes one image, the first frame of an animation; safe to call from several threads.

    `max_pixels` bounds width x height as the header states it, before anything is decoded.

    Raises:
        ImageError: `empty`, `unsupported_format`, `truncated`, `corrupt` or `too_large`.
            Bad bytes raise nothing else.
        KithError: tensorflow-io, which decodes WebP, TIFF and DICOM, cannot be loaded.
    """
    if not data:
        raise ImageError(EMPTY, "The image has zero bytes.")
    name = sniff_format(data)
    if name is None:
        raise ImageError(
            UNSUPPORTED_FORMAT,
            f"The bytes begin with {data[:8].hex(' ')}, which is no image that Kith knows.",
        )
    try:
        pixels = _decode(data, name, max_pixels)
    except _PILLOW_ERRORS as error:
        raise _image_error(name, error) from error
    height, width = pixels.shape[:2]
    return DecodedImage(pixels, width, height, name)


def _decode(data: bytes, name: str, max_pixels: int) -> Pixels:
    if name == "webp":
        header = tfio_decoding.read_webp_header(data)
        check_size(header.width, header.height, max_pixels)
        if not header.animated:
            return tfio_decoding.decode_webp(data, header)
    if name == "tiff":
        return tfio_decoding.decode_tiff(data, max_pixels)
    if name == "dicom":
        return tfio_decoding.decode_dicom(data, max_pixels)
    return _decode_with_pillow(data, name, max_pixels)


def _decode_with_pillow(data: bytes, name: str, max_pixels: int) -> Pixels:
    with _PILLOW[name](io.BytesIO(data)) as image:
        check_size(image.width, image.height, max_pixels)
        image.load()
        if name == "png" and data[_PNG_BIT_DEPTH_OFFSET] == 16:
            _keep_high_byte_of_transparency(image)
        return orient(to_rgb(image), _exif_orientation(image))


def _keep_high_byte_of_transparency(image: Image.Image) -> None:
    """Pillow reduces 16-bit colours to their high byte, but not the transparent colour."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _exif_orientation(image: Image.Image) -> object:
    """The orientation tag; unreadable EXIF counts as none, for the pixels are sound."""
    try:
        return image.getexif().get(ORIENTATION_TAG)
    except _PILLOW_ERRORS:
        return None


def _image_error(name: str, error: Exception) -> ImageError:
    text = str(error) or type(error).__name__
    root = error.__cause__ or error  # Pillow wraps what its header parsers raise.
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        reason = TOO_LARGE
    elif isinstance(root, _ENDED_EARLY) or "truncated" in text.lower():
        reason = TRUNCATED
    else:
        reason = CORRUPT
    return ImageError(reason, f"The {name} image cannot be decoded: {text}")
