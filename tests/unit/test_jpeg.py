"""JPEG: its header in every odd order, its kinds against Pillow, faults told apart, scaling."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import load_originals, make_photograph
from index_builder.errors import ImageError
from tests.unit import images_for_tests as make
from transforms.decoding import DecodePolicy, decode_image
from transforms.encoders.registry import EncoderSpec, load_encoder
from transforms.jpeg_decoding import read_jpeg_header
from transforms.preprocessing import Preprocessing

HARD = Path(__file__).parents[2] / "samples" / "hard"
PICTURE = Image.fromarray(make.picture(120, 200))
PLAIN = make.encode(PICTURE, "JPEG", quality=90)
PROGRESSIVE = make.encode(PICTURE, "JPEG", quality=90, progressive=True)
DEFAULT, ACCEPT = DecodePolicy(), DecodePolicy(truncated="accept")
LITE0_INPUT = Preprocessing((224, 224))


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def reason_of(data: bytes, policy: DecodePolicy = DEFAULT) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, policy)
    return caught.value.reason


# Kinds


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 90, "progressive": True},
        {"quality": 90, "subsampling": 0},
        {"quality": 90, "subsampling": 1},
        {"quality": 90, "keep_rgb": True},
        {"quality": 90, "restart_marker_blocks": 3},
        {"quality": 30, "optimize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_full_size_is_what_pillow_decodes(options: dict[str, object], mode: str) -> None:
    data = make.encode(PICTURE.convert(mode), "JPEG", **options)
    np.testing.assert_array_equal(decode_image(data).pixels, by_pillow(data))


def test_ycck_is_what_pillow_decodes() -> None:
    """Pillow writes no YCCK: say with Adobe's marker that the four channels of a CMYK file are."""
    data = make.encode(PICTURE.convert("CMYK"), "JPEG", quality=95, subsampling=0)
    place = data.index(b"Adobe")
    ycck = data[: place + 11] + b"\x02" + data[place + 12 :]
    np.testing.assert_array_equal(decode_image(ycck).pixels, by_pillow(ycck))
    assert np.abs(decode_image(ycck).pixels.astype(int) - decode_image(data).pixels).mean() > 5


def test_sampling_that_simplejpeg_does_not_know() -> None:
    """Luminance of 3 x 1 samples: libjpeg decodes it, TurboJPEG's interface does not."""
    data = bytearray(make.encode(PICTURE, "JPEG", quality=90, subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = 0x31
    image = decode_image(bytes(data), needed=lambda width, height: (20, 20))
    assert (image.width, image.height) == PICTURE.size
    assert image.pixels.shape == (30, 50, 3)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (4, 12, "unsupported_format"),  # The bits of a sample.
        (9, 2, "unsupported_format"),  # The number of components.
        (1, 0xC3, "unsupported_format"),  # Lossless.
        (1, 0xC5, "unsupported_format"),  # Hierarchical.
    ],
)
def test_kinds_that_are_not_read(at: int, value: int, reason: str) -> None:
    data = bytearray(PLAIN)
    data[data.index(b"\xff\xc0") + at] = value
    assert reason_of(bytes(data)) == reason


# Headers


def test_header_of_segments_in_any_order() -> None:
    segments = [
        make.jpeg_segment(0xFE, b"a comment with \xff\xd8\xff\xc0 in it"),
        make.jpeg_segment(0xE2, b"ICC_PROFILE\0\x02\x02world"),
        make.jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='8'/>"),
        b"\xff\xff\xff" + make.jpeg_segment(0xE1, make.exif_of(6, ">")),  # Fill bytes.
        make.jpeg_segment(0xE2, b"MPF\0other"),
        make.jpeg_segment(0xE2, b"ICC_PROFILE\0\x01\x02hello "),
        b"junk",
    ]
    header = read_jpeg_header(make.with_segments(PLAIN, *segments))
    assert (header.width, header.height, header.components) == (200, 120, 3)
    assert header.orientation == 6
    assert header.profile == b"hello world"


