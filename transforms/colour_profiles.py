"""Embedded ICC profiles: pixels of the colour space that a file states become sRGB.

Littlecms converts them, through Pillow, as `ImageCms.profileToProfile` does: perceptual intent, to
the sRGB profile that littlecms makes itself. A profile that cannot be used counts as none, for the
pixels are sound.
"""

import io
import struct
import threading
from collections import OrderedDict

import numpy as np
from PIL import Image, ImageCms

from transforms.pixel_rules import Pixels

# The largest profiles of presses have 4 MB.
_MAX_PROFILE_BYTES = 8 << 20
# A thread keeps the transforms of so many profiles; a catalogue comes from few cameras and shops.
_CACHED_TRANSFORMS = 8
# A profile that moves no colour by more than this is sRGB, whatever it calls itself.
_SAME_COLOUR = 2

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_UNUSABLE = (ImageCms.PyCMSError, OSError, RuntimeError, TypeError, ValueError, AttributeError)

_TIFF_PROFILE_TAG = 34675
_JPEG_MARK = b"ICC_PROFILE\0"

_Transform = ImageCms.ImageCmsTransform


class _OfThread(threading.local):
    """Littlecms's objects are not to be shared among threads."""

    def __init__(self) -> None:
        self.srgb = ImageCms.createProfile("sRGB")
        self.transforms: OrderedDict[bytes, tuple[str, _Transform] | None] = OrderedDict()


_of_thread = _OfThread()


def to_srgb(pixels: Pixels, profile: object) -> Pixels:
    """Converts uint8 [h, w, 3] of an RGB or grey profile to sRGB; returns others as they are.

    `profile` is what a file holds: bytes, or anything else for none. A grey profile counts for
    pixels that are grey.
    """
    found = _transform(profile)
    if found is None:
        return pixels
    mode, transform = found
    if mode == "RGB":
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(_apply(transform, image))
    if mode == "L" and _is_grey(pixels):
        levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        table: Pixels = np.asarray(_apply(transform, levels))[0]
        shown: Pixels = table[pixels[..., 0]]
        return shown
    return pixels


def cmyk_to_srgb(image: Image.Image, profile: object) -> Pixels:
    """Converts a CMYK image, 255 for full ink, by its profile; without one as Pillow does."""
    found = _transform(profile)
    if found is None or found[0] != "CMYK":
        return np.array(image.convert("RGB"))
    return np.asarray(_apply(found[1], image))


def _apply(transform: _Transform, image: Image.Image) -> Image.Image:
    return transform.apply(image)


def _is_grey(pixels: Pixels) -> bool:
    red = pixels[..., 0]
    return np.array_equal(red, pixels[..., 1]) and np.array_equal(red, pixels[..., 2])


def _transform(profile: object) -> tuple[str, _Transform] | None:
    """The (mode of the pixels, transform to sRGB); None where nothing is to be done."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= _MAX_PROFILE_BYTES:
        return None
    transforms = _of_thread.transforms
    if profile in transforms:
        transforms.move_to_end(profile)
        return transforms[profile]
    try:
        built = _build(profile)
    except _UNUSABLE:
        built = None
    transforms[profile] = built
    if len(transforms) > _CACHED_TRANSFORMS:
        transforms.popitem(last=False)
    return built


def _build(profile: bytes) -> tuple[str, _Transform] | None:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _SPACES.get(source.profile.xcolor_space.strip())
    if mode is None:
        return None
    transform = ImageCms.buildTransform(source, _of_thread.srgb, mode, "RGB")
    if mode != "CMYK":
        probe = _probe(mode)
        shown = np.asarray(_apply(transform, probe)).astype(int)
        if np.abs(shown - np.asarray(probe.convert("RGB"))).max() <= _SAME_COLOUR:
            return None
    return mode, transform


def _probe(mode: str) -> Image.Image:
    """A picture of colours all over the space."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 18).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    return Image.fromarray(cube.reshape(18, -1, 3))


def joined_jpeg_profile(chunks: list[bytes]) -> bytes:
    """The profile that the APP2 segments of a JPEG hold in numbered pieces; empty for none.

    Pieces that are not as many as they say make no profile.
    """
    pieces = sorted(
        chunk[len(_JPEG_MARK) :] for chunk in chunks if chunk.startswith(_JPEG_MARK) and len(chunk) > 13
    )
    if not pieces or pieces[0][1] != len(pieces):
        return b""
    return b"".join(piece[2:] for piece in pieces)


def webp_profile(data: bytes) -> bytes:
    """The profile in the ICCP chunk of a WebP file; empty for none."""
    offset = 12
    while offset + 8 <= len(data):
        length = int.from_bytes(data[offset + 4 : offset + 8], "little")
        if data[offset : offset + 4] == b"ICCP":
            return data[offset + 8 : offset + 8 + length]
        offset += 8 + length + length % 2
    return b""


def tiff_profile(data: bytes) -> bytes:
    """The profile of the first page of a TIFF or BigTIFF file; empty for none."""
    order = "<" if data.startswith(b"II") else ">"
    big = 43 in data[2:4]
    count_code, entry = ("Q", order + "HHQQ") if big else ("H", order + "HHII")
    try:
        (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + count_code, data, offset)
        start = offset + struct.calcsize(order + count_code)
        size = struct.calcsize(entry)
        stop = min(start + count * size, len(data))
        for tag, _, length, place in struct.iter_unpack(
            entry, data[start : start + (stop - start) // size * size]
        ):
            if tag == _TIFF_PROFILE_TAG:
                return data[place : place + length]
    except (struct.error, OverflowError):  # A directory that ends too early holds no profile.
        return b""
    return b""
