"""Makers of the test images: one small picture in every format, and in every odd pixel type."""

import io
import struct
import zlib

import numpy as np
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
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


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
        "dicom": dicom(grey[None].astype(np.uint16) * 16, bits_stored=12),
    }
