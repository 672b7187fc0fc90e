"""Tables that name images: Parquet or CSV, one row an image, fetched by the workers."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from index_builder.datasets import storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.errors import ImageError, KithError
from transforms.sources import table_listing
from transforms.sources.arrow_values import plain_value
from transforms.sources.base import ImageRecord, ImageShard, ImageSource
from transforms.sources.conversion import text_of
from transforms.sources.fetching import fetch_bytes, local_path, map_in_order, try_again
from transforms.sources.rows import FoundRow, RowNames


class TableColumns(RowNames):
    """The names of the columns."""

    uri: str = Field(
        "uri",
        description="Where the image is: a path, relative to the table's folder, or a URL such as "
        "`gs://`.",
    )
    version: str | None = Field(
        None,
        description="A column whose value changes when the image does (an ETag, a time). Without it, "
        "and where it is null, every run looks at each image; one that is neither local nor in `gs://` "
        "is read for it.",
    )


class TableSource(ImageSource):
    """Parquet or CSV tables of image URIs; a shard is a range of rows of one table."""

    speed_settings: ClassVar[frozenset[str]] = frozenset(
        {"fetch_threads", "fetch_attempts", "fetch_backoff_sec"}
    )

    format: Literal["table"]
    columns: TableColumns = TableColumns()
    delimiter: str = Field(",", min_length=1, max_length=1, description="What separates fields in CSV.")
    rows_per_shard: int = Field(1024, ge=1, description="Images in one shard.")
    fetch_threads: int = Field(16, ge=1, le=256, description="Images that are fetched at a time.")
    fetch_attempts: int = Field(
        3, ge=1, le=100, description="Attempts at an image, unless another one is useless."
    )
    fetch_backoff_sec: float = Field(
        0.5, ge=0, description="Pause before the second attempt; it doubles with each."
    )

    def list_shards(self, number: int, scratch: str) -> list[ImageShard]:
        """Writes each table's listing, named by its content, and cuts it into shards.

        Raises ConfigError where a table lacks a column, KithError where it cannot be read.
        """
        names = self.columns
        needed = [names.image_id, names.uri, names.item_id, names.version]
        shards = []
        for path in self.find_files():
            recipe = [table_listing.REVISION, self.rows_per_shard, self.delimiter]
            content = fingerprint([storage.content_token(path), *recipe])
            listing = storage.join(scratch, f"{self.label}-{content[:16]}.parquet")
            # A listing that is there may be of other columns.
            if not storage.exists(listing) or not self._has(listing, needed):
                table_listing.write_listing(
                    path, listing, self.rows_per_shard, self.delimiter, [n for n in needed if n]
                )
            with storage.open_arrow(listing) as file:
                parquet = pq.ParquetFile(file)
                for group in range(max(1, parquet.num_row_groups)):
                    start = group * self.rows_per_shard
                    stop = min(start + self.rows_per_shard, parquet.metadata.num_rows)
                    rows = parquet.read_row_group(group) if stop > start else None
                    name = f"{self.label}/{self.relative(path)}#{group:05d}"
                    token = self._token(path, rows)
                    shards.append(ImageShard(number, name, token, listing, start, stop))
        return shards

    def _has(self, listing: str, needed: Sequence[str | None]) -> bool:
        with storage.open_arrow(listing) as file:
            return set(pq.read_schema(file).names).issuperset(name for name in needed if name)

    def _token(self, path: str, rows: pa.Table | None) -> str:
        """Returns what changes when the values of some rows do, or an image that they name."""
        digest = hashlib.sha256()
        if rows is not None:
            for name, column in sorted(zip(rows.schema.names, rows, strict=True)):
                values = [_value_or_problem(column, row) for row in range(rows.num_rows)]
                digest.update(repr((name, values)).encode("utf-8", "backslashreplace"))
            tokens = map_in_order(
                lambda row: self._image_token(path, rows, row),
                range(rows.num_rows),
                self.fetch_threads,
                4 * self.fetch_threads,
            )
            digest.update(repr(list(tokens)).encode())
        return "sha256:" + digest.hexdigest()

    def _image_token(self, path: str, rows: pa.Table, row: int) -> str:
        """Returns the token of an image that its table gives no version of."""
        version = self.columns.version
        if version is not None and rows[version][row].is_valid:
            return ""
        try:
            uri = self._locate(path, rows, row)
            return try_again(
                lambda: storage.content_token(uri), uri, self.fetch_attempts, self.fetch_backoff_sec
            )
        except ImageError as error:
            return error.reason

    def read(self, shard: ImageShard, metadata: Mapping[str, str]) -> Iterator[ImageRecord]:
        """Yields one record a row, in order; a row is numbered within its table."""
        if shard.stop <= shard.start:
            return
        with storage.open_arrow(shard.path) as file:
            rows = pq.ParquetFile(file).read_row_group(shard.start // self.rows_per_shard)
        yield from map_in_order(
            lambda place: self._record(shard.name, rows, place, shard.start + place, metadata),
            range(rows.num_rows),
            self.fetch_threads,
            2 * self.fetch_threads,
        )

    def fetch(self, source_shard: str, rows: Sequence[int]) -> dict[int, bytes]:
        """Looks a few rows up in the table itself and fetches their images."""
        path = self._table_of(source_shard)
        try:
            records = list(
                map_in_order(
                    lambda item: self._record(source_shard, item[1], 0, item[0], {}),
                    table_listing.read_rows(path, self.delimiter, set(rows)),
                    self.fetch_threads,
                    2 * self.fetch_threads,
                )
            )
        except (FileNotFoundError, KithError):  # the table was replaced since
            return {}
        return {record.row: record.data for record in records if record.error is None}

    def _table_of(self, source_shard: str) -> str:
        name = source_shard.rpartition("#")[0].removeprefix(f"{self.label}/")
        return storage.join(self.base, name)

    def _record(
        self, source_shard: str, rows: pa.Table, place: int, row: int, metadata: Mapping[str, str]
    ) -> ImageRecord:
        problem = rows[table_listing.PROBLEM][place].as_py()
        if problem is not None:
            return ImageRecord(None, source_shard, row, error=ImageError("bad_row", problem.decode()))

        def value_of(name: str) -> Any:
            if name not in rows.schema.names:
                return None
            return plain_value(rows[name], place, self.columns.subject(name))

        def image() -> bytes:
            uri = self._locate(self._table_of(source_shard), rows, place)
            return fetch_bytes(uri, self.fetch_attempts, self.fetch_backoff_sec)

        found = FoundRow(source_shard, row, value_of, image, lambda: rows.schema.names[:-1])
        return self.columns.record(found, metadata)

    def _locate(self, table: str, rows: pa.Table, place: int) -> str:
        """Returns where the image of a row is. Raises ImageError."""
        name = self.columns.uri
        subject = self.columns.subject(name)
        value = plain_value(rows[name], place, subject) if name in rows.schema.names else None
        uri = text_of(value, subject) if isinstance(value, bytes) else None
        if not uri:
            raise ImageError("missing_image", f"{subject} is {value!r}, wanted where the image is.")
        if storage.is_remote(uri) or uri.startswith("/"):
            return local_path(uri)
        return storage.join(table.rpartition("/")[0], uri)


def _value_or_problem(column: Any, row: int) -> Any:
    """Returns a value for a token; one that Python lacks is stood for by Arrow's text."""
    try:
        return plain_value(column, row, "")
    except ImageError:
        return str(column[row])
