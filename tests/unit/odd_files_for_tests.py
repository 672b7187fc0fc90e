"""Writers of image files that Pillow reads but does not write, from the samples they hold."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.uint8] | NDArray[np.uint16]

# Where the pixels of each pass of an interlaced PNG begin, and their steps: (x, y, step x, step y).
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip


def packed_rows(samples: NDArray[Any], bits: int, order: str = ">") -> list[bytes]:
    """The rows of [h, w, s], each padded to whole bytes."""
    if bits % 8 == 0:
        turned = samples.astype(samples.dtype.newbyteorder(order))
        return [row.tobytes() for row in turned]
    shifts = np.arange(bits - 1, -1, -1)
    flat = samples.reshape(len(samples), -1)
    return [np.packbits((row[:, None] >> shifts & 1).ravel()).tobytes() for row in flat]


def png(
    samples: Samples,
    depth: int,
    colour: int,
    *,
    transparent: bytes | None = None,
    palette: bytes | None = None,
    interlaced: bool = False,
) -> bytes:
    """A PNG of [h, w, s] samples of `depth` bits, with the tRNS and PLTE chunks given."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b"".join(
        b"\0" + row
        for x, y, step_x, step_y in passes
        for row in packed_rows(samples[y::step_y, x::step_x], depth)
        if samples[y::step_y, x::step_x].size
    )
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparent)]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
        if body is not None
    )


@dataclass(frozen=True)
class TiffLayout:
    """How a TIFF of given samples is written."""

    photometric: int = 2
    bits: int | None = None
    planar: bool = False
    tile: tuple[int, int] | None = None
    rows_per_strip: int | None = None
    sample_format: int | None = None
    extra: int | None = None
    palette: Sequence[int] | None = None
    order: str = "<"
    deflated: bool = False
    orientation: int | None = None


def tiff(samples: NDArray[Any], layout: TiffLayout) -> bytes:
    """A TIFF of one page of [h, w, s] samples."""
    height, width, count = samples.shape
    bits = layout.bits or samples.dtype.itemsize * 8
    planes = np.split(samples, count, axis=2) if layout.planar else [samples]
    blocks = [
        b"".join(packed_rows(block, bits, layout.order)) for p in planes for block in _blocks(p, layout)
    ]
    if layout.deflated:
        blocks = [zlib.compress(block) for block in blocks]
    starts = np.cumsum([8, *(len(block) for block in blocks)]).tolist()
    offsets_tag, counts_tag = (324, 325) if layout.tile else (273, 279)
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * count),
        259: ("H", [8 if layout.deflated else 1]),
        262: ("H", [layout.photometric]),
        offsets_tag: ("I", starts[:-1]),
        277: ("H", [count]),
        counts_tag: ("I", [len(block) for block in blocks]),
        284: ("H", [2 if layout.planar else 1]),
    }
    if layout.tile:
        entries |= {322: ("H", [layout.tile[1]]), 323: ("H", [layout.tile[0]])}
    else:
        entries[278] = ("I", [layout.rows_per_strip or height])
    for tag, values in (
        (274, layout.orientation and [layout.orientation]),
        (320, layout.palette),
        (338, None if layout.extra is None else [layout.extra]),
        (339, layout.sample_format and [layout.sample_format] * count),
    ):
        if values:
            entries[tag] = ("H", values)
    return _tiff_file(b"".join(blocks), entries, layout.order)


def _blocks(plane: NDArray[Any], layout: TiffLayout) -> list[NDArray[Any]]:
    height, width = plane.shape[:2]
    if layout.tile is None:
        rows = layout.rows_per_strip or height
        return [plane[y : y + rows] for y in range(0, height, rows)]
    tall, wide = layout.tile
    padded = np.pad(plane, ((0, -height % tall), (0, -width % wide), (0, 0)))
    return [
        padded[y : y + tall, x : x + wide]
        for y in range(0, height, tall)
        for x in range(0, width, wide)
    ]


def _tiff_file(body: bytes, entries: dict[int, tuple[str, Sequence[int]]], order: str) -> bytes:
    start = 8 + len(body)
    beyond = start + 6 + 12 * len(entries)
    directory, values_beyond = struct.pack(order + "H", len(entries)), b""
    for tag, (code, values) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(value) > 4:
            values_beyond += value
            value = struct.pack(order + "I", beyond + len(values_beyond) - len(value))
        kind = {"H": 3, "I": 4}[code]
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + body + directory + b"\0\0\0\0" + values_beyond


def bmp(
    width: int, height: int, bits: int, pixels: bytes, *, compression: int = 0, palette: bytes = b""
) -> bytes:
    """A BMP of pixel data as given; a negative height means the first row is the top one."""
    start = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    info = (40, width, height, 1, bits, compression, len(pixels), 2835, 2835, len(palette) // 4, 0)
    return head + struct.pack("<IiiHHIIiiII", *info) + palette + pixels


def icon(pictures: Sequence[tuple[int, int, bytes]]) -> bytes:
    """An icon of (width, height, bytes) pictures, sizes as its directory states them."""
    directory, body = struct.pack("<HHH", 0, 1, len(pictures)), b""
    for width, height, data in pictures:
        offset = 6 + 16 * len(pictures) + len(body)
        directory += struct.pack("<BBBBHHII", width, height, 0, 0, 1, 24, len(data), offset)
        body += data
    return directory + body
