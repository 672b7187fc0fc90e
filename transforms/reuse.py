"""Vectors that need no encoding: those of the previous dataset, and those of the shard itself.

A vector belongs to the bytes of a picture (their SHA-256) and to the encoder. Looking only at the
previous dataset and at what stands before in the same shard makes reuse the same on every run.
"""

import dataclasses
import functools
import os
import tempfile
import threading
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.content_index import ContentIndex
from index_builder.datasets.embeddings import list_matrix
from index_builder.errors import DatasetError

_COLUMNS = ["vector", "content_sha256", "width", "height", "format"]


@dataclasses.dataclass(frozen=True)
class ReuseSpec:
    """The dataset whose vectors may be taken over, and the content index of its rows."""

    folder: str
    index_path: str


@dataclasses.dataclass(frozen=True, eq=False)
class FoundVector:
    """A vector [dim], of the dataset's type, and what is known of the picture that it is of.

    It is float16 of unit length, or the encoder's own float32.
    """

    vector: NDArray[np.floating[Any]]
    width: int
    height: int
    format: str


class _Previous:
    """A dataset and its content index, opened once a process."""

    def __init__(self, spec: ReuseSpec) -> None:
        self.parts = manifests.load(spec.folder, embeddings.KIND).parts
        with storage.local_copy(spec.index_path) as path:
            # Mapped, so a downloaded copy may lose its name.
            self.index = ContentIndex(path)


@functools.lru_cache(maxsize=1)
def _open(spec: ReuseSpec) -> _Previous:
    return _Previous(spec)


_OPEN_LOCK = threading.Lock()


class PreviousVectors:
    """The rows of the previous dataset by the content of their pictures.

    `has` may be called from any thread, `read` from one. Memory: one row group.
    """

    def __init__(self, spec: ReuseSpec) -> None:
        self._folder = spec.folder
        with _OPEN_LOCK:
            previous = _open(spec)
        self._parts, self._index = previous.parts, previous.index
        self._file: tuple[int, Any, pq.ParquetFile, NDArray[np.int64]] | None = None
        self._group: tuple[tuple[int, int], dict[str, Any]] | None = None

    def has(self, digest: bytes) -> bool:
        """Tells whether a picture with this SHA-256 has a row."""
        return self._index.find(digest) is not None

    def read(self, digest: bytes) -> FoundVector:
        """Returns the row of a picture that `has` found. Raises DatasetError for damage."""
        place = self._index.find(digest)
        assert place is not None
        number, row = place
        columns, offset = self._row_group(number, row)
        if columns["content_sha256"][offset] != digest:
            raise DatasetError(
                f"{self._folder}: row {row} of part {self._parts[number].name} is not the picture that "
                "the content index says. The dataset was changed: make it again, or set "
                "embeddings.reuse: false."
            )
        return FoundVector(
            columns["vector"][offset],
            columns["width"][offset],
            columns["height"][offset],
            columns["format"][offset],
        )

    def _row_group(self, number: int, row: int) -> tuple[dict[str, Any], int]:
        """Reads the row group of a row, unless it was the last one read; rows mostly come in order."""
        if self._file is None or self._file[0] != number:
            self.close()
            path = storage.join(self._folder, self._parts[number].file(".parquet").path)
            stream = storage.open_arrow(path)
            parquet = pq.ParquetFile(stream)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            self._file = (number, stream, parquet, np.cumsum([0, *sizes]))
        _, _, parquet, starts = self._file
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if self._group is None or self._group[0] != (number, group):
            table = parquet.read_row_group(group, columns=_COLUMNS)
            columns = {name: table[name].to_pylist() for name in _COLUMNS[1:]}
            self._group = ((number, group), columns | {"vector": list_matrix(table["vector"])})
        return self._group[1], row - int(starts[group])

    def close(self) -> None:
        """Closes the file that is open."""
        if self._file is not None:
            self._file[1].close()
            self._file = None


class SeenVectors:
    """The vectors that were encoded for this shard so far, in a temporary file, by content.

    All have `dim` numbers of the type `dtype`. Memory: about 200 bytes a picture. `has` may be called
    from any thread.
    """

    def __init__(self, dim: int, dtype: type[np.floating[Any]]) -> None:
        self._dtype = np.dtype(dtype)
        self._bytes = self._dtype.itemsize * dim
        self._found: dict[bytes, tuple[int, int, int, str]] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`

    def has(self, digest: bytes) -> bool:
        """Tells whether a picture with this SHA-256 was encoded."""
        return digest in self._found

    def add(self, digest: bytes, found: FoundVector) -> None:
        """Keeps the vector of a picture."""
        assert found.vector.nbytes == self._bytes, (found.vector.shape, found.vector.dtype)
        os.write(self._file.fileno(), found.vector.tobytes())
        self._found[digest] = (len(self._found), found.width, found.height, found.format)

    def read(self, digest: bytes) -> FoundVector:
        """Returns the vector of a picture that `has` found."""
        number, width, height, name = self._found[digest]
        data = os.pread(self._file.fileno(), self._bytes, number * self._bytes)
        return FoundVector(np.frombuffer(data, self._dtype), width, height, name)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
