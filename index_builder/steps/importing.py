"""Making an embeddings dataset of vectors that were made elsewhere: Parquet files, or an array.

Rows are streamed in blocks and written in parts of bounded size, so memory does not grow with the
input. What cannot be compared or named (NaN, a zero vector, another dim, an id that is missing or
occurs twice) is refused with its place, and then nothing is left behind.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.embeddings import ROW_GROUP_ROWS, EmbeddingSchema
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.metadata_table import convert_values
from index_builder.datasets.table_files import as_text
from index_builder.datasets.unique_ids import check_unique_ids
from index_builder.datasets.vector_files import (
    VectorBlock,
    VectorColumns,
    check_names,
    find_vector_files,
    metadata_kind,
    place_of,
    read_schema,
)
from index_builder.errors import ConfigError, DatasetError
from index_builder.scoring.vectors import unit_float16

# Raised when the same input gives other bytes than before.
REVISION = 1
# Vectors of one part; the unit of work of a build.
_PART_BYTES = 128 << 20
_ARRAY = "array"


def import_vectors(
    paths: str | Sequence[str],
    folder: str,
    *,
    id_column: str = "id",
    vector_column: str = "vector",
    item_column: str | None = None,
    columns: Sequence[str] | None = None,
    normalize: bool = True,
    encoder: str = "imported",
) -> str:
    """Makes an embeddings dataset of Parquet files; returns its folder.

    `paths` are files or globs. The id is text or a whole number; the vector a list of float16, float32
    or float64, of one length. `item_column` names the item that a row shows (default: its own id).
    `columns` become metadata, by default all that are left. With `normalize` vectors are brought to
    unit length (float16), as the cosine wants; without, they are kept as float32, for the other
    metrics. `encoder` is the name of what made the vectors: only vectors of one name are compared.

    A folder that holds the same import already is left as it is. Raises ConfigError for files and
    columns that are not there or of the wrong type, DatasetError for rows that cannot be taken and for
    a folder that holds something else.
    """
    files = find_vector_files([paths] if isinstance(paths, str) else paths)
    asked = VectorColumns(
        id_column, vector_column, item_column, None if columns is None else tuple(columns)
    )
    first = read_schema(files[0])
    asked.check(files[0], first, {})
    kinds = asked.metadata(files[0], first)
    for file in files:
        asked.check(file, read_schema(file), kinds)
    tokens = storage.content_tokens(files)
    options = dataclasses.asdict(asked) | {"kinds": kinds, "places": [place_of(file) for file in files]}
    return _import(folder, asked.read(files, kinds), kinds, normalize, encoder, [tokens, options])


def import_arrays(
    vectors: NDArray[np.floating[Any]],
    ids: Sequence[Any],
    folder: str,
    *,
    items: Sequence[Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    normalize: bool = True,
    encoder: str = "imported",
) -> str:
    """Makes an embeddings dataset of an array [n, dim] (mapped from a file, too) and n ids.

    `items` and each of `columns` hold n values; the rest is as in `import_vectors`.
    """
    if vectors.ndim != 2 or not vectors.shape[1] or not np.issubdtype(vectors.dtype, np.floating):
        raise ConfigError(
            f"The vectors are {vectors.dtype} {list(vectors.shape)}, wanted floats [n, dim], dim at "
            "least 1. Convert them."
        )
    named = {"ids": ids, "items": ids if items is None else items, **(columns or {})}
    table = {}
    for name, values in named.items():
        if len(values) != len(vectors):
            raise ConfigError(
                f"{name} has {len(values)} values for {len(vectors)} vectors, wanted one each."
            )
        table[name] = pa.array(values)
    kinds = {name: metadata_kind(_ARRAY, name, table[name].type) for name in columns or {}}
    check_names(_ARRAY, kinds)

    def blocks() -> Iterator[VectorBlock]:
        for start in range(0, len(vectors), ROW_GROUP_ROWS):
            part = {name: values.slice(start, ROW_GROUP_ROWS) for name, values in table.items()}
            yield VectorBlock(
                _ARRAY, start, part["ids"], part["items"], vectors[start : start + ROW_GROUP_ROWS],
                {name: part[name] for name in kinds},
            )  # fmt: skip

    digest = hashlib.sha256()
    for block in blocks():
        digest.update(np.ascontiguousarray(block.vectors).tobytes())
        for values in (block.ids, block.items, *block.columns.values()):
            digest.update(repr(values.to_pylist()).encode())
    options = {"dtype": str(vectors.dtype), "kinds": kinds}
    return _import(folder, blocks(), kinds, normalize, encoder, [[digest.hexdigest()], options])


def _import(
    folder: str,
    blocks: Iterator[VectorBlock],
    kinds: dict[str, str],
    normalize: bool,
    encoder: str,
    ingredients: list[Any],
) -> str:
    config = {"normalize": normalize, "encoder": encoder}
    identity = fingerprint(
        {"kind": embeddings.KIND, "revision": REVISION, "input": ingredients, **config}
    )
    if manifests.load_if_usable(folder, embeddings.KIND, identity) is not None:
        return folder
    refuse_other(folder)
    first = next(blocks, None)
    if first is None:
        raise DatasetError("There are 0 vectors to import, wanted at least one. Name other files.")
    schema = EmbeddingSchema(int(first.vectors.shape[1]), tuple(kinds.items()), normalize)
    tables = (_convert(block, schema) for block in itertools.chain([first], blocks))
    parts: list[Part] = []
    try:
        for part in _write_parts(folder, tables, schema, identity):
            parts.append(part)
        check_unique_ids(folder, parts)
    except BaseException:  # Whatever ends the import early: half a dataset is none.
        for name in (_part_name(number) for number in range(len(parts) + 1)):
            storage.remove(storage.join(folder, f"{name}.parquet"))
        raise
    properties = {
        "dim": schema.dim,
        "encoder": {"encoder": encoder, "imported": True, "normalize": normalize},
    }
    manifests.commit(
        folder,
        Manifest(
            embeddings.KIND,
            identity,
            {"code": {"import": REVISION}, "config": config, "inputs": fingerprint(ingredients)},
            embeddings.describe_schema(schema.arrow()),
            tuple(parts),
            properties,
        ),
    )
    return folder


def refuse_other(folder: str) -> None:
    """Raises DatasetError when a folder holds a complete dataset, which is not the one wanted."""
    if manifests.is_complete(folder):
        raise DatasetError(
            f"{folder} holds another dataset, wanted an empty folder or one with the same input and "
            "settings. Give another folder, or delete this one."
        )


def _part_name(number: int) -> str:
    return f"part-{number:05d}"


def _write_parts(
    folder: str, tables: Iterable[pa.Table], schema: EmbeddingSchema, key: str
) -> Iterator[Part]:
    """Writes tables in row groups and parts of one size, however they come."""
    row_bytes = schema.dim * np.dtype(schema.dtype).itemsize
    groups_a_part = max(1, _PART_BYTES // (row_bytes * ROW_GROUP_ROWS))
    groups = _regroup(tables)
    for number in itertools.count():
        first = next(groups, None)
        if first is None:
            return
        name = f"{_part_name(number)}.parquet"
        rows = 0
        with (
            storage.atomic_path(storage.join(folder, name)) as temporary,
            embeddings.parquet_writer(temporary, schema.arrow()) as writer,
        ):
            for group in itertools.chain([first], itertools.islice(groups, groups_a_part - 1)):
                writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
                rows += len(group)
        file = manifests.describe_file(folder, name)
        yield Part(_part_name(number), key, rows, (file,), {"dim": schema.dim})


def _regroup(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields the same rows in tables of ROW_GROUP_ROWS; the last may have fewer."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        while rows >= ROW_GROUP_ROWS:
            merged = pa.concat_tables(waiting)
            yield merged.slice(0, ROW_GROUP_ROWS).combine_chunks()
            waiting = [merged.slice(ROW_GROUP_ROWS)]
            rows -= ROW_GROUP_ROWS
    if rows:
        yield pa.concat_tables(waiting).combine_chunks()


def _convert(block: VectorBlock, schema: EmbeddingSchema) -> pa.Table:
    """Returns rows as an embeddings dataset has them. Raises DatasetError for a row that cannot be."""
    ids, items = (_names(block, values) for values in (block.ids, block.items))
    vectors = _vectors(block, ids, schema)
    n = len(ids)
    columns: dict[str, Any] = {
        "image_id": ids,
        "item_id": items,
        "vector": embeddings.list_array(vectors),
        "content_sha256": [hashlib.sha256(row.tobytes()).digest() for row in vectors],
        "source_shard": [block.place] * n,
        "row": range(block.first, block.first + n),
        "width": [0] * n,
        "height": [0] * n,
        "format": ["vector"] * n,
    }
    for name, kind in schema.metadata:
        try:
            columns[name] = convert_values(block.columns[name], kind)
        except pa.ArrowException as error:
            raise DatasetError(
                f"{block.place}, rows {block.first} to {block.first + n - 1}: the column {name!r} does "
                f"not convert to {kind}: {error}. Correct it, or leave it out of `columns`."
            ) from error
    arrow = schema.arrow()
    arrays = [
        columns[field.name]
        if isinstance(columns[field.name], pa.Array)
        else pa.array(columns[field.name], field.type)
        for field in arrow
    ]
    return pa.Table.from_arrays(arrays, schema=arrow)


def _names(block: VectorBlock, values: pa.Array) -> pa.Array:
    if values.null_count:
        row = block.first + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DatasetError(
            f"{block.place} row {row} (counted from 0) has no id, wanted one in every row. Give every "
            "row an id, or leave the row out."
        )
    try:
        return as_text(values)
    except pa.ArrowException as error:
        raise DatasetError(f"{block.place}: an id is no UTF-8 text: {error}. Correct it.") from error


def _vectors(block: VectorBlock, ids: pa.Array, schema: EmbeddingSchema) -> NDArray[np.floating[Any]]:
    vectors = block.vectors
    if vectors.shape[1] != schema.dim:
        raise DatasetError(
            f"{block.place} row {block.first}: the vector of {ids[0].as_py()!r} has {vectors.shape[1]} "
            f"numbers, those before it {schema.dim}, wanted one length. Import each length on its own."
        )
    finite = np.isfinite(vectors).all(axis=1)
    _require(block, ids, finite, "has NaN, an infinity or a missing number", "finite numbers")
    if schema.normalize:
        unit, valid = unit_float16(vectors)
        _require(block, ids, valid, "is zero, or too long for a float64", "a vector with a direction")
        return unit
    with np.errstate(over="ignore"):
        narrow = vectors.astype(np.float32)
    finite = np.isfinite(narrow).all(axis=1)
    _require(block, ids, finite, "does not fit float32", "numbers below 3.4e38")
    return narrow


def _require(block: VectorBlock, ids: pa.Array, good: NDArray[np.bool_], got: str, wanted: str) -> None:
    bad = np.flatnonzero(~good)
    if len(bad):
        raise DatasetError(
            f"{block.place} row {block.first + bad[0]} (counted from 0): the vector of "
            f"{ids[int(bad[0])].as_py()!r} {got}, wanted {wanted} ({len(bad)} such rows among the "
            f"{len(good)} that were read together). Correct the vectors, or leave the rows out."
        )
