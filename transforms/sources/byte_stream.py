"""A file read forward through a window: plain or gzip, as far as it can be read.

A container format looks ahead in the window to tell whether what follows is whole, and goes on
behind a damaged place. Positions count the bytes of the content, which for gzip is decompressed.
"""

import zlib
from typing import BinaryIO

GZIP_MAGIC = b"\x1f\x8b\x08"

_READ_BYTES = 1 << 20
_READ_BYTES_MAX = 1 << 26
_PACKED_BYTES = 1 << 16
_GZIP_WINDOW = 31  # zlib's number for a gzip header and trailer, both checked


class ByteStream:
    """The content of a file from `position` on; memory is what was last looked at.

    `damage` says, once the end was reached, why a gzip stream ended too early; else it is None.
    """

    def __init__(self, file: BinaryIO, packed: bool) -> None:
        self.position = 0
        self._inflater = _Inflater(file) if packed else None
        self._read = self._inflater.read if self._inflater else file.read
        self._window = b""
        self._at = 0
        self._ended = False

    @property
    def damage(self) -> str | None:
        """Why the content ends before its end."""
        return self._inflater.damage if self._inflater else None

    def peek(self, count: int, ahead: int = 0) -> bytes:
        """Returns `count` bytes that begin `ahead` bytes further on; fewer only at the end."""
        self._fill(ahead + count)
        start = self._at + ahead
        return self._window[start : start + count]

    def skip(self, count: int) -> int:
        """Goes on by `count` bytes; returns how many there were."""
        left = count
        while left:
            self._fill(1)
            step = min(left, len(self._window) - self._at)
            if not step:
                break
            self._at += step
            left -= step
        self.position += count - left
        return count - left

    def _fill(self, count: int) -> None:
        have = len(self._window) - self._at
        if have >= count or self._ended:
            return
        pieces = [self._window[self._at :]]
        while have < count:
            piece = self._read(min(max(_READ_BYTES, count - have), _READ_BYTES_MAX))
            if not piece:
                self._ended = True
                break
            pieces.append(piece)
            have += len(piece)
        self._window = b"".join(pieces)
        self._at = 0


class _Inflater:
    """Decompresses gzip members one after another, and gives all that comes before damage.

    The gzip module would not do: an error costs it what the same call had decompressed before.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.damage: str | None = None
        self._file = file
        self._packed = b""
        self._member = zlib.decompressobj(_GZIP_WINDOW)
        self._inside = True
        self._started = False

    def read(self, count: int) -> bytes:
        """Returns some bytes, about `count` at most; none at the end or at the damage."""
        while self.damage is None:
            if not self._packed:
                self._packed = self._file.read(_PACKED_BYTES)
            ended = not self._packed
            if ended and not self._started:
                return b""
            self._started = True
            if not self._inside:
                if ended:
                    return b""
                # Members may be padded with zeros, as those on tapes are.
                self._packed = self._packed.lstrip(b"\0")
                if not self._packed:
                    continue
                self._member = zlib.decompressobj(_GZIP_WINDOW)
                self._inside = True
            data = self._inflate(count)
            if data:
                return data
            if ended and self._inside:
                self.damage = "the file ends before the stream does"
        return b""

    def _inflate(self, count: int) -> bytes:
        before = self._member.copy()
        try:
            data = self._member.decompress(self._packed, count)
        except zlib.error as error:
            self.damage = str(error)
            return _inflate_up_to_damage(before, self._packed)
        self._packed = self._member.unconsumed_tail
        if self._member.eof:
            self._packed = self._member.unused_data
            self._inside = False
        return data


def _inflate_up_to_damage(member: "zlib._Decompress", packed: bytes) -> bytes:
    pieces = []
    try:
        for place in range(len(packed)):
            pieces.append(member.decompress(packed[place : place + 1]))
    except zlib.error:
        pass  # the place that the caller knows of
    return b"".join(pieces)
