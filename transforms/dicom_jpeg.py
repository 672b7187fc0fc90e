"""A look at the JPEG streams inside a DICOM file, before DCMTK decodes them.

DCMTK waits without end for the rest of a stream whose frame header or scan is missing.
"""

from index_builder.errors import ImageError
from transforms.pixel_rules import CORRUPT

# Baseline, extended, lossless and lossless of the first order; not JPEG-LS or JPEG 2000.
JPEG_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55, 57, 70))

_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEGMENTS = frozenset((0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_SCAN, _START, _END = 0xDA, 0xD8, b"\xff\xd9"


def check_jpeg_stream(stream: bytes, width: int, height: int, samples: int) -> None:
    """Refuses a stream that is no whole JPEG image of the size that the DICOM header states.

    Raises:
        ImageError: `corrupt`.
    """
    if stream[:2] != bytes((0xFF, _START)) or _END not in stream[-4:]:
        raise ImageError(CORRUPT, "The dicom image holds a JPEG stream without its start or end.")
    framed, offset = False, 2
    while offset + 4 <= len(stream):
        marker = stream[offset + 1]
        length = int.from_bytes(stream[offset + 2 : offset + 4], "big")
        body = stream[offset + 4 : offset + 2 + length]
        if stream[offset] != 0xFF or length < 2 or len(body) != length - 2:
            break
        if marker == _SCAN and framed:
            return
        if marker in _FRAME_HEADERS:
            if framed or _frame(body) != (width, height, samples):
                break
            framed = True
        elif marker not in _SEGMENTS:
            break
        offset += 2 + length
    raise ImageError(CORRUPT, f"The dicom image holds a JPEG stream that is broken at {offset}.")


def _frame(body: bytes) -> tuple[int, int, int]:
    """The (width, height, components) of a frame header; zeros where it is too short."""
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        return 0, 0, 0
    return int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"), body[5]
