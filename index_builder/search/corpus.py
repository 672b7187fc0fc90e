"""An embeddings dataset as something to search in: rows with their metadata, wherever that is kept."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, storage
from index_builder.datasets.manifests import Part
from index_builder.datasets.metadata_table import look_up
from index_builder.datasets.table_files import MetadataTable
from index_builder.rules.rules import IMAGE


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An embeddings dataset, and the metadata table that has more of its columns."""

    folder: str
    parts: tuple[Part, ...]
    metadata: MetadataTable | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that rows may be read with."""
        path = storage.join(self.folder, self.parts[0].file(".parquet").path)
        with storage.open_arrow(path) as file:
            own = pq.read_schema(file).names
        return own if self.metadata is None else [*own, *self.metadata.spec.names]

    def read_ids(self, number: int) -> pa.ChunkedArray:
        """Returns the image ids of a part, in order."""
        path = storage.join(self.folder, self.parts[number].file(".parquet").path)
        with storage.open_arrow(path) as file:
            return pq.read_table(file, columns=[IMAGE])[IMAGE]

    def read_rows(self, number: int, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Reads some rows of a part (ascending): image_id, vector and these columns."""
        own, _ = self._split(columns)
        table = embeddings.read_rows(self.folder, self.parts[number], rows, own)
        return self._complete(table, columns)

    def read_blocks(self, number: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yields the same columns of all rows of a part, block by block, after checking the file."""
        own, foreign = self._split(columns)
        blocks = embeddings.read_part(self.folder, self.parts[number], own)
        if foreign:
            # The table is streamed once a call, so it is asked for the whole part.
            blocks = iter([pa.concat_tables(list(blocks))])
        for block in blocks:
            yield self._complete(block, columns)

    def _split(self, columns: Sequence[str]) -> tuple[list[str], list[str]]:
        """Splits columns into those of the embeddings and those of the metadata table."""
        foreign = [] if self.metadata is None else [c for c in columns if c in self.metadata.spec.names]
        key = [] if not foreign or self.metadata is None else [self.metadata.spec.key]
        own = [IMAGE, "vector", *key, *(name for name in columns if name not in foreign)]
        return list(dict.fromkeys(own)), foreign

    def _complete(self, table: pa.Table, columns: Sequence[str]) -> pa.Table:
        _, foreign = self._split(columns)
        if foreign and self.metadata is not None:
            found = look_up(self.metadata, table[self.metadata.spec.key].combine_chunks())
            for name in foreign:
                table = table.append_column(found.columns.schema.field(name), found.columns[name])
        return table.select(list(dict.fromkeys([IMAGE, "vector", *columns])))
