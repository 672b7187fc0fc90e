"""Fuzzing: whatever becomes of real files, decoding gives pixels within the policy or a reason.

`KITH_FUZZ_EXAMPLES=100000 python -m pytest tests/unit/test_decode_fuzz.py` goes on for longer, with
other examples each time.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from index_builder.errors import ImageError
from tests.unit import images_for_tests as make
from transforms.decoding import DecodePolicy, decode_image
from transforms.preprocessing import Preprocessing

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("KITH_FUZZ_EXAMPLES", "0"))
MAX_PIXELS = 1 << 18
PREPROCESSING = Preprocessing((32, 48))
# What a fuzzer puts where a header has a number.
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# How much more memory damaged files may take than the same files undamaged.
MAX_GROWTH_BYTES = 64 << 20


def heic(pixels: np.ndarray) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(file, quality=80)
    return file.getvalue()


def seeds() -> dict[str, bytes]:
    """Files by name: the hard ones of the sample, one of each format, and the odd kinds."""
    files = {
        path.name: path.read_bytes()
        for path in sorted((REPOSITORY / "samples" / "hard").iterdir())
        if 0 < path.stat().st_size < 50_000
    }
    files |= make.one_of_each()
    image = Image.fromarray(make.picture(72, 88))
    exif = make.exif_of(6)
    profile = make.rgb_profile()
    files |= {
        "progressive": make.encode(image, "JPEG", progressive=True, exif=exif, icc_profile=profile),
        "restarts": make.encode(image, "JPEG", restart_marker_rows=1, quality=60),
        "grey jpeg": make.encode(image.convert("L"), "JPEG", icc_profile=make.grey_profile(1.8)),
        "cmyk": make.encode(image.convert("CMYK"), "JPEG", icc_profile=make.cmyk_profile()),
        "png with all": make.encode(
            image.convert("RGBA"), "PNG", icc_profile=profile, exif=exif, dpi=(72, 72)
        ),
        "palette": make.encode(image.quantize(16), "PNG", transparency=3),
        "16 bit": make.png_16_bit_rgb(make.picture(9, 11).astype(np.uint16) * 257, (1, 2, 3)),
        "apng": make.encode(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        "gif frames": make.encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "webp lossy": make.encode(image, "WEBP", quality=60, icc_profile=profile, exif=exif),
        "webp frames": make.encode(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "tiff lzw": make.encode(image, "TIFF", compression="tiff_lzw", icc_profile=profile),
        "tiff jpeg": make.encode(image, "TIFF", compression="jpeg"),
        "bmp rle": make.encode(image.quantize(8), "BMP"),
        "jpeg2000": make.encode(image, "JPEG2000"),
        "avif": make.encode(image, "AVIF", quality=60),
        "heic": heic(make.picture(72, 88)),
        "ico": make.encode(image.resize((32, 32)), "ICO"),
    }
    return files


SEEDS = seeds()


def documented_reasons() -> set[str]:
    """The codes of the stage `decode` in docs/images.md."""
    text = (REPOSITORY / "docs" / "images.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \| decode \|", text, re.MULTILINE))


REASONS = documented_reasons()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A seed after up to six changes, most of them near its start, where the headers are."""
    data = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        near = min(len(data), 400)
        place = draw(st.integers(0, near - 1) | st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(("flip", "number", "cut", "splice", "insert", "remove", "repeat")))
        if kind == "flip":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            width = draw(st.sampled_from((1, 2, 4)))
            order = draw(st.sampled_from(("little", "big")))
            value = draw(st.sampled_from(NUMBERS)) & ((1 << 8 * width) - 1)
            data[place : place + width] = value.to_bytes(width, order)
        elif kind == "cut":
            del data[place:]
        elif kind == "splice":
            other = SEEDS[draw(st.sampled_from(sorted(SEEDS)))]
            start = draw(st.integers(0, len(other) - 1))
            length = draw(st.integers(1, 300))
            data[place : place + length] = other[start : start + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "remove":
            del data[place : place + draw(st.integers(1, 64))]
        else:
            length = draw(st.integers(1, 200))
            data[place:place] = data[place : place + length]
    return bytes(data)


policies = st.builds(
    DecodePolicy,
    max_pixels=st.just(MAX_PIXELS),
    truncated=st.sampled_from(("fail", "accept")),
    scaled=st.booleans(),
    dicom_frame=st.sampled_from(("first", "middle")),
)


@settings(
    max_examples=EXAMPLES or 1500,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    # Smaller examples of a failure are for people who look for one.
    phases=tuple(Phase) if EXAMPLES else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(damaged(), policies)
def test_damaged_files_give_pixels_or_a_reason(data: bytes, policy: DecodePolicy) -> None:
    try:
        image = decode_image(data, policy, PREPROCESSING.needed_size)
    except ImageError as error:
        assert error.reason in REASONS
        assert error.message
        return
    height, width, channels = image.pixels.shape
    assert image.pixels.dtype == np.uint8
    assert channels == 3
    assert 1 <= image.width * image.height <= MAX_PIXELS
    needed = PREPROCESSING.needed_size(image.width, image.height)
    assert needed[0] <= width <= image.width
    assert needed[1] <= height <= image.height
    prepared = PREPROCESSING.apply(image.pixels, (image.width, image.height))
    assert prepared.shape == (32, 48, 3)


def test_the_seeds_are_sound_and_the_reasons_documented() -> None:
    assert {"empty", "unsupported_format", "truncated", "corrupt", "too_large"} <= REASONS
    refused = set()
    for name, data in SEEDS.items():
        try:
            decode_image(data)
        except ImageError:
            refused.add(name)
    assert refused == {"not_an_image.jpg", "truncated.jpg"}


def test_large_numbers_in_headers_take_no_memory() -> None:
    """Numbers all over every header, in turns of 16 and 32 bits, in a process that is measured."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.unit import test_decode_fuzz as t; t.enlarge_headers()"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    grown, tried = (int(word) for word in done.stdout.split())
    assert tried > 1500
    assert grown <= MAX_GROWTH_BYTES


def enlarge_headers() -> None:
    """Prints by how many bytes the peak of memory grew, and how many files were tried."""
    import resource

    for data in SEEDS.values():
        _decode_quietly(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = 0
    for data in SEEDS.values():
        for place in range(4, min(len(data), 200), 4):
            number = (b"\xff\xff", b"\x7f\xff\xff\xff")[place // 4 % 2]
            _decode_quietly(data[:place] + number + data[place + len(number) :])
            tried += 1
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) * 1024, tried)


def _decode_quietly(data: bytes) -> None:
    try:
        decode_image(data, DecodePolicy(MAX_PIXELS))
    except ImageError:
        return
