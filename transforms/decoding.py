"""Decoding of one image of any supported format to upright 8-bit sRGB."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from index_builder.errors import ImageError
from transforms import tfio_decoding
from transforms.colour_profiles import tiff_profile, to_srgb, webp_profile
from transforms.dicom_decoding import decode_dicom
from transforms.image_formats import open_image, sniff_format
from transforms.jpeg_decoding import decode_jpeg
from transforms.pillow_decoding import PILLOW_ERRORS, image_error, upright_pixels
from transforms.pixel_rules import EMPTY, UNSUPPORTED_FORMAT, Pixels, check_size
from transforms.png_chunks import only_picture

DEFAULT_MAX_PIXELS = 178_956_970

Truncated = Literal["fail", "accept"]
DicomFrame = Literal["first", "middle"]

# Part of the fingerprint; raised when the pixels of an image change that decodes by default.
# 2: JPEG at reduced size by libjpeg-turbo, ICC profiles applied.
RULES_VERSION = 2

# Part of what decides which images are taken; raised when one is refused that was taken before.
# 2: TIFF whose LZW or deflate data are damaged, and two kinds of planes. Datasets without a number
# have 1.
ADMISSION_RULES = 2


@dataclass(frozen=True)
class DecodePolicy:
    """What is decoded, and how, where there is a choice.

    `max_pixels` bounds width x height as the header states it. `truncated` says what becomes of a
    JPEG, PNG, GIF or BMP that ends too early or, a JPEG, is damaged on the way: a failure, or as
    much of the picture as there is. `scaled` allows JPEGs to be decoded at a reduced size.
    `dicom_frame` is the one taken of several.
    """

    max_pixels: int = DEFAULT_MAX_PIXELS
    truncated: Truncated = "fail"
    scaled: bool = True
    dicom_frame: DicomFrame = "first"

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels} but must be at least 1.")
        for name, kind in (("truncated", Truncated), ("dicom_frame", DicomFrame)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} but must be one of {', '.join(get_args(kind))}."
                )

    def fingerprint(self) -> dict[str, object]:
        """What changes the pixels of an image that decodes; JSON-able."""
        return {
            "scaled_decoding": self.scaled,
            "dicom_frame": self.dicom_frame,
            "decode_rules": RULES_VERSION,
        }

    def admission(self) -> dict[str, object]:
        """What only decides whether an image is taken; JSON-able."""
        return {
            "max_pixels": self.max_pixels,
            "truncated": self.truncated,
            "rules": ADMISSION_RULES,
        }


_DEFAULT_POLICY = DecodePolicy()


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One image as it is displayed: pixels uint8 [h, w, 3], sRGB, upright.

    `width` and `height` are those of the whole upright image; the pixels may be fewer, in the same
    proportions. `format` is one that `image_formats.sniff_format` names.
    """

    pixels: Pixels
    width: int
    height: int
    format: str


def decode_image(
    data: bytes,
    policy: DecodePolicy = _DEFAULT_POLICY,
    needed: Callable[[int, int], tuple[int, int]] | None = None,
    most_held: int | None = None,
) -> DecodedImage:
    """Decodes one image, the first frame of an animation; safe to call from several threads.

    `needed(width, height)` of the upright image gives the (width, height) that its pixels must not
    fall below, at most its own; a policy of scaled decoding uses it. None: all pixels.

    Where the decoder would hold more than `most_held` pixels at once, nothing is decoded; for a
    JPEG at a reduced size those are fewer than the picture has.

    Raises:
        TooManyPixels: more than `policy.max_pixels`, or `most_held`.
        ImageError: `empty`, `unsupported_format`, `truncated`, `corrupt` or `too_large`.
            Bad bytes raise nothing else.
        KithError: a decoder that the format needs cannot be loaded.
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
        if name == "jpeg":
            pixels, (width, height) = decode_jpeg(
                data,
                policy.max_pixels,
                needed if policy.scaled else None,
                accept_truncated=policy.truncated == "accept",
                most_held=most_held,
            )
            return DecodedImage(pixels, width, height, name)
        most = policy.max_pixels if most_held is None else min(policy.max_pixels, most_held)
        pixels = _decode(data, name, policy, most)
    except PILLOW_ERRORS as error:
        raise image_error(name, error) from error
    height, width = pixels.shape[:2]
    return DecodedImage(pixels, width, height, name)


def _decode(data: bytes, name: str, policy: DecodePolicy, max_pixels: int) -> Pixels:
    if name == "webp":
        header = tfio_decoding.read_webp_header(data)
        check_size(header.width, header.height, max_pixels)
        if not header.animated:
            return to_srgb(tfio_decoding.decode_webp(data, header), webp_profile(data))
    if name == "tiff":
        return to_srgb(tfio_decoding.decode_tiff(data, max_pixels), tiff_profile(data))
    if name == "dicom":
        return decode_dicom(data, max_pixels, policy.dicom_frame)
    try:
        return _decode_with_pillow(data, name, policy, max_pixels)
    except PILLOW_ERRORS:
        if name != "png":
            raise
    # Damage beside the picture, in a text or a time, costs no picture.
    return _decode_with_pillow(only_picture(data), name, policy, max_pixels)


def _decode_with_pillow(data: bytes, name: str, policy: DecodePolicy, max_pixels: int) -> Pixels:
    with open_image(name, data) as image:
        check_size(image.width, image.height, max_pixels)
        return upright_pixels(image, accept_truncated=policy.truncated == "accept")