@pytest.mark.parametrize(
    ("segments", "orientation"),
    [
        ([], None),
        ([make.jpeg_segment(0xE1, make.exif_of(3))], 3),
        ([make.jpeg_segment(0xE1, make.exif_of(3)[:20]), make.jpeg_segment(0xE1, b"Exif\0\0")], None),
        ([make.jpeg_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(9))], None),
        ([make.jpeg_segment(0xE1, b"Exif\0\0nonsense")], None),
        ([make.jpeg_segment(0xE1, b"Exif\0\0")], None),
        (
            [
                make.jpeg_segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<a tiff:Orientation="5">'),
                make.jpeg_segment(0xE1, b"Exif\0\0"),
            ],
            5,
        ),
    ],
    ids=range(7),
)
def test_orientation_is_the_one_that_pillow_reads(segments: list[bytes], orientation) -> None:
    data = make.with_segments(PLAIN, *segments)
    assert read_jpeg_header(data).orientation == orientation
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif().get(make.ORIENTATION_TAG) == orientation


def test_exif_in_two_segments_is_joined() -> None:
    whole = make.exif_of(8)
    halves = [whole[:24], b"Exif\0\0" + whole[24:]]
    data = make.with_segments(PLAIN, *(make.jpeg_segment(0xE1, half) for half in halves))
    assert read_jpeg_header(data).orientation == 8


@pytest.mark.parametrize(
    "pieces", [[b"\x01\x02a"], [b"\x01\x01a", b"\x02\x01b"], [b"\x01"], [b"\x01\x03a", b"\x03\x03b"]]
)
def test_a_profile_with_a_piece_missing_is_none(pieces: list[bytes]) -> None:
    segments = [make.jpeg_segment(0xE2, b"ICC_PROFILE\0" + piece) for piece in pieces]
    assert read_jpeg_header(make.with_segments(PLAIN, *segments)).profile == b""


def test_every_cut_header_is_truncated() -> None:
    data = make.with_segments(PLAIN, make.jpeg_segment(0xE1, make.exif_of(3)))
    scan = data.index(b"\xff\xda")
    for end in range(3, scan + 2):
        with pytest.raises(ImageError) as caught:
            read_jpeg_header(data[:end])
        assert caught.value.reason == "truncated", end


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xe0\x00\x01" + bytes(20),
        b"\xff\xd8" + make.jpeg_segment(0xC0, b"\x08\0") + bytes(20),
        b"\xff\xd8" + make.jpeg_segment(0xDA, b"\x01\x01\0\0\x3f\0") + bytes(20),
        b"\xff\xd8" + make.jpeg_segment(0xC0, b"\x08\0\0\0\x09\x01") + make.jpeg_segment(0xDA, b"\x01"),
    ],
    ids=["end", "segment", "frame", "scan", "no height"],
)
def test_impossible_headers_are_corrupt(data: bytes) -> None:
    assert reason_of(data) == "corrupt"


def test_size_is_refused_from_the_header() -> None:
    data = bytearray(PLAIN)
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    assert reason_of(bytes(data)) == "too_large"


def test_a_bomb_of_scans_is_refused() -> None:
    assert reason_of(PROGRESSIVE + b"\xff\xda" * 600) == "too_large"
    assert decode_image(PLAIN + b"\xff\xda" * 600).width == 200


# Faults


def test_what_follows_the_end_does_not_matter() -> None:
    for tail in (b"\0" * 3, b"trailing bytes", PLAIN, b"\xff\xd9"):
        np.testing.assert_array_equal(decode_image(PLAIN + tail).pixels, by_pillow(PLAIN))


@pytest.mark.parametrize("junk", [b"abcdef", b"\0\0\0"])
def test_bytes_too_many_before_the_end_do_not_matter(junk: bytes) -> None:
    np.testing.assert_array_equal(
        decode_image(PLAIN[:-2] + junk + b"\xff\xd9").pixels, by_pillow(PLAIN)
    )


def test_pillows_verdict_is_turned_upright_once() -> None:
    data = make.oriented(make.picture(200, 400), "JPEG", 6, quality=90, dpi=(72, 72))
    exif_only = data[:2] + data[20:]  # Without JFIF Pillow reads EXIF as soon as it opens the file.
    for whole in (data, exif_only):
        image = decode_image(whole[:-2] + b"abc\xff\xd9")
        np.testing.assert_array_equal(image.pixels, decode_image(whole).pixels)
        assert (image.width, image.height) == (200, 400)


