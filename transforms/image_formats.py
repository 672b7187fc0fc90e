"""The formats that Kith reads: how the first bytes tell them, and what opens those of Pillow.

Pillow's plugins are called themselves: Image.open would try every format that is installed, and
has a process-wide size limit of its own.
"""

import io
from collections.abc import Callable
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from index_builder.errors import ImageError, KithError
from transforms.pixel_rules import UNSUPPORTED_FORMAT

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
_JPEG2000_CODESTREAM = b"\xff\x4f\xff\x51"
_ICO_SIGNATURE = b"\0\0\1\0"
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)

# Brands of the ISO base media file format. The general brands mif1 and msf1 say nothing of the
# compression, so a file that names an AV1 brand is an AVIF, whatever else it names.
_AVIF_BRANDS = frozenset((b"avif", b"avis", b"avio"))
_HEIC_BRANDS = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")
)
_MAX_BRANDS = 64

_PNG_DEPTH_OFFSET, _PNG_COLOUR_OFFSET = 24, 25
_ICON_ENTRY_BYTES = 16


def sniff_format(data: bytes) -> str | None:
    """The format that the first bytes announce, or None when they are no known image."""
    if data[128:132] == b"DICM":  # First: the 128 bytes before may be those of a TIFF header.
        return "dicom"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(_PNG_SIGNATURE):
        return "png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "bmp"
    if data.startswith((_JP2_SIGNATURE, _JPEG2000_CODESTREAM)):
        return "jpeg2000"
    if data[4:8] == b"ftyp":
        return _format_of_brands(data)
    if data.startswith(_ICO_SIGNATURE) and _icon_entries(data):
        return "ico"
    return None


def _format_of_brands(data: bytes) -> str | None:
    """The format of an ISO base media file, by its major and compatible brands."""
    length = min(int.from_bytes(data[:4], "big"), len(data), 16 + 4 * _MAX_BRANDS)
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, length - 3, 4))}
    if brands & _AVIF_BRANDS:
        return "avif"
    return "heic" if brands & _HEIC_BRANDS else None


def open_image(name: str, data: bytes) -> ImageFile.ImageFile:
    """Reads the header of an image of one of Pillow's formats; `load` decodes its pixels.

    What Pillow raises on bad bytes goes to the caller.

    Raises:
        ImageError: `unsupported_format` for a variety that its decoder does not know.
    """
    try:
        return _OPENERS[name](data)
    except (OSError, SyntaxError, NotImplementedError) as error:
        if "nsupported" not in str(error):
            raise
        raise ImageError(
            UNSUPPORTED_FORMAT, f"The {name} image is of a kind that is not read: {error}"
        ) from error


_Opener = Callable[[bytes], ImageFile.ImageFile]


def _plugin(kind: Callable[[io.BytesIO], ImageFile.ImageFile]) -> _Opener:
    return lambda data: kind(io.BytesIO(data))


def _open_png(data: bytes) -> ImageFile.ImageFile:
    """Pillow reduces or spreads samples to 8 bits, but not the transparent value among them."""
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    depth, colour = data[_PNG_DEPTH_OFFSET], data[_PNG_COLOUR_OFFSET]
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif isinstance(transparent, int) and colour == 0 and depth in (2, 4):
        image.info["transparency"] = transparent * 255 // ((1 << depth) - 1)
    return image


class _GifOnWhite(GifImagePlugin.GifImageFile):
    """A GIF whose first frame may be smaller than its canvas: the rest is white, not colour 0."""

    def load_prepare(self) -> None:
        # No extents: a frame that has been loaded before.
        self._frame_box = self.tile[0].extents if self.tile else None
        super().load_prepare()

    def load_end(self) -> None:
        super().load_end()
        box = self._frame_box
        if box in (None, (0, 0, *self.size)) or "transparency" in self.info:
            return
        frame = Image.Image()._new(self.im)
        shown = Image.new("RGB", self.size, "white")
        shown.paste(frame.crop(box).convert("RGB"), box)
        self.im, self._mode = shown.im, "RGB"


