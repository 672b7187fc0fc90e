"""The neighbours dataset: its schema, and building its rows from a finished top-k."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.topk import TopK

KIND = "neighbors"

# Status of a row: k neighbours were found; or fewer, because no more eligible items exist; or fewer,
# because the probed lists held no more.
FILLED = "filled"
EXHAUSTED = "exhausted"
CAPPED = "capped"


@dataclasses.dataclass(frozen=True)
class NeighborsSchema:
    """The columns of a neighbours dataset; `columns` are (name, type) of metadata that is carried.

    For a carried column `brand` there is `query_brand` of the query and `neighbor_brand`, one value
    a neighbour. `query_row` and `neighbor_rows` are row numbers in the index.
    """

    columns: tuple[tuple[str, pa.DataType], ...] = ()

    def arrow(self) -> pa.Schema:
        """Returns the Arrow schema of a part."""
        fields = [
            pa.field("query_id", pa.string(), nullable=False),
            pa.field("neighbor_ids", pa.list_(pa.string()), nullable=False),
            pa.field("scores", pa.list_(pa.float32()), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("query_row", pa.int64(), nullable=False),
            pa.field("neighbor_rows", pa.list_(pa.int64()), nullable=False),
        ]
        for name, kind in self.columns:
            fields.append(pa.field(f"query_{name}", kind))
            fields.append(pa.field(f"neighbor_{name}", pa.list_(kind)))
        return pa.schema(fields)

    @property
    def names(self) -> list[str]:
        """Names of the carried columns."""
        return [name for name, _ in self.columns]


def neighbors_table(
    schema: NeighborsSchema,
    queries: pa.Table,
    first_row: int,
    top: TopK,
    lookup: Callable[[NDArray[np.int64]], pa.Table],
    *,
    all_lists_probed: bool,
) -> pa.Table:
    """Builds the rows of a neighbours part from a finished top-k.

    `queries` holds image_id and the carried columns of the queries, whose rows in the index begin
    at `first_row`; `lookup` returns the same columns for row numbers of the index, in their order.
    """
    filled = top.rows >= 0
    flat_rows = top.rows[filled]
    offsets = pa.array(np.concatenate([[0], np.cumsum(top.counts)]), pa.int32())
    found = lookup(flat_rows)

    short = EXHAUSTED if all_lists_probed else CAPPED
    columns = {
        "query_id": queries["image_id"],
        "neighbor_ids": _lists(offsets, found["image_id"]),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(top.scores[filled])),
        "status": pa.array(np.where(top.counts == top.k, FILLED, short), pa.string()),
        "query_row": pa.array(np.arange(first_row, first_row + len(queries)), pa.int64()),
        "neighbor_rows": pa.ListArray.from_arrays(offsets, pa.array(flat_rows)),
    }
    for name in schema.names:
        columns[f"query_{name}"] = queries[name]
        columns[f"neighbor_{name}"] = _lists(offsets, found[name])
    arrow = schema.arrow()
    return pa.table([columns[field.name] for field in arrow], schema=arrow)


def _lists(offsets: pa.Array, column: pa.ChunkedArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets, column.combine_chunks())
