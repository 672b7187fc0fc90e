"""The stated rules by which any pixels become upright 8-bit RGB; see docs/images.md."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from index_builder.errors import ImageError

Pixels = NDArray[np.uint8]

EMPTY = "empty"
UNSUPPORTED_FORMAT = "unsupported_format"
TRUNCATED = "truncated"
CORRUPT = "corrupt"
TOO_LARGE = "too_large"

ORIENTATION_TAG = 0x0112
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


class TooManyPixels(ImageError):
    """A size above a bound, `too_large`; `pixels` is what it comes to."""

    pixels = 0


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuses an image by the size that its header states, before any pixel is decoded.

    Raises:
        ImageError: `corrupt` for a size below one.
        TooManyPixels: above `max_pixels`.
    """
    if width < 1 or height < 1:
        raise ImageError(CORRUPT, f"The header states {width} x {height} pixels.")
    if width * height > max_pixels:
        error = TooManyPixels(
            TOO_LARGE, f"The header states {width} x {height} pixels, more than {max_pixels}."
        )
        error.pixels = width * height
        raise error


def orient(pixels: Pixels, orientation: object) -> Pixels:
    """Turns stored pixels [h, w, c] upright by an EXIF orientation; anything but 2..8 is 1."""
    if orientation == 2:
        pixels = pixels[:, ::-1]
    elif orientation == 3:
        pixels = pixels[::-1, ::-1]
    elif orientation == 4:
        pixels = pixels[::-1]
    elif orientation == 5:
        pixels = pixels.swapaxes(0, 1)
    elif orientation == 6:
        pixels = np.rot90(pixels, -1)
    elif orientation == 7:
        pixels = pixels[::-1, ::-1].swapaxes(0, 1)
    elif orientation == 8:
        pixels = np.rot90(pixels)
    return np.ascontiguousarray(pixels)


def composite_on_white(rgba: Pixels) -> Pixels:
    """Shows uint8 [h, w, 4] with straight alpha on white; [h, w, 3], rounded to nearest."""
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    blended = rgba[..., :3] * alpha + (255 - alpha) * 255
    return ((blended + 127) // 255).astype(np.uint8)


def premultiplied_on_white(rgba: Pixels) -> Pixels:
    """Shows uint8 [h, w, 4] whose colours are already multiplied by alpha on white; [h, w, 3]."""
    colours = rgba[..., :3].astype(np.uint16)
    return np.minimum(colours + (255 - rgba[..., 3:]), 255).astype(np.uint8)


def to_rgb(image: Image.Image) -> Pixels:
    """Converts a loaded Pillow image of any 8-bit or 16-bit mode to uint8 [h, w, 3].

    Raises:
        ImageError: `unsupported_format` for 32-bit samples, which have no stated range.
    """
    if image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise ImageError(
            UNSUPPORTED_FORMAT,
            f"The samples have 32 bits (mode {image.mode}); 16 are read at most.",
        )
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return composite_on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _grey16_to_rgb(image: Image.Image) -> Pixels:
    """The high byte of 16-bit grey; samples equal to the transparent one become white."""
    grey = np.asarray(image).astype(np.uint16)
    high = (grey >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        high[grey == transparent] = 255
    return np.repeat(high[..., None], 3, axis=2)
