"""Formats and their varieties, against arrays computed without the decoder."""

import io
import struct
from dataclasses import replace

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from index_builder.errors import ImageError
from tests.unit import images_for_tests as make
from tests.unit import odd_files_for_tests as odd
from tests.unit.odd_files_for_tests import TiffLayout
from transforms.decoding import DecodePolicy, decode_image
from transforms.image_formats import sniff_format

PICTURE = make.picture()
GREY = PICTURE[..., :1]
DEEP = PICTURE.astype(np.uint16) * 256 + 77
WHITE = 255


def shown(data: bytes) -> NDArray[np.uint8]:
    return decode_image(data).pixels


def on_white(colours: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shares = alpha.astype(float)[..., None] / 255
    return np.rint(colours * shares + 255 * (1 - shares)).astype(np.uint8)


def assert_shows(data: bytes, wanted: NDArray[np.uint8], most: int = 0) -> None:
    pixels = shown(data)
    wanted = np.broadcast_to(wanted, (*wanted.shape[:2], 3))
    assert pixels.shape == wanted.shape
    assert int(np.abs(pixels.astype(int) - wanted).max()) <= most


def assert_near(data: bytes, wanted: NDArray[np.uint8], most: float) -> None:
    pixels = shown(data)
    assert pixels.shape == wanted.shape
    assert float(np.abs(pixels.astype(int) - wanted).mean()) <= most


def refused(data: bytes, max_pixels: int = 1 << 24) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, DecodePolicy(max_pixels=max_pixels))
    return caught.value


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "avif"),
        (b"\0\0\0\x1cftypavis\0\0\0\0avismsf1miaf", "avif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "avif"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x18ftypheix\0\0\0\0mif1heix", "heic"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc", "heic"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0heic", "heic"),
        (b"\0\0\0\x14ftypmsf1\0\0\0\0iso8", "heic"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2", None),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  avif"[:20], None),
        (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ", "jpeg2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "jpeg2000"),
        (b"\0\0\1\0\0\0", None),
        (b"\0\0\1\0", None),
        (b"\0\0\1\xba\x44\0\4\0\4\1", None),
    ],
)
def test_first_bytes_name_the_format(start: bytes, wanted: str | None) -> None:
    assert sniff_format(start) == wanted


# --- PNG


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_png_grey(depth: int, interlaced: bool, transparent: bool) -> None:
    samples = DEEP[..., :1] if depth == 16 else GREY >> (8 - depth)
    wanted = (samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))).astype(np.uint8)
    value = int(samples[20, 30, 0])
    if transparent:
        wanted = np.where(samples == value, WHITE, wanted)
    trns = struct.pack(">H", value) if transparent else None
    assert_shows(odd.png(samples, depth, 0, transparent=trns, interlaced=interlaced), wanted)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_palette_with_transparency(depth: int, interlaced: bool) -> None:
    rng = np.random.default_rng(depth)
    samples = GREY >> (8 - depth)
    palette = rng.integers(0, 256, (2**depth, 3)).astype(np.uint8)
    alpha = rng.integers(0, 256, 2**depth).astype(np.uint8)
    index = samples[..., 0]
    options = {"palette": palette.tobytes(), "interlaced": interlaced}
    assert_shows(odd.png(samples, depth, 3, **options), palette[index])
    half = odd.png(samples, depth, 3, transparent=alpha.tobytes(), **options)
    assert_shows(half, on_white(palette[index], alpha[index]), most=1)
    # A table of transparency may be shorter than the palette, and hold a single hole.
    hole = odd.png(samples, depth, 3, transparent=b"\0", **options)
    assert_shows(hole, np.where(samples == 0, WHITE, palette[index]))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [8, 16])
def test_png_colour_and_alpha(depth: int, interlaced: bool) -> None:
    colour = PICTURE if depth == 8 else DEEP
    alpha = np.flip(colour[..., :1], axis=1)
    high = on_white(PICTURE, np.flip(PICTURE[..., 0], axis=1))
    grey_high = on_white(np.repeat(GREY, 3, axis=2), np.flip(PICTURE[..., 0], axis=1))
    assert_shows(odd.png(colour, depth, 2, interlaced=interlaced), PICTURE)
    with_alpha = np.concatenate([colour, alpha], axis=2)
    assert_shows(odd.png(with_alpha, depth, 6, interlaced=interlaced), high, most=1)
    grey = np.concatenate([colour[..., :1], alpha], axis=2)
    assert_shows(odd.png(grey, depth, 4, interlaced=interlaced), grey_high, most=1)
    value = colour[0, 0]
    hole = odd.png(colour, depth, 2, transparent=value.astype(">u2").tobytes(), interlaced=interlaced)
    assert_shows(hole, np.where((colour == value).all(axis=2, keepdims=True), WHITE, PICTURE))


