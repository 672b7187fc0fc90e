"""Loading of Pillow's images: what it raises on bad bytes, and what is kept of a cut image."""

import struct
import zlib

from PIL import Image, ImageFile

from index_builder.errors import ImageError
from transforms.colour_profiles import cmyk_to_srgb, to_srgb
from transforms.pixel_rules import (
    CORRUPT,
    ORIENTATION_TAG,
    TOO_LARGE,
    TRUNCATED,
    Pixels,
    orient,
    to_rgb,
)

# What Pillow's parsers raise on hostile bytes.
PILLOW_ERRORS = (
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


def image_error(name: str, error: Exception) -> ImageError:
    """The failure that one of PILLOW_ERRORS stands for: `too_large`, `truncated` or `corrupt`."""
    text = str(error) or type(error).__name__
    root = error.__cause__ or error  # Pillow wraps what its header parsers raise.
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        reason = TOO_LARGE
    elif isinstance(root, _ENDED_EARLY) or "truncated" in text.lower():
        reason = TRUNCATED
    else:
        reason = CORRUPT
    return ImageError(reason, f"The {name} image cannot be decoded: {text}")


def upright_pixels(image: ImageFile.ImageFile, *, accept_truncated: bool) -> Pixels:
    """Decodes an opened image to sRGB as `stored_pixels` does, and turns it upright."""
    pixels = stored_pixels(image, accept_truncated=accept_truncated)
    return orient(pixels, _exif_orientation(image))


def stored_pixels(image: ImageFile.ImageFile, *, accept_truncated: bool) -> Pixels:
    """Decodes an opened image to sRGB, uint8 [h, w, 3], whatever its orientation.

    With `accept_truncated` the rows that a cut image lacks are black, or white where it may be
    transparent. Pillow's own switch for that, LOAD_TRUNCATED_IMAGES, is of the whole process, and
    would change what other threads and other code in the process decode.

    Raises:
        PILLOW_ERRORS: the bytes are bad.
        ImageError: `unsupported_format` for 32-bit samples.
    """
    try:
        image.load()
    except OSError as error:
        if not accept_truncated or image_error("", error).reason != TRUNCATED:
            raise
        _keep_what_is_there(image)
    profile = image.info.get("icc_profile")
    is_cmyk = image.mode == "CMYK"
    return cmyk_to_srgb(image, profile) if is_cmyk else to_srgb(to_rgb(image), profile)


def _keep_what_is_there(image: ImageFile.ImageFile) -> None:
    """Ends the loading of an image where its bytes ended."""
    image.tile = []
    try:
        image.load_end()
    except PILLOW_ERRORS:  # What follows the pixels is cut as well; the rows are there.
        return


def _exif_orientation(image: Image.Image) -> object:
    """The orientation tag; unreadable EXIF counts as none, for the pixels are sound."""
    try:
        return image.getexif().get(ORIENTATION_TAG)
    except PILLOW_ERRORS:
        return None
