"""Writing FAISS files of inverted lists in one pass, from codes that are never copied into an index.

`faiss.write_index` needs all lists in memory, in an index that holds a copy of them. Here FAISS writes
the head (an index of the right kind with empty lists), and the lists follow one after another in the
layout of FAISS's own `ArrayInvertedLists` (faiss/impl/index_write.cpp: write_InvertedLists). The file
has the bytes that `faiss.write_index` would have written.
"""

import os
import struct
from collections.abc import Iterable
from typing import BinaryIO

import faiss
import numpy as np
from numpy.typing import NDArray

# "ilar", nlist, code size, "sprs", length of the vector of sizes: the tail of an empty index.
_EMPTY_TAIL_BYTES = 4 + 8 + 8 + 4 + 8
_COPY_BYTES = 16 << 20


def write_lists(
    path: str,
    index: faiss.IndexIVF,
    sizes: NDArray[np.int64],
    lists: Iterable[tuple[Iterable[NDArray[np.float16]], NDArray[np.int64]]],
) -> None:
    """Writes an index with given lists to `path`; `index` is of the same kind, with empty lists.

    `sizes` int64 [nlist]; `lists` yields for every list that is not empty, in order, its codes in
    blocks of rows and its ids, int64. Raises ValueError when they do not have those sizes.
    """
    index.ntotal = int(sizes.sum())
    faiss.write_index(index, path)
    filled = np.flatnonzero(sizes)
    with open(path, "r+b") as file:
        file.seek(-_EMPTY_TAIL_BYTES, os.SEEK_END)
        if file.read(4) != b"ilar":
            raise ValueError(f"faiss {faiss.__version__} writes empty inverted lists in another layout")
        file.seek(-_EMPTY_TAIL_BYTES, os.SEEK_END)
        file.truncate()
        file.write(b"ilar" + struct.pack("<QQ", index.nlist, index.code_size))
        # FAISS writes all sizes when more than half of the lists are filled, else (list, size) pairs.
        full = len(filled) > index.nlist // 2
        numbers = sizes if full else np.stack([filled, sizes[filled]], axis=1).reshape(-1)
        file.write((b"full" if full else b"sprs") + struct.pack("<Q", len(numbers)))
        file.write(numbers.astype("<u8").tobytes())
        numbers_of = iter(filled)
        for blocks, ids in lists:
            number = next(numbers_of)
            rows = 0
            for block in blocks:
                rows += len(block)
                _write_rows(file, block)
            if not rows == len(ids) == sizes[number]:
                raise ValueError(
                    f"list {number} has {rows} codes and {len(ids)} ids, wanted {sizes[number]}"
                )
            file.write(ids.astype("<i8").tobytes())
        if next(numbers_of, None) is not None:
            raise ValueError(f"got fewer lists than the {len(filled)} that are not empty")


def _write_rows(file: BinaryIO, block: NDArray[np.float16]) -> None:
    """Writes rows of codes in pieces: a mapped block is not copied whole."""
    step = max(1, _COPY_BYTES // max(1, block.shape[1] * block.itemsize))
    for start in range(0, len(block), step):
        file.write(np.ascontiguousarray(block[start : start + step]).data)