def test_apng_shows_its_default_image() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    for default in (False, True):
        data = make.encode(frames[0], "PNG", default_image=default, **options)
        assert_shows(data, np.full((10, 20, 3), (255, 0, 0), np.uint8))


# --- GIF and WebP


@pytest.mark.parametrize("transparent", [False, True])
def test_gif_frame_smaller_than_its_canvas(transparent: bool) -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.paste(2, (0, 0, 8, 3))
    options = {"transparency": 2} if transparent else {}
    data = bytearray(make.encode(image, "GIF", optimize=False, **options))
    data[6:10] = struct.pack("<HH", 20, 12)
    descriptor = data.index(b"," + struct.pack("<HHHH", 0, 0, 8, 6))
    data[descriptor + 1 : descriptor + 5] = struct.pack("<HH", 5, 4)
    wanted = np.full((12, 20, 3), WHITE, np.uint8)
    wanted[4:7, 5:13] = WHITE if transparent else (70, 80, 90)
    wanted[7:10, 5:13] = (40, 50, 60)
    assert_shows(bytes(data), wanted)


def test_gif_canvas_counts_not_its_frame() -> None:
    data = bytearray(make.encode(Image.new("P", (2, 2)), "GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    assert refused(bytes(data)).reason == "too_large"


def test_webp_kinds() -> None:
    assert_near(make.encode(PICTURE, "WEBP", quality=95), PICTURE, 4.0)
    rgba = np.dstack([PICTURE, np.flip(PICTURE[..., 0], axis=1)])
    wanted = on_white(PICTURE, rgba[..., 3])
    still = make.encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    assert_shows(still, wanted, most=1)
    moving = make.encode(
        Image.fromarray(rgba), "WEBP", lossless=True, exact=True, save_all=True,
        append_images=[Image.new("RGBA", (60, 40), "red")],
    )  # fmt: skip
    assert_shows(moving, wanted, most=1)


def test_webp_animation_counts_its_canvas() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    data = bytearray(make.encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = b"\xff\x3f\0" * 2
    assert refused(bytes(data)).reason == "too_large"


# --- TIFF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "layout",
    [
        TiffLayout(),
        TiffLayout(rows_per_strip=7),
        TiffLayout(tile=(16, 32)),
        TiffLayout(planar=True),
        TiffLayout(planar=True, rows_per_strip=9, deflated=True),
        TiffLayout(planar=True, tile=(16, 16)),
    ],
)
def test_tiff_layouts(layout: TiffLayout, order: str) -> None:
    layout = replace(layout, order=order)
    assert_shows(odd.tiff(PICTURE, layout), PICTURE)
    assert_shows(odd.tiff(PICTURE.astype(np.uint16) * 257, layout), PICTURE)
    ink = np.dstack([255 - PICTURE, np.zeros_like(GREY)])
    assert_shows(odd.tiff(ink, replace(layout, photometric=5)), PICTURE)
    assert_shows(odd.tiff(GREY, replace(layout, photometric=1)), GREY)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_grey_and_palette(bits: int) -> None:
    samples = GREY >> (8 - bits)
    spread = samples * (255 // (2**bits - 1))
    assert_shows(odd.tiff(samples, TiffLayout(1, bits=bits)), spread)
    assert_shows(odd.tiff(samples, TiffLayout(0, bits=bits)), 255 - spread)
    palette = np.random.default_rng(bits).integers(0, 256, (3, 2**bits)).astype(np.uint8)
    stated = (palette.astype(int) * 257).ravel().tolist()
    data = odd.tiff(samples, TiffLayout(3, bits=bits, palette=stated))
    assert_shows(data, palette.T[samples[..., 0]])


def test_tiff_deep_grey() -> None:
    assert_shows(odd.tiff(DEEP[..., :1], TiffLayout(1)), GREY)
    assert_shows(odd.tiff(DEEP[..., :1], TiffLayout(0)), 255 - GREY, most=1)
    deep_ink = np.dstack([65535 - DEEP, np.zeros_like(DEEP[..., :1])])
    assert_shows(odd.tiff(deep_ink, TiffLayout(5)), PICTURE, most=1)
    rows = (DEEP[..., :1] >> 4).astype(np.uint16)
    assert_shows(odd.tiff(rows, TiffLayout(1, bits=12)), GREY)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_tiff_alpha(orientation: int) -> None:
    alpha = np.flip(PICTURE[..., 0], axis=1)
    colour, grey = np.dstack([PICTURE, alpha]), np.dstack([GREY, alpha])
    turned = {1: 0, 3: 2, 6: -1}[orientation]
    straight = TiffLayout(extra=2, orientation=orientation)
    wanted = np.rot90(on_white(PICTURE, alpha), turned)
    assert_shows(odd.tiff(colour, straight), wanted, most=1)
    assert_shows(odd.tiff(colour, replace(straight, extra=None)), wanted, most=1)
    assert_shows(odd.tiff(colour, replace(straight, extra=0)), np.rot90(PICTURE, turned))
    wanted_grey = np.rot90(on_white(np.repeat(GREY, 3, axis=2), alpha), turned)
    assert_shows(odd.tiff(grey, replace(straight, photometric=1)), wanted_grey, most=1)
    multiplied = np.rint(PICTURE * (alpha[..., None] / 255)).astype(np.uint8)
    associated = odd.tiff(np.dstack([multiplied, alpha]), replace(straight, extra=1))
    assert_shows(associated, wanted, most=1)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_compressions(compression: str) -> None:
    data = make.encode(PICTURE, "TIFF", compression=compression)
    assert_near(data, PICTURE, 6.0 if compression == "jpeg" else 0.0)


@pytest.mark.parametrize(
    ("layout", "channels"),
    [
        (TiffLayout(0, bits=1), 1), (TiffLayout(1, bits=4), 1),
        (TiffLayout(2, tile=(16, 32)), 3), (TiffLayout(2, planar=True), 3), (TiffLayout(2, extra=2), 4),
        (TiffLayout(5), 4), (TiffLayout(6), 3), (TiffLayout(8), 3), (TiffLayout(1, orientation=6), 1),
    ],
)  # fmt: skip
def test_sound_tiffs_are_the_same_compressed(layout: TiffLayout, channels: int) -> None:
    samples = np.dstack([PICTURE, GREY])[..., :channels] >> (8 - (layout.bits or 8))
    plain = decode_image(odd.tiff(samples, layout)).pixels
    assert plain.std() > 10
    np.testing.assert_array_equal(
        decode_image(odd.tiff(samples, replace(layout, deflated=True))).pixels, plain
    )


def test_tiff_planes_that_nothing_shows_right_are_refused() -> None:
    grey = np.dstack([GREY, GREY])
    ink = np.dstack([DEEP, DEEP[..., :1]])
    for samples, layout in ((grey, TiffLayout(1, extra=2)), (ink, TiffLayout(5))):
        assert decode_image(odd.tiff(samples, layout)).format == "tiff"
        error = refused(odd.tiff(samples, replace(layout, planar=True)))
        assert error.reason == "unsupported_format"
        assert "planes" in error.message
    wanted = decode_image(odd.tiff(ink, TiffLayout(5))).pixels
    assert_shows(odd.tiff(ink, TiffLayout(5, planar=True, deflated=True)), wanted)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_tiff_of_damaged_data_is_refused(compression: str) -> None:
    data = bytearray(make.encode(PICTURE, "TIFF", compression=compression))
    (start,) = Image.open(io.BytesIO(data)).tag_v2[273]
    data[start + 40 : start + 60] = b"\xff" * 20
    error = refused(bytes(data))
    assert error.reason == "corrupt"
    assert "tiff" in error.message


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_fax(compression: str, white_is_zero: bool) -> None:
    bits = GREY[..., 0] > 120
    options = {"tiffinfo": {262: 0}} if white_is_zero else {}
    data = make.encode(Image.fromarray(bits), "TIFF", compression=compression, **options)
    assert_shows(data, (bits * 255).astype(np.uint8)[..., None])


@pytest.mark.parametrize(
    ("samples", "layout"),
    [
        (GREY.astype(np.float32), TiffLayout(1, sample_format=3)),
        (GREY.astype(np.float16), TiffLayout(1, sample_format=3)),
        (GREY.astype(np.int16), TiffLayout(1, sample_format=2)),
        (GREY.astype(np.uint32), TiffLayout(1)),
        (PICTURE >> 4, TiffLayout(2, bits=4)),
    ],
)
def test_tiff_samples_without_a_range_are_refused(
    samples: NDArray[np.uint8], layout: TiffLayout
) -> None:
    error = refused(odd.tiff(samples, layout))
    assert error.reason == "unsupported_format"
    assert "tiff" in error.message


# --- BMP


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("top_down", [False, True])
def test_bmp_palettes(bits: int, top_down: bool) -> None:
    samples = GREY >> (8 - bits)
    palette = np.random.default_rng(bits).integers(0, 256, (2**bits, 3)).astype(np.uint8)
    stated = b"".join(bytes(entry[::-1]) + b"\0" for entry in palette)
    rows = [row + bytes(-len(row) % 4) for row in odd.packed_rows(samples, bits)]
    pixels = b"".join(rows if top_down else rows[::-1])
    data = odd.bmp(60, -40 if top_down else 40, bits, pixels, palette=stated)
    assert_shows(data, palette[samples[..., 0]])


def test_bmp_direct_colours() -> None:
    flipped = PICTURE[::-1]
    assert_shows(odd.bmp(60, 40, 24, flipped[..., ::-1].tobytes()), PICTURE)
    unused = np.zeros_like(GREY)
    assert_shows(odd.bmp(60, 40, 32, np.dstack([flipped[..., ::-1], unused]).tobytes()), PICTURE)
    five = (flipped >> 3).astype(np.uint16)
    words = five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]
    wanted = np.rint((PICTURE >> 3) * (255 / 31)).astype(np.uint8)
    assert_shows(odd.bmp(60, 40, 16, words.astype("<u2").tobytes()), wanted, most=1)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    words = five[..., 0] << 11 | (flipped[..., 1] >> 2).astype(np.uint16) << 5 | five[..., 2]
    data = odd.bmp(60, 40, 16, words.astype("<u2").tobytes(), compression=3, palette=masks)
    wanted[..., 1] = np.rint((PICTURE[..., 1] >> 2) * (255 / 63))
    assert_shows(data, wanted, most=1)


@pytest.mark.parametrize(("bits", "compression"), [(8, 1), (4, 2)])
def test_bmp_run_lengths(bits: int, compression: int) -> None:
    palette = bytes((0, 0, 0, 0, 30, 20, 10, 0, 60, 50, 40, 0)) + bytes(4 * (2**bits - 3))
    values = (1, 2) if bits == 8 else (0x11, 0x22)
    line = bytes((4, values[0], 2, values[1], 0, 0))
    data = odd.bmp(6, 2, bits, line + line + b"\0\1", compression=compression, palette=palette)
    wanted = np.zeros((2, 6, 3), np.uint8)
    wanted[:, :4], wanted[:, 4:] = (10, 20, 30), (40, 50, 60)
    assert_shows(data, wanted)


def test_bmp_of_an_unread_compression() -> None:
    error = refused(odd.bmp(6, 2, 24, bytes(99), compression=9))
    assert error.reason == "unsupported_format"


# --- ICO


def bitmap_entry(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bytes:
    """A 24-bit picture of an icon: a bitmap header of twice the height, colours, then the mask."""
    height, width = pixels.shape[:2]
    rows = [row + bytes(-len(row) % 4) for row in odd.packed_rows(pixels[::-1, :, ::-1], 8)]
    masks = [row + bytes(-len(row) % 4) for row in odd.packed_rows(mask[::-1, :, None], 1)]
    info = struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 24, 0, 0, 0, 0, 0, 0)
    return info + b"".join(rows + masks)


def test_icon_shows_its_largest_picture() -> None:
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    large = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    hidden = rng.integers(0, 2, (24, 32)).astype(bool)
    wanted = np.where(hidden[..., None], WHITE, large)
    for order in (1, -1):
        entries = [(8, 8, make.encode(small, "PNG")), (32, 24, bitmap_entry(large, hidden))]
        assert_shows(odd.icon(entries[::order]), wanted)
    # A directory has one byte for a size, and zero for 256: the picture's own header counts.
    entries = [(0, 0, make.encode(PICTURE, "PNG")), (32, 24, bitmap_entry(large, hidden))]
    assert_shows(odd.icon(entries), PICTURE)


def test_icon_counts_the_size_of_the_picture_inside() -> None:
    bomb = odd.icon([(16, 16, make.png_header_only(60_000, 60_000))])
    assert refused(bomb).reason == "too_large"
    bitmap = bytearray(bitmap_entry(PICTURE, np.zeros((40, 60), bool)))
    bitmap[4:12] = struct.pack("<ii", 50_000, 100_000)
    assert refused(odd.icon([(16, 16, bytes(bitmap))])).reason == "too_large"


def test_icon_cut_short() -> None:
    whole = odd.icon([(60, 40, make.encode(PICTURE, "PNG"))])
    assert refused(whole[:-300]).reason == "truncated"
    assert refused(whole[:24]).reason in {"truncated", "corrupt"}


# --- JPEG 2000, AVIF, HEIC, MPO


@pytest.mark.parametrize("raw", [False, True])
def test_jpeg2000_kinds(raw: bool) -> None:
    assert_shows(make.encode(PICTURE, "JPEG2000", no_jp2=raw), PICTURE)
    assert_shows(make.encode(GREY[..., 0], "JPEG2000", no_jp2=raw), GREY)
    deep = Image.fromarray(np.ascontiguousarray(DEEP[..., 0]))
    assert_shows(make.encode(deep, "JPEG2000", no_jp2=raw), GREY)
    if not raw:
        rgba = np.dstack([PICTURE, np.flip(PICTURE[..., 0], axis=1)])
        wanted = on_white(PICTURE, rgba[..., 3])
        assert_shows(make.encode(Image.fromarray(rgba), "JPEG2000"), wanted, most=1)


def test_avif_kinds() -> None:
    rgba = np.dstack([PICTURE, np.flip(PICTURE[..., 0], axis=1)])
    assert_near(make.encode(PICTURE, "AVIF", quality=95), PICTURE, 4.0)
    assert_near(
        make.encode(Image.fromarray(rgba), "AVIF", quality=95), on_white(PICTURE, rgba[..., 3]), 4.0
    )
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "green")]
    sequence = make.encode(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=95)
    assert decode_image(sequence).format == "avif"
    assert_near(sequence, np.full((16, 32, 3), (255, 0, 0), np.uint8), 3.0)


