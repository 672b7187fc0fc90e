"""The members of a tar archive, read forward, also behind damage.

Python's tarfile stops at the first header that it cannot read. Here the next header is looked for,
and what lies between is reported. Formats: POSIX ustar and pax, GNU long names, and the old v7:
https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html#tag_20_92_13_06
"""

import dataclasses
import re
import tarfile
from collections.abc import Callable, Iterator

from transforms.sources.base import UnreadableRegion
from transforms.sources.byte_stream import ByteStream

BLOCK_BYTES = 512
# Archives are padded to this size, so one that follows another begins at a multiple of it.
RECORD_BYTES = 10240
# A larger member is described but not held in memory.
MAX_MEMBER_BYTES = 1 << 30

_MAX_NAME_BYTES = 1 << 20
_SCAN_BYTES = 1 << 20
_MAGIC = re.compile(rb"ustar")
_MAGIC_PLACE = 257
_CHECKSUM_PLACE = 148
_CHECKSUM_DIGITS = frozenset(b" 01234567")
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_NAMES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KNOWN = frozenset((*tarfile.SUPPORTED_TYPES, *_NAMES))


@dataclasses.dataclass(frozen=True, eq=False)
class TarMember:
    """A file or link of an archive; `data` is None where it was not asked for or is not there.

    A name that is not UTF-8 holds its odd bytes as surrogates. `broken`: bytes of it are missing.
    """

    name: str
    size: int
    data: bytes | None
    broken: bool = False


def read_members(
    stream: ByteStream, source_shard: str, wanted: Callable[[str], bool]
) -> Iterator[TarMember | UnreadableRegion]:
    """Yields the files and links in their order, with the content of those whose name is wanted.

    An archive without its end marker ends with an unreadable region: nobody knows what followed.
    """
    named: dict[str, str] | None = {}
    while True:
        start = stream.position
        block = stream.peek(BLOCK_BYTES)
        if len(block) == BLOCK_BYTES and not any(block):
            region, ended = _read_zeros(stream, source_shard)
            if region is not None:
                yield region
            if ended:
                return
            continue
        header = _parse(block)
        if header is not None and header.type in _NAMES and _is_whole(stream, header):
            content = stream.peek(header.size, BLOCK_BYTES)
            stream.skip(BLOCK_BYTES + _padded(header.size))
            named = _read_name(header, content, named)
            continue
        if header is not None and header.type not in (*_REGULAR, *_LINKS, *_NAMES):
            size = header.size if header.type == tarfile.GNUTYPE_SPARSE else 0
            stream.skip(BLOCK_BYTES + _padded(size))
            named = {}
            continue
        item = problem = None
        if len(block) < BLOCK_BYTES:
            problem = "the archive has no end marker, so it was cut off here or earlier"
        elif header is None:
            problem = "the header of a member does not match its checksum"
        elif header.type in _NAMES:
            problem = "the archive ends inside a member's name, or that is too long"
        else:
            item, problem = _read_member(stream, header, named, wanted)
        named = {}
        if item is not None:
            yield item
        elif problem is not None:
            # Where bytes are missing, the next header may begin inside what was taken for this one.
            stream.skip(1 if stream.position == start else 0)
            found = _seek_header(stream)
            yield _region(stream, source_shard, start, problem, found)
            if not found:
                return


def _read_member(
    stream: ByteStream,
    header: tarfile.TarInfo,
    named: dict[str, str] | None,
    wanted: Callable[[str], bool],
) -> tuple[TarMember | None, str | None]:
    """Reads a file or link, or says why it cannot be; goes on behind it where its end is known."""
    regular = header.type in _REGULAR
    size = _size(header, named) if regular else 0
    if named is None:
        stream.skip(BLOCK_BYTES + _padded(size))
        return None, "the full name of a member cannot be read"
    name = named.get("path", header.name)
    cut_off = f"the archive ends inside {name!a} ({size} bytes)"
    content = None
    if regular and size <= MAX_MEMBER_BYTES and wanted(name):
        content = stream.peek(size, BLOCK_BYTES)
        if len(content) < size:
            return None, cut_off
        place = _header_inside(stream, size) if size else -1
        if place >= 0:
            stream.skip(BLOCK_BYTES + place)
            return TarMember(name, size, None, broken=True), None
    if stream.skip(BLOCK_BYTES + _padded(size)) < BLOCK_BYTES + size:
        return None, cut_off
    return TarMember(name, size, content), None


