"""The embeddings dataset: its Arrow schema, and blocks of vectors to and from it.

The vector is the encoder's own output: L2-normalised and rounded to float16, or, where lengths count,
its float32 numbers as they are. PCA and whitening belong to the index, so a catalogue can be indexed
another way without being encoded again.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import manifests, storage
from index_builder.errors import DatasetError

KIND = "embeddings"
ROW_GROUP_ROWS = 4096

# Types a metadata column may have, by the name the configuration uses.
METADATA_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}

# Columns every embeddings dataset has beside the vector; a metadata column may not use these names.
IDENTITY_FIELDS = (
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("item_id", pa.string(), nullable=False),
)
ORIGIN_FIELDS = (
    pa.field("content_sha256", pa.binary(32), nullable=False),
    pa.field("source_shard", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("format", pa.string(), nullable=False),
)
# The index adds columns of its own, and `query_id`, `neighbor_ids` and `neighbor_rows` of a join would
# meet those that carry a column named `id`, `ids` or `rows`.
_INDEX_COLUMNS = ("list", "code", "probes", "squared_norm", "id", "ids", "rows")
RESERVED_COLUMNS = frozenset(
    ["vector", *(field.name for field in (*IDENTITY_FIELDS, *ORIGIN_FIELDS)), *_INDEX_COLUMNS]
)


@dataclasses.dataclass(frozen=True)
class EmbeddingSchema:
    """The columns of an embeddings dataset: dim of the vector, metadata as (name, type) pairs.

    Vectors are float16 of unit length where `normalize` is true, else the encoder's own float32.
    """

    dim: int
    metadata: tuple[tuple[str, str], ...] = ()
    normalize: bool = True

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """The type of the vector's numbers."""
        return vector_dtype(self.normalize)

    def arrow(self) -> pa.Schema:
        """Returns the Arrow schema of a part."""
        numbers = pa.from_numpy_dtype(self.dtype)
        vector = pa.field("vector", pa.list_(numbers, self.dim), nullable=False)
        extra = [pa.field(name, METADATA_TYPES[kind]) for name, kind in self.metadata]
        return pa.schema([*IDENTITY_FIELDS, vector, *ORIGIN_FIELDS, *extra])

    def table(
        self, vectors: NDArray[np.floating[Any]], columns: Mapping[str, Sequence[Any]]
    ) -> pa.Table:
        """Builds a block of the dataset.

        `vectors` is [n, dim]; `columns` holds n values for every other column. Raises ValueError when
        the vectors have another dim or type.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"vectors have shape {vectors.shape}, wanted [n, {self.dim}]")
        if vectors.dtype != self.dtype:
            raise ValueError(f"vectors are {vectors.dtype}, wanted {np.dtype(self.dtype)}")
        schema = self.arrow()
        arrays = [
            list_array(vectors) if field.name == "vector" else pa.array(columns[field.name], field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def vector_dtype(normalize: bool) -> type[np.floating[Any]]:
    """Returns the type of a dataset's vectors: float16 where they have unit length, else float32."""
    return np.float16 if normalize else np.float32


def list_array(vectors: NDArray[Any]) -> pa.FixedSizeListArray:
    """Wraps an array [n, length] as an Arrow column without copying the numbers."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def list_matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Returns a fixed-size-list column as an array [n, length] of its value type."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    matrix: NDArray[Any] = flat.reshape(-1, column.type.list_size)
    return matrix


def describe_schema(schema: pa.Schema) -> list[dict[str, str]]:
    """Returns a schema as a manifest holds it."""
    return [{"name": field.name, "type": str(field.type)} for field in schema]


def column_types(schema: Sequence[Mapping[str, str]]) -> dict[str, pa.DataType]:
    """Returns the columns of a manifest's schema that hold one value a row, with their types."""
    plain = [field for field in schema if "[" not in field["type"] and "<" not in field["type"]]
    return {field["name"]: pa.type_for_alias(field["type"]) for field in plain}


def parquet_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    """Opens a Parquet file for a block dataset.

    Only strings are dictionary-encoded and compressed well; vectors of float16 barely compress, so
    they are left plain, which keeps writing at the speed of the disk.
    """
    plain = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    names = [field.name for field in schema if field.name not in plain]
    compression = dict.fromkeys(names, "ZSTD")
    compression |= {f"{name}.list.element": "NONE" for name in plain}
    return pq.ParquetWriter(
        path, schema, compression=compression, use_dictionary=names, write_statistics=["image_id"]
    )


def load_dim(manifest: manifests.Manifest) -> int:
    """Returns the dim that a manifest states. Raises DatasetError when it states none."""
    dim = manifest.properties.get("dim")
    if not isinstance(dim, int) or dim < 1:
        raise DatasetError(
            f"The embeddings manifest states dim {dim!r}, wanted a positive whole number. "
            "Make the embeddings again."
        )
    return dim


def read_part(
    folder: str,
    part: manifests.Part,
    columns: Sequence[str] | None = None,
    *,
    verify: bool = True,
) -> Iterator[pa.Table]:
    """Yields a part's row groups in order, after checking the file against its checksum.

    Without `verify`, for a look at a few columns before the work, the checksum is left to the work.
    A part without rows (every image failed) yields one empty block, so that its columns are known.
    Raises DatasetError where the file is missing, changed, damaged, or lacks a column.
    """
    file_of = part.file(".parquet")
    path = manifests.verify_file(folder, file_of) if verify else storage.join(folder, file_of.path)
    with storage.open_arrow(path) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{path} is not a Parquet file: {error}. Make it again.") from error
        names = parquet.schema_arrow.names
        missing = [name for name in columns or () if name not in names]
        if missing:
            raise DatasetError(
                f"{path} has no column {missing[0]}, only {', '.join(names)}. Make the dataset again."
            )
        if parquet.num_row_groups == 0:
            empty = parquet.schema_arrow.empty_table()
            yield empty if columns is None else empty.select(columns)
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group, columns=columns)
            except (pa.ArrowException, OSError) as error:
                what = " ".join(str(error).split())
                raise DatasetError(f"{path} is damaged: {what.rstrip('.')}. Make it again.") from error
            yield table


def read_metadata(folder: str, part: manifests.Part) -> pq.FileMetaData:
    """Returns what a part's file says of itself."""
    with storage.open_arrow(storage.join(folder, part.file(".parquet").path)) as file:
        return pq.read_metadata(file)


def read_row_group(
    folder: str,
    part: manifests.Part,
    metadata: pq.FileMetaData,
    group: int,
    columns: Sequence[str],
) -> pa.Table:
    """Reads columns of one row group of a part, for callers that read several at the same time."""
    with storage.open_arrow(storage.join(folder, part.file(".parquet").path)) as file:
        return pq.ParquetFile(file, metadata=metadata).read_row_group(group, columns=columns)


def read_rows(
    folder: str, part: manifests.Part, rows: NDArray[np.int64], columns: Sequence[str]
) -> pa.Table:
    """Reads single rows of a part (ascending row numbers), one row group at a time."""
    path = storage.join(folder, part.file(".parquet").path)
    with storage.open_arrow(path) as file:
        parquet = pq.ParquetFile(file)
        tables = [parquet.schema_arrow.empty_table().select(columns)]
        start = 0
        for group in range(parquet.num_row_groups):
            stop = start + parquet.metadata.row_group(group).num_rows
            wanted = rows[(rows >= start) & (rows < stop)] - start
            if len(wanted):
                tables.append(parquet.read_row_group(group, columns=columns).take(wanted))
            start = stop
    return pa.concat_tables(tables)