def test_only_the_end_marker_is_missing() -> None:
    np.testing.assert_array_equal(decode_image(PLAIN[:-2]).pixels, by_pillow(PLAIN))
    # Of a progressive one nobody knows whether more scans were to come.
    assert reason_of(PROGRESSIVE[:-2]) == "truncated"


@pytest.mark.parametrize("whole", [PLAIN, PROGRESSIVE, make.encode(PICTURE.convert("CMYK"), "JPEG")])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("tail", [b"", b"\xff\xd9"])
def test_cut_streams_are_refused_or_accepted(whole: bytes, share: float, tail: bytes) -> None:
    data = whole[: int(len(whole) * share)] + tail
    if whole is PROGRESSIVE and tail:
        # It ends with a scan that has no end, which libjpeg fills in.
        assert decode_image(data, ACCEPT).pixels.shape == (120, 200, 3)
        return
    assert reason_of(data) == "truncated"
    image = decode_image(data, ACCEPT)
    assert image.pixels.shape == (120, 200, 3)
    if whole is PLAIN and share > 0.5:
        np.testing.assert_array_equal(image.pixels[:20], by_pillow(whole)[:20])


def test_damaged_streams_are_corrupt_or_accepted() -> None:
    """A restart marker of the wrong number is what libjpeg cannot take for anything else."""
    data = make.encode(PICTURE, "JPEG", quality=90, restart_marker_rows=1)
    damaged = data.replace(b"\xff\xd2", b"\xff\xd6")
    assert damaged != data
    assert reason_of(damaged) == "corrupt"
    assert decode_image(damaged, ACCEPT).pixels.shape == (120, 200, 3)


