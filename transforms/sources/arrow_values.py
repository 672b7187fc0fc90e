"""Columns of Arrow in the few kinds of values that ids and metadata are made from."""

from typing import Any

import pyarrow as pa

from index_builder.errors import ImageError


def plain_column(column: Any) -> Any:
    """Returns a pa.Array or pa.ChunkedArray as bytes, numbers, booleans, or lists of these.

    Text becomes bytes, so that a value that is not UTF-8 costs its own row only; dates and decimal
    numbers become text.
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = column.cast(kind.storage_type)
        kind = column.type
    if pa.types.is_dictionary(kind):
        return plain_column(column.cast(kind.value_type))
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.string())
        kind = column.type
    if pa.types.is_string(kind):
        return column.cast(pa.binary())
    if pa.types.is_large_string(kind):
        return column.cast(pa.large_binary())
    return column


def plain_value(column: Any, row: int, subject: str) -> Any:
    """Returns a value of a plain column. Raises ImageError `bad_metadata` where Python has none."""
    try:
        return column[row].as_py()
    except (ValueError, pa.ArrowException) as error:
        raise ImageError("bad_metadata", f"{subject} cannot be read: {error}") from error
