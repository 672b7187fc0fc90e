"""ICC profiles: every container's profile is applied once, sRGB and broken ones change nothing."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.unit import images_for_tests as make
from transforms import colour_profiles
from transforms.colour_profiles import cmyk_to_srgb, to_srgb
from transforms.decoding import decode_image

WIDE = make.rgb_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def by_littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert shown is not None
    return np.asarray(shown)


@pytest.mark.parametrize("primaries", [make.ADOBE_RGB, make.DISPLAY_P3])
@pytest.mark.parametrize("gamma", [1.8, 2.2])
def test_rgb_is_what_littlecms_makes_of_it(primaries, gamma: float) -> None:
    profile = make.rgb_profile(primaries, gamma)
    pixels = make.picture()
    got = to_srgb(pixels, profile)
    assert np.abs(got.astype(int) - pixels).max() > 10
    np.testing.assert_array_equal(got, by_littlecms(Image.fromarray(pixels), profile))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_container_gives_its_profile(format: str) -> None:
    pixels = make.picture()
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    plain = decode_image(make.encode(pixels, format, **options)).pixels
    shown = decode_image(make.encode(pixels, format, icc_profile=WIDE, **options)).pixels
    np.testing.assert_array_equal(shown, by_littlecms(Image.fromarray(plain), WIDE))


def test_profile_of_a_big_endian_tiff_and_of_a_bigtiff() -> None:
    pixels = make.picture()
    data = make.encode(pixels, "TIFF", icc_profile=WIDE, big_tiff=True)
    assert colour_profiles.tiff_profile(data) == WIDE
    entry = struct.pack(">HHHII", 1, 34675, 7, 5, 30)
    assert colour_profiles.tiff_profile(b"MM\0*\0\0\0\x08" + entry + bytes(8) + b"abcde") == b"abcde"
    for end in range(40):
        assert colour_profiles.tiff_profile(data[:end]) == b""


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_srgb_changes_nothing(format: str) -> None:
    pixels = make.picture()
    np.testing.assert_array_equal(
        decode_image(make.encode(pixels, format, icc_profile=SRGB)).pixels,
        decode_image(make.encode(pixels, format)).pixels,
    )


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"no profile",
        WIDE[:200],
        WIDE[:128] + b"\xff" * 40,
        b"\0" * 600,
        WIDE.replace(b"RGB ", b"XYZ ", 1),
        make.cmyk_profile(),
        make.grey_profile(1.0),
        WIDE + bytes(9 << 20),
        None,
        "text",
    ],
    ids=range(11),
)
def test_a_profile_that_cannot_be_used_counts_as_none(profile: object) -> None:
    pixels = make.picture()
    np.testing.assert_array_equal(to_srgb(pixels, profile), pixels)


def test_a_broken_profile_costs_no_image() -> None:
    pixels = make.picture()
    for profile in (WIDE[:200], b"no profile"):
        data = make.encode(pixels, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(decode_image(data).pixels, pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_grey(format: str) -> None:
    profile = make.grey_profile(1.0)
    grey = Image.fromarray(make.picture()[..., 1])
    options = {"quality": 100} if format == "JPEG" else {}
    plain = decode_image(make.encode(grey, format, **options)).pixels
    shown = decode_image(make.encode(grey, format, icc_profile=profile, **options)).pixels
    np.testing.assert_array_equal(shown, by_littlecms(Image.fromarray(plain[..., 0]), profile))
    assert shown.mean() > plain.mean() + 20


def test_grey_pixels_of_an_rgb_profile_follow_it() -> None:
    grey = np.repeat(make.picture()[..., :1], 3, axis=2)
    profile = make.rgb_profile(gamma=1.0)
    np.testing.assert_array_equal(to_srgb(grey, profile), by_littlecms(Image.fromarray(grey), profile))


def test_cmyk_goes_through_its_profile() -> None:
    profile = make.cmyk_profile()
    image = Image.fromarray(make.picture()).convert("CMYK")
    data = make.encode(image, "JPEG", quality=100, icc_profile=profile)
    with Image.open(io.BytesIO(data)) as stored:
        wanted = by_littlecms(stored, profile)
        naive = np.asarray(stored.convert("RGB"))
    shown = decode_image(data).pixels
    np.testing.assert_array_equal(shown, wanted)
    assert np.abs(shown.astype(int) - naive).mean() > 5
    np.testing.assert_array_equal(cmyk_to_srgb(image, WIDE), np.asarray(image.convert("RGB")))


def test_transparent_stays_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (10, 200, 30, 255)
    pixels = decode_image(make.encode(Image.fromarray(rgba), "PNG", icc_profile=WIDE)).pixels
    assert (pixels[2:] == 255).all()
    assert tuple(pixels[0, 0]) != (10, 200, 30)


def test_threads_convert_the_same_pixels_and_keep_few_transforms() -> None:
    pixels = make.picture()
    profiles = [make.rgb_profile(gamma=1.0 + step / 20) for step in range(20)]
    wanted = [to_srgb(pixels, profile) for profile in profiles]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda number: to_srgb(pixels, profiles[number % 20]), range(100)))
    for number, shown in enumerate(got):
        np.testing.assert_array_equal(shown, wanted[number % 20])
    assert len(colour_profiles._of_thread.transforms) <= 8
