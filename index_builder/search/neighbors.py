"""The neighbours dataset: its schema, and building its rows from a finished top-k."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.scoring.topk import TopK

KIND = "neighbors"

# Status of a row: k neighbours were found; or fewer, because no more eligible items exist; or fewer,
# because the probed lists held no more.
FILLED = "filled"
EXHAUSTED = "exhausted"
CAPPED = "capped"
STATUSES = (FILLED, EXHAUSTED, CAPPED)

# Evidence that a join may write beside ids and scores, and the column that holds it.
MARGIN = "margin"
EVIDENCE = {MARGIN: "margins"}


@dataclasses.dataclass(frozen=True)
class NeighborsSchema:
    """The columns of a neighbours dataset; `columns` are (name, type) of metadata that is carried.

    For a carried column `brand` there is `query_brand` of the query and `neighbor_brand`, one value
    a neighbour. `query_row` and `neighbor_rows` are row numbers. `evidence` are keys of EVIDENCE.
    """

    columns: tuple[tuple[str, pa.DataType], ...] = ()
    evidence: tuple[str, ...] = ()

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
        for name in self.evidence:
            fields.append(pa.field(EVIDENCE[name], pa.list_(pa.float32()), nullable=False))
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
    query_rows: NDArray[np.int64],
    top: TopK,
    lookup: Callable[[NDArray[np.int64]], pa.Table],
    *,
    k: int,
    all_lists_probed: bool,
) -> pa.Table:
    """Builds the rows of a neighbours part from a finished top-k.

    `queries` holds image_id and the carried columns of the queries, `query_rows` int64 [n] their
    rows; `lookup` returns the same columns for row numbers of the index, in their order. `top` holds
    at least k slots a query; what it has beyond k only serves as evidence of the k-th.
    """
    counts = np.minimum(top.counts, k)
    filled = np.arange(k) < counts[:, None]
    flat_rows = top.rows[:, :k][filled]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    found = lookup(flat_rows)

    short = EXHAUSTED if all_lists_probed else CAPPED
    columns = {
        "query_id": queries["image_id"],
        "neighbor_ids": _lists(offsets, found["image_id"]),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(top.scores[:, :k][filled])),
        "status": pa.array(np.where(counts == k, FILLED, short), pa.string()),
        "query_row": pa.array(query_rows, pa.int64()),
        "neighbor_rows": pa.ListArray.from_arrays(offsets, pa.array(flat_rows)),
    }
    if MARGIN in schema.evidence:
        margins = margins_of(top, k)[filled]
        values = pa.array(margins, mask=np.isnan(margins))
        columns[EVIDENCE[MARGIN]] = pa.ListArray.from_arrays(offsets, values)
    for name in schema.names:
        columns[f"query_{name}"] = queries[name]
        columns[f"neighbor_{name}"] = _lists(offsets, found[name])
    arrow = schema.arrow()
    return pa.table([columns[field.name] for field in arrow], schema=arrow)


def slots(k: int, evidence: Sequence[str]) -> int:
    """Returns how many slots a query's top-k needs: one more where the k-th has a margin, too."""
    return k + (MARGIN in evidence)


def margins_of(top: TopK, k: int) -> NDArray[np.float32]:
    """Returns each of the first k scores minus the next one, float32 [n, k].

    NaN where there is no next: at the last of a list that ends before the slots do.
    """
    place = np.arange(k)
    following = np.full((len(top.scores), k), np.nan, dtype=np.float32)
    within = min(k, top.scores.shape[1] - 1)
    following[:, :within] = top.scores[:, 1 : within + 1]
    following[place + 1 >= top.counts[:, None]] = np.nan
    return np.where(place < top.counts[:, None], top.scores[:, :k] - following, np.float32(np.nan))


def _lists(offsets: pa.Array, column: pa.ChunkedArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets, column.combine_chunks())
