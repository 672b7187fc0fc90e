"""One frame of a DICOM file as it is displayed: window, inversion and palette by stated rules."""

import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from index_builder.errors import ImageError
from transforms.dicom_frame import JPEG2000_SYNTAXES, cut_frame, single_frame_file
from transforms.dicom_header import DicomHeader, PaletteChannel, Window, read_dicom_header
from transforms.image_formats import open_image
from transforms.pixel_rules import CORRUPT, UNSUPPORTED_FORMAT, Pixels, check_size
from transforms.tfio_decoding import import_tensorflow_io, run_operation

# DCMTK, under tensorflow-io, registers its codecs process-wide.
_dicom_lock = threading.Lock()

_MAX_BITS = 32
_CODESTREAM, _SIZE_MARKER = b"\xff\x4f", b"\xff\x51"
_COMPONENT_DEPTH_OFFSET = 38
_SIGNED_COMPONENT = 0x80


def decode_dicom(data: bytes, max_pixels: int, frame: Literal["first", "middle"] = "first") -> Pixels:
    """Decodes one frame of a DICOM file to uint8 [h, w, 3]; the frames beside it are not decoded.

    Grey goes through the file's rescaling and its first window to 0..255; without a window 8-bit
    grey is kept, and other grey stretched so that the frame's smallest value is black and its
    largest white. MONOCHROME1 is inverted. Colour is scaled by its full range.

    Raises:
        ImageError: `truncated`, `corrupt`, `too_large` or `unsupported_format`. No error text holds
            the value of a tag.
    """
    header = read_dicom_header(data)
    check_size(header.width, header.height, max_pixels)
    if header.frames < 1:
        raise ImageError(CORRUPT, "The dicom image states no frames.")
    if (
        header.samples not in (1, 3)
        or not 1 <= header.bits_stored <= header.bits_allocated <= _MAX_BITS
    ):
        raise ImageError(
            UNSUPPORTED_FORMAT,
            f"The dicom image has {header.samples} samples a pixel of {header.bits_stored} in "
            f"{header.bits_allocated} bits; 1 or 3 of up to {_MAX_BITS} bits are read.",
        )
    pixels = cut_frame(header, header.frames // 2 if frame == "middle" else 0)
    if header.samples == 3:
        return _colour(header, pixels)
    stored = _stored_values(header, pixels)
    if header.photometric == "PALETTE COLOR":
        return _through_palette(header, stored)
    return np.repeat(_shown_grey(header, stored)[..., None], 3, axis=2)


def _colour(header: DicomHeader, pixels: bytes) -> Pixels:
    try:
        return np.ascontiguousarray(_run(header, pixels, "uint8", "auto"))
    except ImageError:
        if header.syntax not in JPEG2000_SYNTAXES:
            raise
    image = _open_jpeg2000(header, pixels)
    if header.photometric.startswith("YBR_FULL"):
        image = Image.merge("YCbCr", image.convert("RGB").split())
    return np.array(image.convert("RGB"))


def _stored_values(header: DicomHeader, pixels: bytes) -> NDArray[Any]:
    """The samples of a grey frame as stored, float [h, w]."""
    kind = "float32" if header.bits_stored <= 16 else "float64"
    try:
        values = _run(header, pixels, kind, "preserve")[..., 0]
        if header.signed:  # tensorflow-io counts from the least value that the bits can state.
            values = values - 2.0 ** (header.bits_stored - 1)
    except ImageError:
        if header.syntax not in JPEG2000_SYNTAXES:
            raise
        values = _jpeg2000_values(_open_jpeg2000(header, pixels), pixels)
    return values


def _run(header: DicomHeader, pixels: bytes, dtype: str, scale: str) -> NDArray[Any]:
    """What tensorflow-io makes of the frame, [h, w, samples]."""
    with _dicom_lock:
        frames = run_operation(
            "dicom",
            import_tensorflow_io().image.decode_dicom_image,
            single_frame_file(header, pixels),
            color_dim=True, on_error="lossy", scale=scale, dtype=np.dtype(dtype),
        )  # fmt: skip
    if frames.shape != (1, header.height, header.width, header.samples):
        raise ImageError(
            CORRUPT,
            "The dicom image cannot be decoded: tensorflow-io found no picture in it, or one in a "
            "compression that it does not read.",
        )
    frame: NDArray[Any] = frames[0]
    return frame


def _open_jpeg2000(header: DicomHeader, stream: bytes) -> Image.Image:
    """The JPEG 2000 image in a frame, by Pillow; its errors go to the caller."""
    image = open_image("jpeg2000", stream)
    if image.size != (header.width, header.height):
        raise ImageError(CORRUPT, "The dicom image holds a JPEG 2000 stream of another size.")
    image.load()
    if len(image.getbands()) < header.samples:
        raise ImageError(CORRUPT, "The dicom image holds a JPEG 2000 stream of too few colours.")
    return image


def _jpeg2000_values(image: Image.Image, stream: bytes) -> NDArray[Any]:
    """Undoes Pillow's shift of samples to 16 bits from zero."""
    values = np.asarray(image, np.float64)
    if values.ndim == 3:
        return values[..., 0]
    start = stream.find(_CODESTREAM + _SIZE_MARKER)
    depth = stream[start + 2 + _COMPONENT_DEPTH_OFFSET]
    bits = (depth & ~_SIGNED_COMPONENT) + 1
    if image.mode.startswith("I;16"):
        values = values / 2.0 ** (16 - bits)
    return values - 2.0 ** (bits - 1) if depth & _SIGNED_COMPONENT else values


def _shown_grey(header: DicomHeader, stored: NDArray[Any]) -> Pixels:
    if header.window is not None:
        values = stored.astype(np.float64) * header.slope + header.intercept
        shown = _through_window(values, header.window)
    elif header.bits_stored == 8 and not header.signed and header.slope > 0:
        shown = stored / 255.0
    else:
        shown = _stretch(stored.astype(np.float64) * np.sign(header.slope))
    if header.photometric == "MONOCHROME1":
        shown = 1.0 - shown
    pixels: Pixels = np.rint(np.clip(shown, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels


def _through_window(values: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    """Values as shares of white, by the formulas of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    centre, width = window.centre, window.width
    if window.function == "SIGMOID":
        exponent = np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)
        return np.asarray(1.0 / (1.0 + np.exp(exponent)))
    if window.function != "LINEAR_EXACT":
        centre, width = centre - 0.5, width - 1.0
    if width == 0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _stretch(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maps the frame's range to 0..1; a frame of one value becomes black."""
    low, high = values.min(), values.max()
    if high == low:
        return np.zeros(values.shape)
    return np.asarray((values - low) / (high - low))


def _through_palette(header: DicomHeader, stored: NDArray[Any]) -> Pixels:
    if not header.palette:
        raise ImageError(CORRUPT, "The dicom image holds no whole palette.")
    indices = stored.astype(np.int64)
    channels = []
    for channel in header.palette:
        table = _table(channel)
        first = channel.descriptor[1]
        if header.signed and first >= 1 << 15:
            first -= 1 << 16
        channels.append(table[np.clip(indices - first, 0, len(table) - 1)])
    return np.stack(channels, axis=2)


def _table(channel: PaletteChannel) -> Pixels:
    """The entries of one colour of a palette, in 8 bits."""
    count, _, bits = channel.descriptor
    count = count or 1 << 16
    in_bytes = bits == 8 and (channel.segmented or len(channel.data) < 2 * count)
    size = 1 if in_bytes else 2
    whole = channel.data[: len(channel.data) // size * size]
    entries = np.frombuffer(whole, np.uint8 if in_bytes else "<u2")
    if channel.segmented:
        entries = _expand(entries.astype(np.int64), count)
    if len(entries) < count:
        raise ImageError(CORRUPT, f"The dicom image has {len(entries)} palette entries of {count}.")
    return (entries[:count] >> (8 if bits > 8 else 0)).astype(np.uint8)


def _expand(segments: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The entries of a segmented palette: runs stated one by one, or as a line to a value.

    DICOM PS3.3, C.7.9.2; segments that refer to earlier ones are not read.
    """
    entries: list[int] = []
    position = 0
    while position + 2 < len(segments) and len(entries) < count:
        operation, length = int(segments[position]), int(segments[position + 1])
        if operation == 0:
            entries.extend(segments[position + 2 : position + 2 + length].tolist())
            position += 2 + length
        elif operation == 1 and entries:
            steps = np.linspace(entries[-1], segments[position + 2], length + 1)[1:]
            entries.extend(np.rint(steps).astype(np.int64).tolist())
            position += 3
        else:
            raise ImageError(UNSUPPORTED_FORMAT, "The dicom palette has segments that are not read.")
    return np.array(entries, np.int64)
