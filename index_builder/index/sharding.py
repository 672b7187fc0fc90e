"""Which rows live where: the layout of the inverted lists, cut into index shards of about equal size.

All rows have one order: by list, in a list by the order of the embeddings dataset. A shard is a range
of that order, so the position of a row in the whole index (its id in the FAISS files) does not depend
on the number of shards.
"""

import dataclasses
import io

import numpy as np
from numpy.typing import NDArray

from index_builder.datasets import storage


@dataclasses.dataclass(frozen=True, eq=False)
class IndexLayout:
    """`list_offsets` int64 [nlist + 1], `shard_offsets` int64 [shards + 1], both in rows."""

    list_offsets: NDArray[np.int64]
    shard_offsets: NDArray[np.int64]

    @property
    def shards(self) -> int:
        """The number of index shards."""
        return len(self.shard_offsets) - 1

    @property
    def rows(self) -> int:
        """All rows of the index."""
        return int(self.list_offsets[-1])

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """Returns the range of rows that a shard owns."""
        return int(self.shard_offsets[shard]), int(self.shard_offsets[shard + 1])

    def shard_lists(self, shard: int) -> tuple[int, int]:
        """Returns the range of lists of which a shard owns at least one row."""
        start, stop = self.shard_rows(shard)
        first = int(np.searchsorted(self.list_offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.list_offsets, stop, side="left"))
        return first, last

    def list_rows(self, shard: int, list_number: int) -> tuple[int, int]:
        """Returns the range of rows of a list that a shard owns, counted from the shard's start."""
        start, stop = self.shard_rows(shard)
        first = max(int(self.list_offsets[list_number]), start)
        last = min(int(self.list_offsets[list_number + 1]), stop)
        return first - start, max(first, last) - start

    def shard_of_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the shard of each row."""
        return np.searchsorted(self.shard_offsets, rows, side="right") - 1


def plan_layout(list_sizes: NDArray[np.int64], shards: int) -> IndexLayout:
    """Cuts the lists, in order, into shards of about equal numbers of rows.

    A cut falls between two lists when that is within a twentieth of a shard of the even cut, and
    else inside the list, so only a list larger than a tenth of a shard is ever split. Shards that
    would be empty are left out.
    """
    list_offsets = np.concatenate([[0], np.cumsum(list_sizes)]).astype(np.int64)
    rows = int(list_offsets[-1])
    cuts = [0]
    for shard in range(1, shards):
        even = rows * shard // shards
        after = int(np.searchsorted(list_offsets, even))
        around = list_offsets[max(0, after - 1) : after + 1]
        nearest = int(around[np.abs(around - even).argmin()])
        cuts.append(nearest if abs(nearest - even) * 20 * shards <= rows else even)
    cuts.append(rows)
    return IndexLayout(list_offsets, np.unique(np.asarray(cuts, dtype=np.int64)))


def save_layout(path: str, layout: IndexLayout) -> None:
    """Writes a layout as one `.npz` file; equal layouts give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, list_offsets=layout.list_offsets, shard_offsets=layout.shard_offsets)
    storage.write_bytes(path, buffer.getvalue())


def load_layout(path: str) -> IndexLayout:
    """Reads what `save_layout` wrote. Raises FileNotFoundError."""
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
        return IndexLayout(arrays["list_offsets"], arrays["shard_offsets"])
