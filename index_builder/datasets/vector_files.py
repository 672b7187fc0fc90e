"""Vectors as others write them: Parquet files with an id, a list of numbers, and further columns."""

import dataclasses
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import storage
from index_builder.datasets.embeddings import RESERVED_COLUMNS, ROW_GROUP_ROWS
from index_builder.datasets.table_files import is_text
from index_builder.errors import ConfigError, DatasetError


@dataclasses.dataclass(frozen=True, eq=False)
class VectorBlock:
    """Rows of the input as they are: `place` is where they are from, `first` the number of the first.

    `vectors` is [n, d] of any float type, NaN where a number is missing; `columns` are the metadata.
    """

    place: str
    first: int
    ids: pa.Array
    items: pa.Array
    vectors: NDArray[np.floating[Any]]
    columns: dict[str, pa.Array]


@dataclasses.dataclass(frozen=True)
class VectorColumns:
    """Which columns of Parquet files hold what; `columns` None takes all that are left."""

    id_column: str
    vector_column: str
    item_column: str | None
    columns: tuple[str, ...] | None

    def metadata(self, path: str, schema: pa.Schema) -> dict[str, str]:
        """Returns the metadata columns with their types, as METADATA_TYPES names them."""
        taken = (self.id_column, self.vector_column, self.item_column)
        names = self.columns
        if names is None:
            names = tuple(name for name in schema.names if name not in taken)
        self._require(path, schema, names)
        kinds = {name: metadata_kind(path, name, schema.field(name).type) for name in names}
        check_names(path, kinds)
        return kinds

    def check(self, path: str, schema: pa.Schema, kinds: Mapping[str, str]) -> None:
        """Raises ConfigError when a file lacks a column or has it in another type."""
        names = [self.id_column, *([self.item_column] if self.item_column else [])]
        self._require(path, schema, (*names, self.vector_column, *kinds))
        vector = schema.field(self.vector_column).type
        if not (_is_list(vector) and pa.types.is_floating(vector.value_type)):
            raise ConfigError(
                f"{path} has the column {self.vector_column!r} as {vector}, wanted a list of float16, "
                "float32 or float64. Name the column of the vectors (vector_column)."
            )
        for name in names:
            kind = schema.field(name).type
            if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_dictionary(kind)):
                raise ConfigError(
                    f"{path} has the column {name!r} as {kind}, wanted text or whole numbers as ids. "
                    "Name another column."
                )
        for name, wanted in kinds.items():
            found = metadata_kind(path, name, schema.field(name).type)
            if found != wanted:
                raise ConfigError(
                    f"{path} has the column {name!r} as {found}, the first file as {wanted}, wanted "
                    "one type. Write the files alike, or leave the column out of `columns`."
                )

    def _require(self, path: str, schema: pa.Schema, names: Iterable[str]) -> None:
        for name in names:
            if schema.names.count(name) != 1:
                raise ConfigError(
                    f"{path} has {schema.names.count(name)} columns {name!r}, wanted one; its columns "
                    f"are {', '.join(schema.names)}. Correct the name."
                )

    def read(self, files: Sequence[str], kinds: Mapping[str, str]) -> Iterator[VectorBlock]:
        """Yields the rows of all files, in order."""
        names = [self.id_column, self.vector_column, *kinds]
        if self.item_column:
            names.append(self.item_column)
        for path in files:
            first = 0
            try:
                with storage.open_arrow(path) as file:
                    for batch in pq.ParquetFile(file).iter_batches(
                        ROW_GROUP_ROWS, columns=list(dict.fromkeys(names))
                    ):
                        if batch.num_rows:
                            ids = batch.column(self.id_column)
                            items = batch.column(self.item_column) if self.item_column else ids
                            metadata = {name: batch.column(name) for name in kinds}
                            place = place_of(path)
                            vectors = _matrix(place, first, batch.column(self.vector_column))
                            yield VectorBlock(place, first, ids, items, vectors, metadata)
                            first += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise DatasetError(
                    f"{path} cannot be read as Parquet: {error}. Write it again."
                ) from error


def find_vector_files(paths: Sequence[str]) -> list[str]:
    """Returns the files of paths and globs, each once. Raises ConfigError for one without files."""
    files: dict[str, None] = {}
    for path in paths:
        found = storage.glob(path)
        if not found:
            raise ConfigError(f"No file matches {path}, wanted Parquet files. Correct the path.")
        files.update(dict.fromkeys(found))
    return list(files)


def read_schema(path: str) -> pa.Schema:
    """Returns the columns of a Parquet file. Raises DatasetError where it is none."""
    with storage.open_arrow(path) as file:
        try:
            return pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{path} cannot be read as Parquet: {error}. Write it again.") from error


def place_of(path: str) -> str:
    """Returns a file's name with that of its folder, which does not change with the machine."""
    return posixpath.join(*path.rstrip("/").rsplit("/", 2)[-2:]).lstrip("/")


def metadata_kind(path: str, name: str, found: pa.DataType) -> str:
    """Returns the metadata type that holds every value of an Arrow type."""
    value = found.value_type if pa.types.is_dictionary(found) else found
    if is_text(value):
        return "string"
    if pa.types.is_boolean(value):
        return "bool"
    if pa.types.is_integer(value):
        return "int64"
    if pa.types.is_floating(value):
        return "float64"
    raise ConfigError(
        f"{path} has the column {name!r} as {found}, wanted text, numbers or truth values as metadata. "
        "Name in `columns` those to take."
    )


def check_names(path: str, kinds: Iterable[str]) -> None:
    """Raises ConfigError for a metadata column whose name the dataset needs itself."""
    taken = sorted(RESERVED_COLUMNS & set(kinds))
    if taken:
        raise ConfigError(
            f"{path} has the column {taken[0]!r}, a name that the dataset needs itself. Rename it, or "
            "name in `columns` those to take."
        )


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _matrix(place: str, first: int, column: pa.Array) -> NDArray[np.floating[Any]]:
    """Returns a list column as an array [n, length]. Raises DatasetError for lengths that differ."""
    if column.null_count:
        row = first + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DatasetError(
            f"{place} row {row} (counted from 0) has no vector, wanted one in every row. Leave it out."
        )
    if pa.types.is_fixed_size_list(column.type):
        length = column.type.list_size
    else:
        lengths = column.value_lengths().to_numpy()
        length = int(lengths[0])
        if (lengths != length).any():
            row = int(np.flatnonzero(lengths != length)[0])
            raise DatasetError(
                f"{place} row {first + row} (counted from 0): the vector has {lengths[row]} numbers, "
                f"those before it {length}, wanted one length. Import each length on its own."
            )
    if length < 1:
        raise DatasetError(f"{place} row {first}: the vector has 0 numbers, wanted at least one.")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    matrix: NDArray[np.floating[Any]] = flat.reshape(len(column), length)
    return matrix
