"""Makers of the test images: one small picture in every format, and in every odd pixel type."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image

ORIENTATION_TAG = 0x0112


def picture(height: int = 40, width: int = 60, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth colour picture, uint8 [h, w, 3], that no mirroring or turning maps to itself."""
    rng = np.random.default_rng(seed)
    low, high, phase = rng.uniform(20, 90), rng.uniform(160, 235), rng.uniform(0, 3)
    y, x = np.mgrid[0:height, 0:width]
    red = low + (high - low) * x / width
    green = low + (high - low) * y / height
    blue = 127 + 100 * np.sin(phase + 6 * x / width + 4 * y / height)
    pixels = np.stack([red, green, blue], axis=2)
    pixels[: height // 4, : width // 5] = (250, 30, 30)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(image: Image.Image | NDArray[np.uint8], format: str, **options: object) -> bytes:
    """The bytes that Pillow writes for an image in `format`."""
    buffer = io.BytesIO()
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    source.save(buffer, format, **options)
    return buffer.getvalue()


def heic(image: Image.Image | NDArray[np.uint8], **options: object) -> bytes:
    """The bytes that libheif writes for an image, with the EXIF that the image has."""
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    pillow_heif.from_pillow(source).save(buffer, **{"quality": 95, **options})
    return buffer.getvalue()


def oriented(pixels: NDArray[np.uint8], format: str, orientation: int, **options: object) -> bytes:
    """The picture stored as it is, with an EXIF orientation that says how to turn it."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return encode(pixels, format, exif=exif, **options)


def png_16_bit_rgb(pixels: NDArray[np.uint16], transparent: tuple[int, int, int] | None) -> bytes:
    """A PNG of 16-bit colour, uint16 [h, w, 3], which Pillow cannot write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))]
    if transparent is not None:
        chunks.append((b"tRNS", struct.pack(">HHH", *transparent)))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header_only(width: int, height: int) -> bytes:
    """A PNG whose header states a size and whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    return start + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"


def dicom(
    frames: NDArray[np.uint8] | NDArray[np.uint16],
    photometric: str = "MONOCHROME2",
    bits_stored: int | None = None,
) -> bytes:
    """An uncompressed DICOM file of [frames, h, w] grey or [frames, h, w, 3] RGB samples."""
    bits = frames.dtype.itemsize * 8
    samples = 3 if frames.ndim == 4 else 1
    pixels = _element(0x7FE0, 0x10, "OW", frames.astype(f"<u{bits // 8}").tobytes())
    shape = (len(frames), *frames.shape[1:3], samples)
    return _dicom_file(shape, bits, bits_stored or bits, photometric, "1.2.840.10008.1.2.1", pixels)


def dicom_of_jpeg(jpeg: bytes, shape: tuple[int, ...]) -> bytes:
    """A DICOM file of one 8-bit grey frame, [h, w], compressed as a baseline JPEG."""
    jpeg += b"\0" * (len(jpeg) % 2)
    item = b"\xfe\xff\x00\xe0"
    pixels = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + item + b"\0\0\0\0"
    pixels += item + struct.pack("<I", len(jpeg)) + jpeg + b"\xfe\xff\xdd\xe0\0\0\0\0"
    syntax = "1.2.840.10008.1.2.4.50"
    return _dicom_file((1, *shape, 1), 8, 8, "MONOCHROME2", syntax, pixels)


def _dicom_file(
    shape: tuple[int, ...], bits: int, stored: int, photometric: str, syntax: str, pixels: bytes
) -> bytes:
    """The file around the pixel data of [frames, h, w, samples]."""
    frames, height, width, samples = shape
    syntax_element = _element(2, 0x10, "UI", syntax.encode())
    elements = [
        _element(0x28, 0x02, "US", struct.pack("<H", samples)),
        _element(0x28, 0x04, "CS", photometric.encode()),
        _element(0x28, 0x06, "US", struct.pack("<H", 0)) if samples == 3 else b"",
        _element(0x28, 0x08, "IS", str(frames).encode()),
        _element(0x28, 0x10, "US", struct.pack("<H", height)),
        _element(0x28, 0x11, "US", struct.pack("<H", width)),
        _element(0x28, 0x100, "US", struct.pack("<H", bits)),
        _element(0x28, 0x101, "US", struct.pack("<H", stored)),
        _element(0x28, 0x102, "US", struct.pack("<H", stored - 1)),
        _element(0x28, 0x103, "US", struct.pack("<H", 0)),
    ]
    meta = _element(2, 0, "UL", struct.pack("<I", len(syntax_element))) + syntax_element
    return b"\0" * 128 + b"DICM" + meta + b"".join(elements) + pixels


def _element(group: int, element: int, kind: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if kind in ("UI", "OW") else b" "
    head = struct.pack("<HH", group, element) + kind.encode()
    if kind == "OW":
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def one_of_each() -> dict[str, bytes]:
    """The same picture in every format that Kith decodes, by format name."""
    pixels = picture()
    grey = pixels[..., 0]
    return {
        "jpeg": encode(pixels, "JPEG", quality=95),
        "png": encode(pixels, "PNG"),
        "gif": encode(pixels, "GIF"),
        "bmp": encode(pixels, "BMP"),
        "webp": encode(pixels, "WEBP", lossless=True),
        "tiff": encode(pixels, "TIFF"),
        "jpeg2000": encode(pixels, "JPEG2000"),
        "avif": encode(pixels, "AVIF", quality=95),
        "heic": heic(pixels),
        "ico": encode(pixels, "ICO", sizes=[(60, 40)]),
        "dicom": dicom(grey[None].astype(np.uint16) * 16, bits_stored=12),
    }


# The primaries of wide colour spaces, XYZ each under D50, as their ICC profiles state them.
ADOBE_RGB = (
    (0.60974, 0.31111, 0.01947),
    (0.20528, 0.62567, 0.06087),
    (0.14919, 0.06322, 0.74457),
)
DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)
_D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(primaries: tuple[tuple[float, ...], ...] = ADOBE_RGB, gamma: float = 2.2) -> bytes:
    """An ICC profile of an RGB space: its primaries and one gamma for all channels."""
    tags = {f"{name}XYZ": _xyz(*xyz) for name, xyz in zip("rgb", primaries, strict=True)}
    tags |= {f"{name}TRC": _gamma(gamma) for name in "rgb"}
    return _icc(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of a grey space."""
    return _icc(b"GRAY", b"XYZ ", {"kTRC": _gamma(gamma)}, b"mntr")