def _icon_entries(data: bytes) -> list[tuple[int, int]]:
    """The (length, offset) of each picture of an icon; empty where they do not make one."""
    count = int.from_bytes(data[4:6], "little")
    first = 6 + count * _ICON_ENTRY_BYTES
    entries = []
    for start in range(6, min(first, len(data) - _ICON_ENTRY_BYTES + 1), _ICON_ENTRY_BYTES):
        length = int.from_bytes(data[start + 8 : start + 12], "little")
        offset = int.from_bytes(data[start + 12 : start + 16], "little")
        if data[start + 3] or offset < first:  # A reserved byte, or pixels inside the directory.
            return []
        entries.append((length, offset))
    return entries


class _LargestIcon(IcoImagePlugin.IcoImageFile):
    """The largest picture of an icon, of the size that it states itself, decoded by `load`.

    Pillow's own class believes the directory, and decodes while it opens.
    """

    def _open(self) -> None:
        assert self.fp is not None
        self.ico = IcoImagePlugin.IcoFile(self.fp)
        sizes = [self._stated(entry) for entry in self.ico.entry]
        # Of two pictures of one size the one of more colours.
        depths = [entry.color_depth % 256 for entry in self.ico.entry]
        self._index = max(range(len(sizes)), key=lambda i: (sizes[i][0] * sizes[i][1], depths[i]))
        self._size = sizes[self._index]
        self._mode = "RGBA"

    def _stated(self, entry: IcoImagePlugin.IconHeader) -> tuple[int, int]:
        """The size in the PNG or bitmap header of an entry; zeros where there is none."""
        assert self.fp is not None
        self.fp.seek(entry.offset)
        head = self.fp.read(24)
        if head.startswith(_PNG_SIGNATURE):
            return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        if head.startswith(b"\x0c\0\0\0"):
            width, height = int.from_bytes(head[4:6], "little"), int.from_bytes(head[6:8], "little")
        else:
            width = int.from_bytes(head[4:8], "little")
            height = abs(int.from_bytes(head[8:12], "little", signed=True))
        return width, height // 2  # Colours above, mask below.

    def load(self) -> Any:
        if self._im is None:
            picture = self.ico.frame(self._index)
            picture.load()
            if picture.size != self._size:
                raise ValueError(f"the icon is {picture.size}, its header said {self._size}")
            self.im, self._mode, self.palette = picture.im, picture.mode, picture.palette
            self.info.update(picture.info)
        return Image.Image.load(self)


def _open_heic(data: bytes) -> ImageFile.ImageFile:
    """HEIC through libheif, which applies the file's own rotation; EXIF then says upright."""
    try:
        import pi_heif
    except ImportError as error:
        raise KithError(
            f"pi-heif cannot be used: {error}. HEIC images need it. Install the versions of "
            "Kith's lock file."
        ) from error
    return _without_xmp(pi_heif.HeifImageFile(io.BytesIO(data)))


def _open_avif(data: bytes) -> ImageFile.ImageFile:
    """AVIF; Pillow states the file's own rotation as the orientation of EXIF, whatever that was."""
    return _without_xmp(AvifImagePlugin.AvifImageFile(io.BytesIO(data)))


def _without_xmp(image: ImageFile.ImageFile) -> ImageFile.ImageFile:
    """Pillow would take an orientation from XMP, which does not count in these files."""
    image.info.pop("xmp", None)
    return image


_OPENERS: dict[str, _Opener] = {
    "jpeg": _plugin(JpegImagePlugin.JpegImageFile),
    "png": _open_png,
    "gif": _plugin(_GifOnWhite),
    "bmp": _plugin(BmpImagePlugin.BmpImageFile),
    "webp": _plugin(WebPImagePlugin.WebPImageFile),
    "jpeg2000": _plugin(Jpeg2KImagePlugin.Jpeg2KImageFile),
    "avif": _open_avif,
    "heic": _open_heic,
    "ico": _plugin(_LargestIcon),
}