def test_heic_kinds() -> None:
    rgba = np.dstack([PICTURE, np.flip(PICTURE[..., 0], axis=1)])
    wanted = on_white(PICTURE, rgba[..., 3])
    assert_near(make.heic(PICTURE), PICTURE, 4.0)
    assert_near(make.heic(Image.fromarray(rgba)), wanted, 4.0)
    ten_bits = pillow_heif.from_bytes("RGB;16", (60, 40), (PICTURE.astype(np.uint16) * 257).tobytes())
    buffer = io.BytesIO()
    ten_bits.save(buffer, quality=95)
    assert pillow_heif.open_heif(buffer, convert_hdr_to_8bit=False).info["bit_depth"] == 10
    assert_near(buffer.getvalue(), PICTURE, 4.0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["avif", "heic"])
def test_rotation_stated_twice_is_applied_once(format: str, orientation: int) -> None:
    """Phones write the rotation into the container and into EXIF; only the first counts."""
    exif = Image.Exif()
    exif[make.ORIENTATION_TAG] = orientation
    reference = shown(make.oriented(PICTURE, "PNG", orientation))
    if format == "avif":
        data = make.encode(PICTURE, "AVIF", exif=exif, quality=95)
    else:
        file, buffer = pillow_heif.from_bytes("RGB", (60, 40), PICTURE.tobytes()), io.BytesIO()
        file.save(buffer, quality=95, exif=exif.tobytes())
        data = buffer.getvalue()
        assert orientation == 1 or b"irot" in data or b"imir" in data
    assert_near(data, reference, 4.0)


def test_mpo_is_its_first_jpeg() -> None:
    second = Image.fromarray(255 - PICTURE)
    data = make.encode(PICTURE, "MPO", save_all=True, append_images=[second], quality=95)
    assert decode_image(data).format == "jpeg"
    assert_near(data, PICTURE, 3.0)


def test_opening_registers_no_plugin_with_pillow() -> None:
    decode_image(make.heic(PICTURE))
    assert "HEIF" not in Image.OPEN


@pytest.mark.parametrize("name", ["jpeg2000", "avif", "heic", "ico"])
def test_cut_and_emptied_files_are_failures(name: str) -> None:
    whole = make.one_of_each()[name]
    for data in (whole[: len(whole) // 2], whole[:40], whole[:64] + bytes(len(whole) - 64)):
        assert refused(data).reason in {"truncated", "corrupt", "unsupported_format"}