def test_accepting_needs_no_switch_of_the_process() -> None:
    from PIL import ImageFile

    png = make.encode(make.picture(), "PNG")
    decode_image(png[: len(png) // 2], ACCEPT)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
def test_cut_images_of_pillow_are_accepted(format: str) -> None:
    pixels = make.picture(64, 64)
    data = make.encode(pixels, format, **({"interlace": 0} if format == "GIF" else {}))
    half = data[: len(data) * 6 // 10]
    assert reason_of(half) == "truncated"
    wanted = decode_image(data).pixels
    got = decode_image(half, ACCEPT).pixels
    assert got.shape == wanted.shape
    rows = slice(-10, None) if format == "BMP" else slice(None, 10)  # BMP begins at the bottom.
    np.testing.assert_array_equal(got[rows], wanted[rows])
    assert (got != wanted).any()


@pytest.mark.parametrize("policy", [DEFAULT, ACCEPT])
@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "JPEG"])
def test_every_cut_gives_pixels_or_a_reason(name: str, policy: DecodePolicy) -> None:
    data = make.encode(make.picture(24, 32), name)
    for end in range(1, len(data), max(1, len(data) // 150)):
        try:
            image = decode_image(data[:end], policy)
        except ImageError as error:
            assert error.reason in {"truncated", "corrupt", "unsupported_format"}
        else:
            assert image.pixels.shape == (24, 32, 3)


# Reduced size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_pixels_are_upright_and_cover_what_is_needed(orientation: int) -> None:
    data = make.oriented(make.picture(200, 400), "JPEG", orientation, quality=90)
    seen: list[tuple[int, int]] = []

    def needed(width: int, height: int) -> tuple[int, int]:
        seen.append((width, height))
        return (width * 3 // 16 - 1, height // 4)

    upright = (200, 400) if orientation >= 5 else (400, 200)
    image = decode_image(data, needed=needed)
    assert seen == [upright]
    assert (image.width, image.height) == upright
    assert image.pixels.shape == (upright[1] // 4, upright[0] // 4, 3)
    whole = decode_image(data).pixels
    small = np.asarray(
        Image.fromarray(whole).resize((upright[0] // 4, upright[1] // 4), Image.Resampling.BOX)
    )
    assert np.abs(small.astype(int) - image.pixels).mean() < 3


@pytest.mark.parametrize(
    ("needed", "size"),
    [
        ((200, 120), (200, 120)),
        ((176, 1), (200, 120)),
        ((175, 1), (175, 105)),
        ((1, 15), (25, 15)),
        ((26, 15), (50, 30)),
        ((0, 0), (25, 15)),
    ],
)
def test_the_smallest_sufficient_size_is_taken(needed, size) -> None:
    image = decode_image(PLAIN, needed=lambda width, height: needed)
    assert image.pixels.shape == (size[1], size[0], 3)
    assert (image.width, image.height) == (200, 120)
    whole = decode_image(PLAIN, DecodePolicy(scaled=False), lambda width, height: needed)
    assert whole.pixels.shape == (120, 200, 3)


def test_damage_beyond_libjpegs_doubt_keeps_the_reduced_size() -> None:
    """Pillow, asked about extraneous bytes, reduces as well, to its own sizes."""
    image = decode_image(PLAIN[:-2] + b"abc\xff\xd9", needed=lambda width, height: (50, 30))
    assert image.pixels.shape == (30, 50, 3)


# Embeddings


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return load_originals()


class Lite0:
    """Unit vectors of images as they come."""

    def __init__(self) -> None:
        self._encoder = load_encoder(EncoderSpec("efficientnet_lite0"), batch_size=8)

    def vectors(self, prepared: list[np.ndarray]) -> np.ndarray:
        parts = [prepared[start : start + 8] for start in range(0, len(prepared), 8)]
        raw = np.concatenate([self._encoder.encode(np.stack(part)) for part in parts])
        raw = raw.astype(np.float64)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    return Lite0()


def prepared(data: bytes) -> np.ndarray:
    image = decode_image(data, DEFAULT, LITE0_INPUT.needed_size)
    return LITE0_INPUT.apply(image.pixels, (image.width, image.height))


def test_all_orientations_embed_alike(lite0: Lite0, originals: list[Image.Image]) -> None:
    # Sides that are whole blocks of 8 however the picture is turned, so that each file holds the
    # same coefficients; a photograph, for a made picture has little that could be turned wrong.
    upright = originals[0].resize((800, 592), Image.Resampling.BICUBIC)
    files = []
    for orientation in range(1, 9):
        method = make.STORED_AS.get(orientation)
        stored = upright if method is None else upright.transpose(method)
        exif = Image.Exif()
        exif[make.ORIENTATION_TAG] = orientation
        files.append(make.encode(stored, "JPEG", quality=92, exif=exif))
    vectors = lite0.vectors([prepared(data) for data in files])
    cosines = vectors @ vectors[0]
    assert cosines.min() >= 0.999, cosines
    # And a picture that is not turned is another one.
    wrong = [prepared(make.encode(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=92))]
    assert float(lite0.vectors(wrong)[0] @ vectors[0]) < 0.97


def test_scaled_decoding_embeds_as_a_full_decode(lite0: Lite0, originals: list[Image.Image]) -> None:
    photographs = [make_photograph(number * 5, originals) for number in range(24)]
    scaled = lite0.vectors([prepared(data) for data in photographs])
    full = []
    for data in photographs:
        pixels = decode_image(data).pixels
        full.append(LITE0_INPUT.apply(pixels))
        np.testing.assert_array_equal(pixels, by_pillow(data))
    cosines = (scaled * lite0.vectors(full)).sum(axis=1)
    assert cosines.mean() >= 0.985, cosines
    assert cosines.min() >= 0.95, cosines
    assert cosines.max() < 1.0  # It was scaled.


def test_sample_files() -> None:
    image = decode_image((HARD / "exif_rotated.jpg").read_bytes(), needed=LITE0_INPUT.needed_size)
    with Image.open(HARD / "exif_rotated.jpg") as stored:
        assert stored.getexif()[make.ORIENTATION_TAG] in (5, 6, 7, 8)
        assert (image.width, image.height) == stored.size[::-1]
    assert reason_of((HARD / "truncated.jpg").read_bytes()) == "truncated"


def test_damaged_files_print_nothing() -> None:
    """Libjpeg and littlecms write to standard error unless they are told not to."""
    program = (
        "import sys; from transforms.decoding import *\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "for policy in (DecodePolicy(), DecodePolicy(truncated='accept')):\n"
        "    for cut in (40, len(data) // 2, len(data)):\n"
        "        try: decode_image(data[:cut], policy)\n"
        "        except Exception: pass\n"
    )
    path = os.fspath(HARD / "truncated.jpg")
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
