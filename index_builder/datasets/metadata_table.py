"""The values that a metadata table has for the rows of an index shard.

The table is streamed once for every shard: memory is the shard's values, and about as many rows of the
table as the shard has. What is taken is converted to its configured type, without loss or not at all.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_builder.datasets.embeddings import METADATA_TYPES
from index_builder.datasets.table_files import (
    BATCH_ROWS,
    SECTION,
    MetadataTable,
    TableBlock,
    TableSpec,
    as_text,
    is_text,
    read_blocks,
    refuse_changes,
    unreadable,
)
from index_builder.errors import DatasetError


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """What a table says of n ids.

    `columns` has n rows, null where the table does not have the id. `matched` counts the ids that it
    has. `used` int64 are the numbers of the table's rows that were taken, ascending, counted over all
    files; `table_rows` is how many there are.
    """

    columns: pa.Table
    matched: int
    used: NDArray[np.int64]
    table_rows: int


def look_up(table: MetadataTable, ids: pa.Array) -> Lookup:
    """Returns the table's values for ids (strings without null; an id may occur several times).

    Rows of the table with other ids are ignored, whatever they hold. Raises DatasetError when one of
    the ids is in the table twice, when one of their values does not convert to its type, when a file
    cannot be read or is no longer what the MetadataTable says.
    """
    encoded = ids.dictionary_encode()
    values = _Values(table.spec, encoded.dictionary)
    blocks = read_blocks(table)
    for gathered in _gather(blocks, max(len(encoded.dictionary), BATCH_ROWS)):
        values.add(gathered)
    refuse_changes(table)
    return values.finish(encoded.indices.to_numpy())


class _Values:
    """The values of the wanted ids, collected block by block."""

    def __init__(self, spec: TableSpec, wanted: pa.Array) -> None:
        self._spec = spec
        self._wanted = wanted
        # Number of the table's row that has a wanted id; -1 while none was seen.
        self._row_of = np.full(len(wanted), -1, dtype=np.int64)
        self._numbers: list[NDArray[np.int64]] = []
        self._arrays: dict[str, list[pa.Array]] = {name: [] for name in spec.names}
        # Where each file starts, for messages: (number of its first row, path).
        self._starts: list[tuple[int, str]] = []
        self._table_rows = 0

    def add(self, blocks: Sequence[TableBlock]) -> None:
        """Takes what is wanted from blocks that follow one another in the table."""
        self._starts += [(block.number, block.path) for block in blocks if block.first == 0]
        last = blocks[-1]
        self._table_rows = last.number + last.rows.num_rows
        ids = pa.chunked_array([self._ids(block) for block in blocks], pa.string())
        found = pc.index_in(ids, value_set=self._wanted)
        hits = np.flatnonzero(found.is_valid().to_numpy())
        if not len(hits):
            return
        wanted = found.drop_null().to_numpy().astype(np.int64)
        self._place(wanted, hits + blocks[0].number)
        self._numbers.append(wanted)
        for block in blocks:
            start = block.number - blocks[0].number
            bounds = np.searchsorted(hits, [start, start + block.rows.num_rows])
            if bounds[0] < bounds[1]:
                taken = block.rows.take(pa.array(hits[bounds[0] : bounds[1]] - start))
                places = hits[bounds[0] : bounds[1]] - start + block.first
                for name, kind in self._spec.columns:
                    self._arrays[name].append(self._converted(taken, name, kind, block.path, places))

    def _ids(self, block: TableBlock) -> pa.Array:
        try:
            return as_text(block.rows.column(self._spec.id_column))
        except pa.ArrowException as error:
            raise unreadable(block.path, error) from error

    def _place(self, wanted: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        """Notes which row of the table each id was found in. Raises DatasetError for a second one."""
        earlier = self._row_of[wanted]
        self._row_of[wanted] = numbers
        # Of several assignments to one place the last stays.
        repeated = (earlier >= 0) | (self._row_of[wanted] != numbers)
        if repeated.any():
            row = int(np.flatnonzero(repeated)[0])
            here = numbers[wanted == wanted[row]].tolist()
            rows = here if earlier[row] < 0 else [int(earlier[row]), *here]
            raise DatasetError(
                f"The {self._spec.id_column} {self._wanted[wanted[row]].as_py()!r} is in the table of "
                f"{SECTION} more than once: {self._describe(rows[0])} and {self._describe(rows[1])} "
                "(counted from 0), wanted each id once. Remove one of the rows."
            )

    def _describe(self, number: int) -> str:
        start, path = max(item for item in self._starts if item[0] <= number)
        return f"{path} row {number - start}"

    def _converted(
        self, rows: pa.RecordBatch, name: str, kind: str, path: str, places: NDArray[np.int64]
    ) -> pa.Array:
        """Converts a column. Raises DatasetError naming the first value that does not convert."""
        values = rows.column(name)
        try:
            return convert_values(values, kind)
        except pa.ArrowException as error:
            bad = _first_bad(values, kind)
            found = as_text(rows.column(self._spec.id_column))[bad].as_py()
            raise DatasetError(
                f"{path} row {places[bad]} (counted from 0): {self._spec.id_column} {found!r} has "
                f"{name} {_shown(values[bad])}, wanted {kind} ({SECTION}.columns.{name}). Correct the "
                "value there; leave it empty where it is not known."
            ) from error

    def finish(self, indices: NDArray[np.int32]) -> Lookup:
        """Returns the values of the ids, given as places in the wanted ones."""
        order = np.full(len(self._wanted), -1, dtype=np.int64)
        numbers = np.concatenate([np.empty(0, np.int64), *self._numbers])
        order[numbers] = np.arange(len(numbers))
        rows = order[indices]
        taken = pa.array(rows, mask=rows < 0)
        columns = {}
        for name, kind in self._spec.columns:
            values = pa.chunked_array(self._arrays[name], METADATA_TYPES[kind]).combine_chunks()
            columns[name] = values.take(taken)
        used = np.sort(self._row_of[self._row_of >= 0])
        return Lookup(pa.table(columns), int((rows >= 0).sum()), used, self._table_rows)


def convert_values(values: pa.Array, kind: str) -> pa.Array:
    """Converts a column of a table to one of METADATA_TYPES without loss.

    Text is trimmed for numbers and truth values, and null where nothing is left of it; a whole number
    may be written `12.0`, a truth value `true`, `false`, `1` or `0`. Raises pa.ArrowException where
    something does not convert.
    """
    wanted = METADATA_TYPES[kind]
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if is_text(values.type):
        values = as_text(values)
        if kind == "string":
            values.validate(full=True)
            return values
        values = pc.utf8_trim_whitespace(values)
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        if kind == "int64":
            values = pc.replace_substring_regex(values, r"^([+-]?\d+)\.0*$", r"\1")
            values = pc.replace_substring_regex(values, r"^\+", "")
        return values.cast(wanted)
    if kind == "bool" and not pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
        if pc.any(pc.invert(pc.is_in(values, value_set=pa.array([0, 1, None], pa.int64())))).as_py():
            raise pa.ArrowInvalid("a number that is neither 0 nor 1 is no truth value")
    return values.cast(wanted)


def _first_bad(values: pa.Array, kind: str) -> int:
    """Returns the place of the first value that does not convert, by halving; there must be one."""
    start, stop = 0, len(values)
    while stop - start > 1:
        middle = (start + stop) // 2
        try:
            convert_values(values[start:middle], kind)
            start = middle
        except pa.ArrowException:
            stop = middle
    return start


def _shown(value: pa.Scalar) -> str:
    try:
        return repr(value.as_py())
    except UnicodeDecodeError:
        return repr(value.as_buffer().to_pybytes())


def _gather(blocks: Iterator[TableBlock], rows: int) -> Iterator[list[TableBlock]]:
    """Yields blocks in groups of at least some rows: a look-up costs a pass over the wanted ids."""
    gathered: list[TableBlock] = []
    for block in blocks:
        gathered.append(block)
        if block.number + block.rows.num_rows - gathered[0].number >= rows:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def count_used(used: Iterable[NDArray[np.int64]], table_rows: int) -> int:
    """Counts the rows of a table that at least one index shard took."""
    taken = np.zeros(table_rows, dtype=bool)
    for rows in used:
        taken[rows] = True
    return int(taken.sum())
