"""The chunks of a PNG that its picture needs; Pillow refuses a file for any of the others."""

import zlib
from collections.abc import Iterator

_SIGNATURE_BYTES = 8
# Chunks of the picture itself, whatever their state: Pillow is to judge them.
_OF_THE_PICTURE = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
# What Pillow decompresses at most of a profile.
_MAX_PROFILE_BYTES = 1 << 20


def only_picture(data: bytes) -> bytes:
    """A PNG without texts, times, further frames and the like.

    Orientation (`eXIf`) and colour profile (`iCCP`) stay where they are sound. From the first chunk
    that does not fit into the file on, everything stays.
    """
    kept = [data[:_SIGNATURE_BYTES]]
    end = _SIGNATURE_BYTES
    for start, end in _chunks(data):
        kind, body = data[start + 4 : start + 8], data[start + 8 : end - 4]
        if kind in _OF_THE_PICTURE or (
            kind in (b"eXIf", b"iCCP")
            and int.from_bytes(data[end - 4 : end], "big") == zlib.crc32(kind + body)
            and (kind == b"eXIf" or _is_profile(body))
        ):
            kept.append(data[start:end])
    kept.append(data[end:])
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """The (start, end) of each chunk with its length and checksum, as far as they fit."""
    start = _SIGNATURE_BYTES
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        yield start, end
        start = end


def _is_profile(body: bytes) -> bool:
    """Whether the body of an iCCP chunk is a name and what Pillow would decompress."""
    _, end_of_name, compressed = body.partition(b"\0")
    if not end_of_name or compressed[:1] != b"\0":
        return False
    stream = zlib.decompressobj()
    try:
        stream.decompress(compressed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return not stream.unconsumed_tail