def cmyk_profile(paper: tuple[int, int, int] = (255, 128, 128)) -> bytes:
    """An ICC profile of a press, of two steps an ink: no ink is `paper`, in 8-bit Lab."""
    inks = np.stack(np.meshgrid(*[[0.0, 1.0]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    lab = np.tile(np.array(paper, float), (16, 1))
    lab[:, 0] *= np.prod(1 - inks * (0.45, 0.5, 0.15, 0.9), axis=1)
    lab[:, 1] += inks[:, :3] @ (-35, 70, -5) * (1 - inks[:, 3])
    lab[:, 2] += inks[:, :3] @ (-45, -5, 90) * (1 - inks[:, 3])
    straight = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0))
    table += b"".join(_fixed(value) for value in np.eye(3).ravel())
    table += straight * 4 + np.clip(lab, 0, 255).astype(np.uint8).tobytes() + straight * 3
    return _icc(b"CMYK", b"Lab ", {"A2B0": table}, b"prtr")


def _icc(space: bytes, connection: bytes, tags: dict[str, bytes], kind: bytes = b"mntr") -> bytes:
    name = b"made for a test\0"
    tags = {
        "desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78),
        "cprt": b"text" + bytes(4) + b"none\0",
        "wtpt": _xyz(*_D50),
        **tags,
    }
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        table += tag.encode() + struct.pack(">II", offset + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4x4s", offset + len(body), b"\x02\x10\0\0") + kind + space + connection
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += b"".join(_fixed(value) for value in _D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(x) + _fixed(y) + _fixed(z)


def _gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def jpeg_segment(marker: int, body: bytes) -> bytes:
    """One segment of a JPEG with its marker and length."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with more segments right after its start."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif_of(orientation: int, order: str = "<") -> bytes:
    """The body of an APP1 segment: EXIF of an orientation after another tag."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 77)
    entries += struct.pack(order + "HHIHH", ORIENTATION_TAG, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "H", 2) + entries + bytes(4)


# What turns an upright picture into the one that an orientation turns back, as Pillow names it.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
