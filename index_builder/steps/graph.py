"""The graph of a finished join: mutual neighbours, reverse neighbours, and how often each item is one.

It works on ids, rows and scores alone. Every part sends its edges to the parts that hold their targets
(`split_edges`, through scratch files); each of these knows then who has its rows in a list.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_builder.errors import DatasetError

KIND = "graph"

# Beside the neighbours: how many lists hold the query, whether it is in its neighbours' lists, and
# how many lists hold each of them.
EVIDENCE_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("reverse_degree", pa.int32(), nullable=False),
        pa.field("mutual", pa.list_(pa.bool_()), nullable=False),
        pa.field("neighbor_reverse_degrees", pa.list_(pa.int32()), nullable=False),
    ]
)
REVERSE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("reverse_degree", pa.int32(), nullable=False),
        pa.field("reverse_ids", pa.list_(pa.string()), nullable=False),
        pa.field("reverse_scores", pa.list_(pa.float32()), nullable=False),
    ]
)
# Each pair once: `a` is the one with the smaller row of the index.
MUTUAL_SCHEMA = pa.schema(
    [
        pa.field("a", pa.string(), nullable=False),
        pa.field("b", pa.string(), nullable=False),
        pa.field("a_row", pa.int64(), nullable=False),
        pa.field("b_row", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
EDGE_SCHEMA = pa.schema(
    [
        pa.field("target", pa.int64(), nullable=False),
        pa.field("source", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("source_id", pa.large_string(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """`max_reverse`: of so many reverse neighbours of an item ids and scores are kept, best first."""

    max_reverse: int = 100


@dataclasses.dataclass(frozen=True, eq=False)
class NeighborLists:
    """The lists of one part, whose queries are rows of one index shard.

    The shard begins at `first_row`. `ids` [q] and `query_rows` int64 [q] (ascending, counted from the
    shard's first row) are of the queries: a row that rules let not ask has no list. `starts` int64
    [q + 1] says where each begins in `rows` int64 [e], `scores` float32 [e] and `neighbor_ids` [e].
    """

    first_row: int
    ids: pa.Array
    query_rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    neighbor_ids: pa.Array

    COLUMNS = ("query_id", "query_row", "neighbor_rows", "scores", "neighbor_ids")

    @staticmethod
    def of(table: pa.Table, shard_rows: tuple[int, int], total: int, name: str) -> "NeighborLists":
        """Takes the lists from a part of the neighbours dataset with the columns COLUMNS.

        Raises DatasetError unless the queries are rows of the shard, ascending, and the neighbours
        rows of the index, which has `total`. `name` names the part in the message.
        """
        first_row, stop = shard_rows
        found = table["query_row"].to_numpy()
        rows = table["neighbor_rows"].combine_chunks()
        flat = rows.flatten().to_numpy(zero_copy_only=False)
        outside = len(flat) > 0 and (flat.min() < 0 or flat.max() >= total)
        limits = np.concatenate([[first_row - 1], found, [stop]])
        if outside or (np.diff(limits) < 1).any():
            raise DatasetError(
                f"The neighbours part {name} does not hold neighbours of the rows {first_row} to "
                f"{stop - 1} of an index of {total} rows, in order. Give the neighbours of an index "
                "joined with itself, or make them again."
            )
        lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return NeighborLists(
            first_row,
            table["query_id"].combine_chunks(),
            found - first_row,
            starts,
            flat.astype(np.int64, copy=False),
            table["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False),
            table["neighbor_ids"].combine_chunks().flatten(),
        )

    @property
    def queries(self) -> NDArray[np.int64]:
        """The number of the query of every edge, int64 [e], from 0."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.starts))


def split_edges(
    lists: NeighborLists, shard_starts: NDArray[np.int64]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields the edges of one part by the shard that holds their target: (its number, EDGE_SCHEMA).

    `shard_starts` int64 [shards + 1] says which rows each shard holds. Shards without an edge are
    left out; within a batch, edges are in the order of the lists.
    """
    targets = np.searchsorted(shard_starts, lists.rows, side="right") - 1
    order = np.argsort(targets, kind="stable")
    numbers, begins = np.unique(targets[order], return_index=True)
    queries, ids = lists.queries, lists.ids.cast(pa.large_string())
    for number, edges in zip(numbers, np.split(order, begins)[1:], strict=True):
        sources = queries[edges]
        columns = [
            pa.array(lists.rows[edges]),
            pa.array(lists.query_rows[sources] + lists.first_row),
            pa.array(lists.scores[edges]),
            ids.take(pa.array(sources)),
        ]
        yield int(number), pa.record_batch(columns, schema=EDGE_SCHEMA)


@dataclasses.dataclass(frozen=True, eq=False)
class ReverseSide:
    """What the edges to a shard's rows say of them.

    `reverse` and `mutual_edges` are rows of their datasets; `degrees` int32 [n] counts the lists that
    hold each row, `mutual` bool [e] tells of each edge of the shard's lists whether there is one back.
    """

    reverse: pa.Table
    mutual_edges: pa.Table
    degrees: NDArray[np.int32]
    mutual: NDArray[np.bool_]


def reverse_side(
    lists: NeighborLists, items: pa.ChunkedArray, incoming: pa.Table, total: int, spec: GraphSpec
) -> ReverseSide:
    """Turns the edges that lead to the rows of a shard (EDGE_SCHEMA, in any order) around.

    `items` [n] are the image ids of the shard's rows. Memory: the shard's own edges and the incoming
    ones.
    """
    n = len(items)
    incoming = incoming.combine_chunks()
    order = pc.sort_indices(
        incoming, [("target", "ascending"), ("score", "descending"), ("source_id", "ascending")]
    )
    incoming = incoming.take(order)
    targets = incoming["target"].to_numpy() - lists.first_row
    degrees = np.bincount(targets, minlength=n)
    ranks = np.arange(len(targets)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    kept = incoming.filter(pa.array(ranks < spec.max_reverse))
    ends = np.cumsum(np.minimum(degrees, spec.max_reverse))
    reverse = pa.table(
        [
            items,
            pa.array(degrees.astype(np.int32)),
            _lists(ends, kept["source_id"].cast(pa.string()).combine_chunks()),
            _lists(ends, kept["score"].combine_chunks()),
        ],
        schema=REVERSE_SCHEMA,
    )
    # An edge and the one back have the same number: row of this shard, then row of the index.
    own = lists.query_rows[lists.queries]
    back = targets * total + incoming["source"].to_numpy()
    mutual = np.isin(own * total + lists.rows, back, assume_unique=True)
    upward = np.flatnonzero(mutual & (lists.rows > own + lists.first_row))
    upward = upward[np.lexsort((lists.rows[upward], own[upward]))]
    mutual_edges = pa.table(
        [
            lists.ids.take(pa.array(lists.queries[upward])),
            lists.neighbor_ids.take(pa.array(upward)),
            pa.array(own[upward] + lists.first_row),
            pa.array(lists.rows[upward]),
            pa.array(lists.scores[upward]),
        ],
        schema=MUTUAL_SCHEMA,
    )
    return ReverseSide(reverse, mutual_edges, degrees.astype(np.int32), mutual)


def evidence_table(
    lists: NeighborLists,
    degrees: NDArray[np.int32],
    mutual: NDArray[np.bool_],
    neighbor_degrees: NDArray[np.int32],
) -> pa.Table:
    """Returns the evidence beside the rows of a neighbours part, in their order.

    `degrees` int32 [n] are of the shard's rows; `mutual` [e] and `neighbor_degrees` int32 [e] of the
    edges.
    """
    ends = lists.starts[1:]
    columns = [
        lists.ids,
        pa.array(degrees[lists.query_rows]),
        _lists(ends, pa.array(mutual)),
        _lists(ends, pa.array(neighbor_degrees)),
    ]
    return pa.table(columns, schema=EVIDENCE_SCHEMA)


def _lists(ends: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    """Cuts values into lists that end at `ends`; the first begins at 0."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), values)


def part_figures(side: ReverseSide) -> dict[str, int]:
    """Returns a shard's figures as whole numbers, so that their sums depend on no order."""
    values, counts = (found.tolist() for found in np.unique(side.degrees, return_counts=True))
    pairs = list(zip(values, counts, strict=True))
    return {
        "edges": len(side.mutual),
        "mutual": int(side.mutual.sum()),
        "mutual_edges": len(side.mutual_edges),
        "unreached": int((side.degrees == 0).sum()),
        "max_reverse_degree": max(values, default=0),
        **{f"degree_power_{power}": sum(v**power * c for v, c in pairs) for power in (1, 2, 3)},
    }


def graph_figures(parts: Sequence[Mapping[str, Any]], rows: int) -> dict[str, Any]:
    """Returns the figures of a whole graph from those of its parts.

    `mutual_share` of the edges, `unreached_share` of the items (no list holds them), and hubness as
    the skewness of the reverse degrees (Radovanović, Nanopoulos and Ivanović, "Hubs in space", JMLR
    2010): 0 where all are equal.
    """
    names = ("edges", "mutual", "mutual_edges", "unreached")
    totals = {name: sum(int(part[name]) for part in parts) for name in names}
    first, second, third = (
        sum(int(part[f"degree_power_{power}"]) for part in parts) for power in (1, 2, 3)
    )
    # Central moments times powers of n, in whole numbers: exact, however large.
    variance = rows * second - first**2
    skew = rows**2 * third - 3 * rows * first * second + 2 * first**3
    return {
        "edges": totals["edges"],
        "mutual_edges": totals["mutual_edges"],
        "mutual_share": totals["mutual"] / totals["edges"] if totals["edges"] else 0.0,
        "unreached": totals["unreached"],
        "unreached_share": totals["unreached"] / rows if rows else 0.0,
        "max_reverse_degree": max((int(part["max_reverse_degree"]) for part in parts), default=0),
        "reverse_degree_skewness": skew / (variance * math.sqrt(variance)) if variance else 0.0,
    }