def _read_zeros(stream: ByteStream, source_shard: str) -> tuple[UnreadableRegion | None, bool]:
    """Passes over blocks of zeros; returns the region where they mark no end, and whether it is all."""
    start = stream.position
    blocks = _skip_zeros(stream)
    rest = stream.peek(BLOCK_BYTES)
    if not any(rest) and not stream.damage:
        return None, True
    following = _parse(rest) is not None
    if following and blocks > 1 and stream.position % RECORD_BYTES == 0:
        return None, False  # another archive
    found = following or _seek_header(stream)
    problem = "zeros are where a header should be"
    return _region(stream, source_shard, start, problem, found), not found


def _is_whole(stream: ByteStream, header: tarfile.TarInfo) -> bool:
    """Tells whether an extended header, which is small, is there to its end."""
    return header.size <= _MAX_NAME_BYTES and len(stream.peek(header.size, BLOCK_BYTES)) == header.size


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """Returns a header, or None where the block is none."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return header if header.size >= 0 and header.type in _KNOWN else None


def _size(header: tarfile.TarInfo, named: dict[str, str] | None) -> int:
    size = (named or {}).get("size", "")
    return int(size) if size.isascii() and size.isdecimal() else header.size


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _read_name(
    header: tarfile.TarInfo, content: bytes, named: dict[str, str] | None
) -> dict[str, str] | None:
    """Adds what an extended header says of the member that follows; None where it is damaged."""
    if named is None or header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return named
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return named | {"path": content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found = dict(named)
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(content):
            return None
        key, equals, value = content[len(digits) + 1 : int(digits)].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        content = content[int(digits) :]
    return found


def _header_inside(stream: ByteStream, size: int) -> int:
    """Returns where in a member's content the next header is, because bytes are missing; else -1."""
    if _parse(stream.peek(BLOCK_BYTES, BLOCK_BYTES + _padded(size))) is None:
        # It may begin at the last byte.
        content = stream.peek(_padded(size) + BLOCK_BYTES - 1, BLOCK_BYTES)
        for place in _candidates(content, 0):
            if _parse(content[place : place + BLOCK_BYTES]) is not None:
                return place
    return -1


def _skip_zeros(stream: ByteStream) -> int:
    blocks = 0
    while (block := stream.peek(BLOCK_BYTES)) and not any(block):
        stream.skip(len(block))
        blocks += 1
    return blocks


def _seek_header(stream: ByteStream) -> bool:
    """Goes to the next block that is a header, or to the end; tells whether one is there."""
    while True:
        content = stream.peek(_SCAN_BYTES)
        for place in _candidates(content, -stream.position % BLOCK_BYTES):
            if _parse(content[place : place + BLOCK_BYTES]) is not None:
                stream.skip(place)
                return True
        if len(content) < _SCAN_BYTES:
            stream.skip(len(content))
            return False
        # A header may begin in the last bytes.
        stream.skip(len(content) - (BLOCK_BYTES - 1))


def _candidates(content: bytes, first: int) -> list[int]:
    """Returns, ascending, where a header may be.

    That is at a multiple of the block's size or, because bytes may be missing, where its magic is.
    """
    last = len(content) - BLOCK_BYTES
    aligned = (
        place
        for place in range(first, last + 1, BLOCK_BYTES)
        if content[place + _CHECKSUM_PLACE] in _CHECKSUM_DIGITS
    )
    marked = (found.start() - _MAGIC_PLACE for found in _MAGIC.finditer(content))
    return sorted({*aligned, *(place for place in marked if 0 <= place <= last)})


def _region(
    stream: ByteStream, source_shard: str, start: int, problem: str, found: bool
) -> UnreadableRegion:
    """Describes the bytes from `start` to where the stream is now."""
    length = stream.position - start
    if not found and stream.damage:
        problem = f"the gzip stream is damaged ({stream.damage})"
    behind = (
        f"{length} bytes were passed over up to byte {stream.position}, where the next member begins."
        if found
        else f"Nothing more can be read in the {length} bytes up to the end."
    )
    return UnreadableRegion(
        source_shard, f"The archive cannot be read from byte {start} on: {problem}. {behind}", start
    )
