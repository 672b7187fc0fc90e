"""Parquet files with a column of encoded images."""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from index_builder.datasets import storage
from index_builder.errors import ImageError
from transforms.sources.arrow_values import plain_column, plain_value
from transforms.sources.base import ImageRecord, ImageShard, ImageSource, UnreadableRegion
from transforms.sources.rows import FoundRow, RowNames

_BATCH_ROWS = 16
# Pages are read through a buffer of this size, rather than the images of a whole row group at once.
_BUFFER_BYTES = 1 << 20
_LISTING_THREADS = 8
_SHARD_NUMBER = re.compile(r"#\d+$")


class ParquetColumns(RowNames):
    """The names of the columns."""

    image: str = Field(
        "image",
        description="The encoded image: bytes, or a struct with the fields `bytes` and `path`, as "
        "Hugging Face writes it.",
    )


class ParquetSource(ImageSource):
    """Parquet files that hold the images; a shard is one or more row groups of a file."""

    format: Literal["parquet"]
    columns: ParquetColumns = ParquetColumns()
    rows_per_shard: int = Field(
        4096, ge=1, description="Row groups are put together up to this many rows."
    )

    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Lists ranges of row groups; a file whose footer cannot be read is one shard."""
        paths = self.find_files()
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            layouts = list(pool.map(self._ranges, paths))
        shards = []
        for path, ranges in zip(paths, layouts, strict=True):
            token = storage.content_token(path)
            for part, (start, stop) in enumerate(ranges):
                name = f"{self.label}/{self.relative(path)}#{part:05d}"
                shards.append(ImageShard(number, name, token, path, start, stop))
        return shards

    def _ranges(self, path: str) -> list[tuple[int, int]]:
        """Cuts the row groups of a file into shards."""
        with storage.open_arrow(path) as file:
            try:
                metadata = pq.ParquetFile(file).metadata
            except (pa.ArrowException, OSError) as error:
                _refuse_outage(error)
                return [(0, 0)]
        ranges = []
        start = rows = 0
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if rows and rows + size > self.rows_per_shard:
                ranges.append((start, group))
                start, rows = group, 0
            rows += size
        return [*ranges, (start, metadata.num_row_groups)]

    def read(
        self, shard: ImageShard, metadata: Mapping[str, str]
    ) -> Iterator[ImageRecord | UnreadableRegion]:
        """Yields the rows of the row groups; a row is numbered within its file.

        The rest of a row group that cannot be read is one unreadable region; the next is read.
        """
        with storage.open_arrow(shard.path) as file:
            try:
                parquet = _open(file)
            except (pa.ArrowException, OSError) as error:
                _refuse_outage(error)
                text = f"The Parquet file cannot be opened, so nothing is read from byte 0 on: {error}"
                yield UnreadableRegion(shard.name, text, 0)
                return
            for group in range(shard.start, min(shard.stop, parquet.num_row_groups)):
                yield from self._read_group(parquet, group, shard.name, metadata)

    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Reads the row groups that hold wanted rows, each up to the last of them."""
        name = _SHARD_NUMBER.sub("", source_shard)
        path = storage.join(self.base, name.removeprefix(f"{self.label}/"))
        found: dict[int, bytes] = {}
        try:
            with storage.open_arrow(path) as file:
                self._fetch_from(_open(file), source_shard, sorted(rows), found)
        except (FileNotFoundError, pa.ArrowException):  # the file was replaced since
            pass
        return found

    def _fetch_from(
        self, parquet: pq.ParquetFile, source_shard: str, rows: list[int], found: dict[int, bytes]
    ) -> None:
        for group in range(parquet.num_row_groups):
            first, count = _rows_of(parquet, group)
            wanted = {row for row in rows if first <= row < first + count}
            for record in self._read_group(parquet, group, source_shard, {}) if wanted else ():
                if isinstance(record, UnreadableRegion):
                    break
                if record.row in wanted and record.error is None:
                    found[record.row] = record.data
                if record.row >= max(wanted):
                    break

    def _read_group(
        self, parquet: pq.ParquetFile, group: int, source_shard: str, metadata: Mapping[str, str]
    ) -> Iterator[ImageRecord | UnreadableRegion]:
        first, count = _rows_of(parquet, group)
        schema = parquet.schema_arrow
        names = [name for name in self.columns.wanted(metadata) if name in schema.names]
        columns = [*names, *_image_columns(schema, self.columns.image)]
        done = 0
        error: Exception | None = None
        batches = parquet.iter_batches(
            _BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
        )
        while done < count:
            batch, size = None, count - done
            if columns:
                try:
                    batch = next(batches, None)
                    values = {} if batch is None else {n: plain_column(batch[n]) for n in names}
                except (pa.ArrowException, OSError) as problem:
                    _refuse_outage(problem)
                    batch, error = None, problem
                if batch is None:
                    break
                size = min(batch.num_rows, size)
            else:
                values = {}
            for place in range(size):
                row = first + done + place
                yield self._record(batch, values, place, source_shard, row, schema, metadata)
            done += size
        if done < count:
            offset = _offset(parquet, group)
            text = (
                f"Row group {group}, which begins at byte {offset}, cannot be read from row "
                f"{first + done} on ({count - done} of its {count} rows): "
                f"{error or 'it holds fewer rows than the footer says'}"
            )
            yield UnreadableRegion(source_shard, text, offset)

    def _record(
        self,
        batch: pa.RecordBatch | None,
        values: Mapping[str, Any],
        place: int,
        source_shard: str,
        row: int,
        schema: pa.Schema,
        metadata: Mapping[str, str],
    ) -> ImageRecord:
        name = self.columns.image

        def value_of(column: str) -> Any:
            if column not in values:
                return None
            return plain_value(values[column], place, self.columns.subject(column))

        def image() -> bytes:
            if batch is None or name not in batch.schema.names:
                raise ImageError("missing_image", self.columns.lacks(found, "image", name, "image"))
            data = _image_bytes(batch[name], place, self.columns.subject(name))
            if data is None:
                raise ImageError("missing_image", f"{self.columns.subject(name)} is null in this row.")
            return data

        found = FoundRow(source_shard, row, value_of, image, lambda: schema.names)
        return self.columns.record(found, metadata)


def _open(file: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(
        file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
    )


def _refuse_outage(error: Exception) -> None:
    """Raises the error again where it is the system's: the file may be whole, so it is no region."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _rows_of(parquet: pq.ParquetFile, group: int) -> tuple[int, int]:
    """Returns the number of a row group's first row in the file, and how many it has."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(group + 1)]
    return sum(sizes[:-1]), sizes[-1]


def _offset(parquet: pq.ParquetFile, group: int) -> int:
    """Returns the byte of the file at which a row group begins."""
    metadata = parquet.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    pages = [(chunk.dictionary_page_offset, chunk.data_page_offset) for chunk in chunks]
    return int(min(place for both in pages for place in both if place))


def _image_columns(schema: pa.Schema, name: str) -> list[str]:
    """Returns what to read of the image's column: of a struct its bytes alone."""
    if name not in schema.names:
        return []
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return [f"{name}.bytes"]
    return [name]


def _image_bytes(column: pa.Array, place: int, subject: str) -> bytes | None:
    value = plain_value(column, place, subject)
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or isinstance(value, bytes):
        return value
    raise ImageError(
        "missing_image",
        f"{subject} holds {column.type}, wanted bytes or a struct with the field `bytes`. "
        "Set images.sources.columns.image.",
    )
