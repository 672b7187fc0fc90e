"""Decoding: every format and odd pixel type by its rule, and bad bytes as failures."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from index_builder.errors import ImageError
from tests.unit import images_for_tests as make
from transforms.decoding import (
    ADMISSION_RULES,
    DEFAULT_MAX_PIXELS,
    RULES_VERSION,
    DecodePolicy,
    decode_image,
)
from transforms.image_formats import sniff_format

EACH = make.one_of_each()


def similar(pixels: np.ndarray, wanted: np.ndarray, most: float) -> bool:
    difference = np.abs(pixels.astype(int) - wanted.astype(int))
    return pixels.shape == wanted.shape and float(difference.mean()) <= most


@pytest.mark.parametrize("name", sorted(EACH))
def test_each_format_decodes_to_rgb(name: str) -> None:
    image = decode_image(EACH[name])
    assert image.pixels.dtype == np.uint8
    assert image.pixels.shape == (image.height, image.width, 3)
    assert image.format == sniff_format(EACH[name])


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    pixels = make.picture()
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(make.encode(pixels, format, **options)).pixels, pixels)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format: str, orientation: int) -> None:
    upright = make.picture()
    method = make.STORED_AS.get(orientation)
    stored = upright if method is None else np.array(Image.fromarray(upright).transpose(method))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    image = decode_image(make.oriented(stored, format, orientation, **options))
    assert (image.height, image.width) == upright.shape[:2]
    assert similar(image.pixels, upright, 3.0 if format == "JPEG" else 0.0)


def test_transparency_is_shown_on_white() -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (200, 0, 0, 255)
    rgba[:, 3:] = (0, 0, 0, 0)
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        pixels = decode_image(make.encode(Image.fromarray(rgba), format, **options)).pixels
        assert (pixels[:, :3] == (200, 0, 0)).all(), format
        assert (pixels[:, 3:] == 255).all(), format
    half = np.full((2, 2, 4), (0, 0, 0, 128), np.uint8)
    assert (decode_image(make.encode(Image.fromarray(half), "PNG")).pixels == 127).all()
    grey = Image.merge("LA", [Image.new("L", (3, 3), 10), Image.new("L", (3, 3), 0)])
    assert (decode_image(make.encode(grey, "PNG")).pixels == 255).all()


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    pixels = decode_image(make.encode(image, "PNG", transparency=1)).pixels
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert tuple(pixels[3, 3]) == (10, 20, 30)


def test_sixteen_bit_samples_keep_their_high_byte() -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    pixels = decode_image(make.encode(Image.fromarray(values), "PNG")).pixels
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 255])
    colour = np.repeat(values[..., None], 3, axis=2)
    np.testing.assert_array_equal(
        decode_image(make.png_16_bit_rgb(colour, None)).pixels[0, :, 2], [0, 0, 1, 255]
    )


def test_cmyk_is_what_pillow_shows() -> None:
    image = Image.fromarray(make.picture()).convert("CMYK")
    data = make.encode(image, "JPEG", quality=95)
    assert similar(decode_image(data).pixels, make.picture(), 6.0)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = make.encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode_image(data).pixels, np.full((10, 20, 3), (255, 0, 0)))


def test_one_pixel() -> None:
    assert decode_image(make.encode(np.full((1, 1, 3), 7, np.uint8), "PNG")).pixels.shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am no image", "unsupported_format"),
        (make.encode(make.picture(), "JPEG")[:400], "truncated"),
        (make.png_header_only(100_000, 100_000), "too_large"),
    ],
)
def test_bad_bytes_have_a_stable_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert caught.value.message


@pytest.mark.parametrize("name", sorted(EACH))
def test_too_many_pixels_are_refused_before_decoding(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(EACH[name], DecodePolicy(max_pixels=3))
    assert caught.value.reason == "too_large"


def test_policy_tells_pixels_from_admission() -> None:
    plain = DecodePolicy()
    assert plain.fingerprint() == {
        "scaled_decoding": True,
        "dicom_frame": "first",
        "decode_rules": RULES_VERSION,
    }
    assert plain.admission() == {
        "max_pixels": DEFAULT_MAX_PIXELS,
        "truncated": "fail",
        "rules": ADMISSION_RULES,
    }
    admitting = DecodePolicy(max_pixels=5, truncated="accept")
    assert admitting.fingerprint() == plain.fingerprint()
    assert admitting.admission() != plain.admission()
    for other in (DecodePolicy(scaled=False), DecodePolicy(dicom_frame="middle")):
        assert other.fingerprint() != plain.fingerprint()
        assert other.admission() == plain.admission()


@pytest.mark.parametrize(
    "settings", [{"max_pixels": 0}, {"truncated": "maybe"}, {"dicom_frame": "last"}], ids=str
)
def test_wrong_policies_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is .* but must be"):
        DecodePolicy(**settings)


@pytest.mark.parametrize("name", sorted(set(EACH) - {"jpeg"}))
def test_only_jpeg_is_decoded_at_a_reduced_size(name: str) -> None:
    image = decode_image(EACH[name], needed=lambda width, height: (1, 1))
    np.testing.assert_array_equal(image.pixels, decode_image(EACH[name]).pixels)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "tiff", "dicom", "bmp"])
def test_half_an_image_is_truncated(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(EACH[name][: len(EACH[name]) // 2])
    assert caught.value.reason == "truncated"


def test_tiff_that_states_two_widths_is_refused() -> None:
    """Pillow believes the last and libtiff the first: the limit of pixels could be passed by."""
    data = bytearray(EACH["tiff"])
    entry = int.from_bytes(data[4:8], "little") + 2
    data[entry + 24 : entry + 26] = data[entry : entry + 2]
    with pytest.raises(ImageError, match="size more than once"):
        decode_image(bytes(data))


def test_dicom_grey_is_stretched_and_its_first_frame_taken() -> None:
    first = np.array([[1000, 1500], [2000, 3000]], np.uint16)
    frames = np.stack([first, np.zeros_like(first)])
    pixels = decode_image(make.dicom(frames, bits_stored=12)).pixels
    np.testing.assert_array_equal(pixels[..., 1], [[0, 64], [128, 255]])
    inverted = decode_image(make.dicom(frames, "MONOCHROME1", bits_stored=12)).pixels
    np.testing.assert_allclose(inverted[..., 0], 255 - pixels[..., 0].astype(int), atol=1)


def test_dicom_of_eight_bits_is_kept() -> None:
    grey = make.picture()[..., 0]
    np.testing.assert_array_equal(decode_image(make.dicom(grey[None])).pixels[..., 2], grey)
    colour = make.picture()
    np.testing.assert_array_equal(decode_image(make.dicom(colour[None], "RGB")).pixels, colour)


def test_threads_decode_the_same_pixels() -> None:
    wanted = {name: decode_image(data).pixels for name, data in EACH.items()}
    names = sorted(EACH) * 20
    with ThreadPoolExecutor(4) as pool:
        decoded = list(pool.map(lambda name: decode_image(EACH[name]), names))
    for name, image in zip(names, decoded, strict=True):
        np.testing.assert_array_equal(image.pixels, wanted[name])


def test_dicom_with_a_jpeg_inside() -> None:
    grey = make.picture()[..., 0]
    data = make.dicom_of_jpeg(make.encode(Image.fromarray(grey), "JPEG", quality=95), grey.shape)
    assert similar(decode_image(data).pixels[..., 0], grey, 3.0)


@pytest.mark.parametrize("marker", [b"\xff\xc0", b"\xff\xda", b"\xff\xd9"])
def test_dicom_with_a_broken_jpeg_inside_is_refused_at_once(marker: bytes) -> None:
    """DCMTK would wait without end for a stream whose frame header or scan is missing."""
    grey = make.picture()[..., 0]
    jpeg = make.encode(Image.fromarray(grey), "JPEG", quality=95).replace(marker, b"\xff\x01")
    with pytest.raises(ImageError, match="JPEG stream"):
        decode_image(make.dicom_of_jpeg(jpeg, grey.shape))


def png_with(chunk: bytes, place: str) -> bytes:
    data = EACH["png"]
    at = 33 if place == "before the pixels" else len(data) - 12
    return data[:at] + chunk + data[at:]


LARGE = zlib.compress(bytes(2 << 20))


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"a\0\0" + LARGE),
        (b"iTXt", b"a\0\1\0\0\0" + LARGE),
        (b"iCCP", b"a\0\0" + LARGE),
        (b"iCCP", b"a\0\0garbage"),
        (b"iCCP", b""),
        (b"pHYs", b"ab"),
        (b"gAMA", b""),
        (b"cHRM", b"abc"),
        (b"sRGB", b""),
        (b"eXIf", b"junk"),
    ],
    ids=lambda value: value[:8],
)
def test_damage_beside_the_picture_of_a_png_costs_no_picture(kind, body, place) -> None:
    data = png_with(make.png_chunk(kind, body), place)
    np.testing.assert_array_equal(decode_image(data).pixels, make.picture())


def test_a_png_with_a_damaged_text_keeps_its_orientation_and_profile() -> None:
    options = {"exif": make.exif_of(6), "icc_profile": make.rgb_profile()}
    data = make.encode(make.picture(), "PNG", **options)
    text = make.png_chunk(b"tEXt", b"a\0b")
    damaged = data[:33] + text[:-1] + bytes([text[-1] ^ 1]) + data[33:]
    np.testing.assert_array_equal(decode_image(damaged).pixels, decode_image(data).pixels)
    # The same damage in a chunk of the picture counts.
    palette = make.encode(Image.fromarray(make.picture()).quantize(8), "PNG")
    place = palette.index(b"PLTE") + 6
    with pytest.raises(ImageError) as caught:
        decode_image(palette[:place] + b"\x77" + palette[place + 1 :])
    assert caught.value.reason == "corrupt"
