"""Where the vector of a picture is already: from the SHA-256 of its bytes to a part and a row.

One file of sorted digests, mapped rather than read, so that looking up costs no memory that grows
with the catalogue. Digests are cut to 16 bytes; who reads the row checks the whole one.
"""

import os
from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import manifests, storage
from index_builder.datasets.manifests import Part

# Entries that are sorted in memory at a time: 24 bytes each, and as much again for the order.
_BUCKET_ENTRIES = 1 << 22
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("part", "<u4"), ("row", "<u4")])
_COLUMN = "content_sha256"


def build_content_index(folder: str, parts: Sequence[Part], path: str) -> None:
    """Writes the index of all rows of an embeddings dataset; of equal digests the first row counts.

    Memory: one bucket of about four million rows. Digests are evenly spread, so buckets by their
    first bits are of about one size.
    """
    rows = sum(part.rows for part in parts)
    buckets = max(1, -(-rows // _BUCKET_ENTRIES))
    with storage.scratch_folder(storage.join(path, "..")) as scratch:
        names = [os.path.join(scratch, str(number)) for number in range(buckets)]
        for number, part in enumerate(parts):
            entries = _entries(folder, part, number)
            wanted = (entries["high"] >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)
            for bucket in np.unique(wanted):
                with open(names[int(bucket)], "ab") as file:
                    entries[wanted == bucket].tofile(file)
        with storage.atomic_path(path) as temporary:
            _write_sorted([name for name in names if os.path.exists(name)], rows, temporary)


def _entries(folder: str, part: Part, number: int) -> NDArray[np.void]:
    """The entries of one part, in the order of its rows."""
    with storage.open_arrow(storage.join(folder, part.file(".parquet").path)) as file:
        column = pq.read_table(file, columns=[_COLUMN])[_COLUMN].combine_chunks()
    digests = np.frombuffer(column.cast("binary").buffers()[2], np.uint8)
    # A view of a slice would begin elsewhere; a column that was read whole never is one.
    words = digests[: 32 * len(column)].reshape(-1, 4, 8)
    entries = np.empty(len(column), _ENTRY)
    entries["high"] = words[:, 0].copy().view(">u8")[:, 0]
    entries["low"] = words[:, 1].copy().view(">u8")[:, 0]
    entries["part"] = number
    entries["row"] = np.arange(len(column))
    return entries


def _write_sorted(names: Sequence[str], rows: int, path: str) -> None:
    """Sorts one bucket after another into the columns of the file."""
    with open(path, "wb") as file:
        file.truncate(rows * _ENTRY.itemsize)
    if not rows:
        return
    high, low, place = _columns(path, "r+")
    start = 0
    for name in names:
        entries = np.fromfile(name, _ENTRY)
        order = np.lexsort((entries["row"], entries["part"], entries["low"], entries["high"]))
        entries = entries[order]
        stop = start + len(entries)
        high[start:stop], low[start:stop] = entries["high"], entries["low"]
        place[start:stop, 0], place[start:stop, 1] = entries["part"], entries["row"]
        start = stop
    for column in (high, low, place):
        column.flush()


def _columns(path: str, mode: str) -> tuple[np.memmap, np.memmap, np.memmap]:  # type: ignore[type-arg]
    """The file's columns: digests' first and second 8 bytes, and (part, row), each contiguous."""
    # numpy's stubs know neither a memmap without type arguments nor a type given as text.
    rows = os.path.getsize(path) // _ENTRY.itemsize
    return (
        np.memmap(path, "<u8", mode, 0, (rows,)),  # type: ignore[call-overload]
        np.memmap(path, "<u8", mode, 8 * rows, (rows,)),  # type: ignore[call-overload]
        np.memmap(path, "<u4", mode, 16 * rows, (rows, 2)),  # type: ignore[call-overload]
    )


class ContentIndex:
    """An index that was written by `build_content_index`, from a local path; safe for threads."""

    def __init__(self, path: str) -> None:
        self._rows = os.path.getsize(path) // _ENTRY.itemsize
        if self._rows:
            self._high, self._low, self._place = _columns(path, "r")

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """Returns the number of the part and the row of a SHA-256, or None where it is not."""
        if not self._rows:
            return None
        high, low = np.frombuffer(digest, ">u8", 2).astype("<u8")
        at = int(np.searchsorted(self._high, high))
        while at < self._rows and self._high[at] == high:
            if self._low[at] == low:
                return int(self._place[at, 0]), int(self._place[at, 1])
            at += 1
        return None


def content_index_name(dataset: manifests.Manifest) -> str:
    """The name of the file for a dataset; another content gives another name."""
    return f"content-{dataset.content[:16]}.bin"
