"""Writing the rows of one part of the embeddings dataset, in row groups of a fixed size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings
from transforms.reuse import FoundVector
from transforms.sources.base import ImageRecord


class PartSink:
    """Collects rows and writes them in full row groups; `rows` counts all that were added.

    Memory: one row group of vectors and what is kept of its images.
    """

    def __init__(self, schema: embeddings.EmbeddingSchema, writer: pq.ParquetWriter) -> None:
        self.rows = 0
        self._schema = schema
        self._writer = writer
        self._vectors: NDArray[np.floating[Any]] = np.empty(
            (embeddings.ROW_GROUP_ROWS, schema.dim), schema.dtype
        )
        self._images: list[tuple[ImageRecord, bytes, FoundVector]] = []

    def add(self, record: ImageRecord, digest: bytes, found: FoundVector) -> None:
        """Adds one row; writes a row group once there are enough rows for one."""
        self._vectors[len(self._images)] = found.vector
        self._images.append((record, digest, found))
        self.rows += 1
        if len(self._images) == len(self._vectors):
            self.finish()

    def finish(self) -> None:
        """Writes the rows that are left."""
        images = self._images
        if not images:
            return
        columns: dict[str, Sequence[object]] = {
            "image_id": [record.image_id for record, _, _ in images],
            "item_id": [record.item_id or record.image_id for record, _, _ in images],
            "content_sha256": [digest for _, digest, _ in images],
            "source_shard": [record.source_shard for record, _, _ in images],
            "row": [record.row for record, _, _ in images],
            "width": [found.width for _, _, found in images],
            "height": [found.height for _, _, found in images],
            "format": [found.format for _, _, found in images],
        }
        for name, _ in self._schema.metadata:
            columns[name] = [record.metadata.get(name) for record, _, _ in images]
        self._writer.write_table(self._schema.table(self._vectors[: len(images)], columns))
        self._images = []
