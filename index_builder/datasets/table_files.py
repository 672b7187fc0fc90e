"""A metadata table (stock, price, brand) as it is kept: Parquet or CSV files, and their columns.

The table is apart from the images, so a change of stock makes an index again, but no embedding.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from index_builder.datasets import storage
from index_builder.errors import ConfigError, DatasetError

# The configuration's section, for messages.
SECTION = "catalog.metadata"

PARQUET = (".parquet",)
CSV = (".csv", ".csv.gz")
BATCH_ROWS = 1 << 16

_CSV_BLOCK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A table as it is asked for: where it is, how it is joined, what is taken from it.

    `paths` are files or globs; `key` is the index's column (`image_id` or `item_id`), `id_column` the
    table's; `columns` are (name, type) pairs with the types of METADATA_TYPES.
    """

    paths: tuple[str, ...]
    key: str
    id_column: str
    columns: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that the index gets."""
        return tuple(name for name, _ in self.columns)


@dataclasses.dataclass(frozen=True)
class TableFile:
    """One file of a table and the token of its content."""

    path: str
    token: str


@dataclasses.dataclass(frozen=True)
class MetadataTable:
    """A table as it was found; travels to the workers."""

    spec: TableSpec
    files: tuple[TableFile, ...]

    def fingerprint_value(self) -> dict[str, object]:
        """Returns what decides the values: the content of the files, in their order, and the join."""
        return {
            "files": [file.token for file in self.files],
            "key": self.spec.key,
            "id_column": self.spec.id_column,
            "columns": self.spec.columns,
        }


def find_table_files(spec: TableSpec) -> list[str]:
    """Lists the files of a table, sorted, after looking at the columns of each.

    Raises ConfigError for a path without files, a file of another kind, and a column that a file does
    not have or has twice; DatasetError where a file cannot be read.
    """
    files = match_files(spec.paths, SECTION, "a Parquet or CSV table")
    for path in files:
        _check_columns(spec, path)
    return files


def match_files(paths: Iterable[str], section: str, wanted: str) -> list[str]:
    """Lists the files that paths and globs name, sorted, each once.

    Raises ConfigError for a path without files; `section` is the configuration's that has the `paths`,
    `wanted` what they should name.
    """
    found: set[str] = set()
    for path in paths:
        matches = storage.glob(path)
        if not matches:
            raise ConfigError(
                f"{section}.paths: no file matches {path}, wanted {wanted}. Correct the path; a "
                "relative path in a config file is relative to that file's folder."
            )
        found.update(matches)
    return sorted(found)


def open_table(spec: TableSpec) -> MetadataTable:
    """Finds a table and takes the token of every file. Raises as `find_table_files` does."""
    files = find_table_files(spec)
    return MetadataTable(spec, tuple(TableFile(path, storage.content_token(path)) for path in files))


def check_collisions(spec: TableSpec, taken: Container[str]) -> None:
    """Raises ConfigError when the embeddings have a column of the same name already."""
    for name in spec.names:
        if name in taken:
            raise ConfigError(
                f"{SECTION}.columns.{name}: the images have a column {name!r} already, wanted each "
                "column from one place. Remove it here or from images.metadata."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class TableBlock:
    """Rows of one file of a table: `first` is their place in the file, `number` in the whole table."""

    path: str
    first: int
    number: int
    rows: pa.RecordBatch


def read_blocks(table: MetadataTable) -> Iterator[TableBlock]:
    """Yields the rows of all files in order, with the columns that are needed."""
    spec = table.spec
    names = list(dict.fromkeys((spec.id_column, *spec.names)))
    number = 0
    for file in table.files:
        first = 0
        for rows in _read_file(file.path, names):
            if rows.num_rows:
                yield TableBlock(file.path, first, number, rows)
                first += rows.num_rows
                number += rows.num_rows


def _read_file(path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the record batches of a file. Raises DatasetError where it cannot be read."""
    try:
        with storage.open_arrow(path) as file:
            if _is_csv(path):
                yield from _open_csv(path, file, names)
            else:
                yield from pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def _is_csv(path: str) -> bool:
    return path.lower().endswith(CSV)


def _open_csv(path: str, file: Any, names: list[str] | None) -> pv.CSVStreamingReader:
    """Opens a CSV file: every value is text, an empty one null, so that `007` stays an id."""
    if path.lower().endswith(".gz"):
        file = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "gzip")
    return pv.open_csv(
        file,
        read_options=pv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        parse_options=pv.ParseOptions(newlines_in_values=True),
        convert_options=pv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names or (), pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def unreadable(path: str, error: Exception) -> DatasetError:
    """Returns the error for a file of a table that its reader refuses."""
    kind = "CSV" if _is_csv(path) else "Parquet"
    return DatasetError(
        f"{path} ({SECTION}.paths) cannot be read as a {kind} table: {error}. Write it again."
    )


def _check_columns(spec: TableSpec, path: str) -> None:
    """Refuses a file that lacks a column or has it in a type that cannot be converted."""
    if not path.lower().endswith(PARQUET + CSV):
        raise ConfigError(
            f"{SECTION}.paths: {path} is no table by its name, wanted one that ends with "
            f"{', '.join(PARQUET + CSV)}. Name the files, or narrow the pattern."
        )
    try:
        with storage.open_arrow(path) as file:
            if _is_csv(path):
                schema = _open_csv(path, file, None).schema
                fields = [(name, pa.string()) for name in schema.names]
            else:
                fields = [(field.name, field.type) for field in pq.ParquetFile(file).schema_arrow]
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    names = [name for name, _ in fields]
    asked = [("id_column", spec.id_column, "string")]
    asked += [(f"columns.{name}", name, kind) for name, kind in spec.columns]
    for key, name, kind in asked:
        if names.count(name) != 1:
            raise ConfigError(
                f"{SECTION}.{key}: {path} has {names.count(name)} columns {name!r}, wanted one; its "
                f"columns are {', '.join(names)}. Correct the name or the table."
            )
        found = fields[names.index(name)][1]
        if not (_is_id(found) if key == "id_column" else _is_plain(found)):
            raise ConfigError(
                f"{SECTION}.{key}: {path} has {name!r} as {found}, which does not convert to {kind}. "
                "Name another column, or write it as text or numbers."
            )


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return is_text(kind) or pa.types.is_integer(kind)


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean,
             pa.types.is_null, is_text)  # fmt: skip
    return any(test(kind) for test in tests)


def refuse_changes(table: MetadataTable) -> None:
    """Raises DatasetError when a file was replaced since the table was opened."""
    for file in table.files:
        if storage.size(file.path) < 0 or storage.content_token(file.path) != file.token:
            raise DatasetError(
                f"{file.path} ({SECTION}.paths) was changed while the index was built, wanted one "
                "state of the table for the whole index. Run again; replace the table between two runs."
            )


def is_text(kind: pa.DataType) -> bool:
    """Tells whether a column holds text. Some writers of Parquet do not mark it, so bytes are text."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
             pa.types.is_binary, pa.types.is_large_binary)  # fmt: skip
    return any(test(kind) for test in tests)


def as_text(values: pa.Array) -> pa.Array:
    """Returns ids or text as Arrow strings. Raises pa.ArrowInvalid for bytes that are no UTF-8."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pa.string())
