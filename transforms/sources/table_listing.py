"""A table of images, Parquet or CSV, written again as a listing that workers read in ranges.

The listing is Parquet with row groups of exactly one shard each; values are bytes, numbers or
booleans (see `arrow_values`). A line of a CSV file that does not fit its header keeps its place, as a
row of nulls with the reason beside it.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from index_builder.datasets import storage
from index_builder.errors import ConfigError, KithError
from transforms.sources.arrow_values import plain_column
from transforms.sources.byte_stream import GZIP_MAGIC

# Why a row could not be read; null in every other.
PROBLEM = "__problem__"
# Raised when the same table gives another listing than before.
REVISION = 1

_PARQUET_MAGIC = b"PAR1"
_CSV_BLOCK_BYTES = 8 << 20
_BATCH_ROWS = 4096
_SHOWN_TEXT = 200


def write_listing(table: str, listing: str, rows: int, delimiter: str, needed: Iterable[str]) -> None:
    """Writes the listing of a table, in row groups of `rows`.

    Raises ConfigError where the table lacks a column of `needed`, KithError where it cannot be read.
    """
    with storage.local_copy(table) as local, _readable(table):
        blocks = _read_table(table, local, delimiter)
        first = next(blocks)
        _check_columns(table, first.schema, needed)
        with (
            storage.atomic_path(listing) as temporary,
            pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer,
        ):
            for group in _regroup(first, blocks, rows):
                writer.write_table(group, row_group_size=rows)


def read_rows(table: str, delimiter: str, wanted: set[int]) -> Iterator[tuple[int, pa.Table]]:
    """Yields some rows of a table itself: their number and a table of one row. Raises KithError."""
    row = 0
    with storage.local_copy(table) as local, _readable(table):
        for block in _read_table(table, local, delimiter):
            for number in sorted(n for n in wanted if row <= n < row + block.num_rows):
                yield number, block.slice(number - row, 1)
            row += block.num_rows
            if row > max(wanted):
                return


def _read_table(table: str, local: str, delimiter: str) -> Iterator[pa.Table]:
    """Yields the rows in order, plain; the first block may be empty and has the schema."""
    with open(local, "rb") as file:
        head = file.read(len(_PARQUET_MAGIC))
    if head != _PARQUET_MAGIC:
        packed = "gzip" if head.startswith(GZIP_MAGIC) else None
        yield from _read_csv(table, local, packed, delimiter)
        return
    with storage.open_arrow(local) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        yield _plain(parquet.schema_arrow.empty_table(), None)
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            yield _plain(pa.Table.from_batches([batch]), None)


def _plain(rows: pa.Table, problem: bytes | None) -> pa.Table:
    columns = {name: plain_column(column) for name, column in zip(rows.schema.names, rows, strict=True)}
    columns[PROBLEM] = pa.array([problem] * rows.num_rows, pa.binary())
    return pa.table(columns)


def _read_csv(table: str, local: str, packed: str | None, delimiter: str) -> Iterator[pa.Table]:
    """Yields the rows of a CSV file: text as bytes, an empty field as null."""
    misfits: deque[tuple[int, bytes]] = deque()

    def note(row: Any) -> str:
        # Numbers begin with the header, which is 1.
        text = (
            f"Line {row.number} of the table has {row.actual_columns} fields, wanted "
            f"{row.expected_columns}: {row.text[:_SHOWN_TEXT]!r}"
        )
        misfits.append((row.number - 2, text.encode("utf-8", "backslashreplace")))
        return "skip"

    def open_csv(types: dict[str, pa.DataType]) -> Any:
        misfits.clear()
        return pv.open_csv(
            pa.input_stream(local, compression=packed),
            # One thread, so that the numbers of lines are known.
            pv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
            pv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
            pv.ConvertOptions(
                check_utf8=False, column_types=types, null_values=[""], strings_can_be_null=True
            ),
        )

    with open_csv({}) as reader:
        names = reader.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{table} has the column {twice[0]!r} {names.count(twice[0])} times, wanted each once. "
            "Rename one."
        )
    with open_csv(dict.fromkeys(names, pa.binary())) as reader:
        yield _plain(reader.schema.empty_table(), None)
        row = 0
        for batch in reader:
            block = pa.Table.from_batches([batch])
            pieces = []
            while misfits and misfits[0][0] <= row + block.num_rows:
                ahead = misfits[0][0] - row
                pieces += [
                    _plain(block.slice(0, ahead), None),
                    _misfit(block.schema, misfits.popleft()[1]),
                ]
                block = block.slice(ahead)
                row += ahead + 1
            row += block.num_rows
            yield pa.concat_tables([*pieces, _plain(block, None)])
        for _, problem in misfits:
            yield _misfit(reader.schema, problem)


def _misfit(schema: pa.Schema, problem: bytes) -> pa.Table:
    nulls = pa.table({field.name: pa.nulls(1, field.type) for field in schema})
    return _plain(nulls, problem)


def _check_columns(table: str, schema: pa.Schema, needed: Iterable[str]) -> None:
    columns = [name for name in schema.names if name != PROBLEM]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ConfigError(
            f"{table} has the columns {', '.join(map(repr, columns))}, wanted also {missing[0]!r}. "
            "Set images.sources.columns, or images.sources.delimiter of a CSV file."
        )


def _regroup(first: pa.Table, blocks: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Cuts blocks of any length into tables of `rows`, the last one shorter."""
    waiting = first
    for block in blocks:
        waiting = pa.concat_tables([waiting, block])
        whole = waiting.num_rows // rows * rows
        for start in range(0, whole, rows):
            yield waiting.slice(start, rows)
        waiting = waiting.slice(whole)
    if waiting.num_rows:
        yield waiting


@contextlib.contextmanager
def _readable(table: str) -> Iterator[None]:
    """Turns Arrow's errors about a table into KithError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Some of Arrow's errors of damage are OSErrors; the system's have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise KithError(
            f"{table} cannot be read as a table, wanted Parquet or CSV: {error}. Write it again, or "
            "name another file in images.sources.paths."
        ) from error
