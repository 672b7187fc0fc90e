"""How many neighbours a query can have at most, exactly, from the rule columns of the whole index.

Of rows that the rules cannot tell apart a few stand for all: a query that is short of k asks for one
more than it has, so k + 1 items of a kind are as good as a million. What is kept of the index is that
small table; counting in it takes no vector.
"""

import dataclasses

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.rules.rules import OWN_ITEM, JoinRules, QueryCodes, RuleEncoder

# Columns of the table of kinds, beside the codes of the rules.
_ITEM, _CAPPED, _IMAGES = "item", "capped", "images"


@dataclasses.dataclass(frozen=True, eq=False)
class Possible:
    """What a query can find in the whole index, both int64 [n] and counted up to k only.

    `images` are the rows that the rules allow it; `neighbors` what is left of them by one image an
    item and the caps: as many as a row of neighbours can have.
    """

    images: NDArray[np.int64]
    neighbors: NDArray[np.int64]


def count_possible(
    index: IndexDataset,
    queries: pa.Table,
    rules: JoinRules,
    k: int,
    exclusions: pa.Table | None = None,
) -> Possible:
    """Counts what each query can find at most, by all rules and excluded pairs.

    `queries` has the rule columns, `exclusions` at least the excluded pairs of these queries. Reads
    the rule columns of every shard once. Memory: those of one shard, and for every combination of
    rule values that these queries tell apart at most (k + 1)^2 rows.
    """
    encoder = RuleEncoder(rules, queries, exclusions, single_images=True)
    kept: pa.Table | None = None
    for number in range(index.layout.shards):
        found = _kinds(read_shard_table(index, number, rules.candidate_columns), encoder, rules)
        kept = _representatives(found if kept is None else pa.concat_tables([kept, found]), k + 1)
    assert kept is not None, "an index has at least one shard"
    return _count(encoder.encode_queries(queries), queries[OWN_ITEM], kept, rules, k)


def _kinds(table: pa.Table, encoder: RuleEncoder, rules: JoinRules) -> pa.Table:
    """Returns one row for each item and combination of codes, with its number of images."""
    codes = encoder.encode_candidates(table)
    # No query has the value of a code below zero, so none can have such a row as its own kind.
    rows = np.flatnonzero(codes.eligible & (codes.same >= 0).all(axis=0))
    taken, codes = table.take(pa.array(rows)), codes.take(rows)
    columns = {f"same{i}": pa.array(one) for i, one in enumerate(codes.same)}
    # The first of `different` is the item, which is compared by itself.
    columns |= {f"different{i}": pa.array(one) for i, one in enumerate(codes.different[1:])}
    columns["excluded"] = pa.array(codes.excluded)
    for name, _ in rules.max_per:
        columns[_CAPPED] = taken[name]
    columns[_ITEM] = taken[OWN_ITEM]
    columns[_IMAGES] = pa.array(np.ones(len(rows), dtype=np.int64))
    return pa.table(columns)


def _representatives(table: pa.Table, most: int) -> pa.Table:
    """Merges equal rows; keeps `most` items of each kind and capped value, and `most` such values.

    So many are enough: without the query's own item, k are left.
    """
    names = [name for name in table.column_names if name != _IMAGES]
    merged = table.group_by(names).aggregate([(_IMAGES, "sum")]).combine_chunks()
    merged = merged.rename_columns(
        [_IMAGES if name == f"{_IMAGES}_sum" else name for name in merged.column_names]
    ).select(table.column_names)
    kinds = np.zeros(len(merged), dtype=np.int64)
    for name in names:
        if name not in (_ITEM, _CAPPED):
            kinds = _combined(kinds, merged[name].to_numpy())
    values = _numbers(merged[_CAPPED] if _CAPPED in names else pa.nulls(len(merged), pa.int8()))
    order = np.lexsort((values, kinds))
    kind, value = kinds[order], values[order]
    new_kind = np.append(True, kind[1:] != kind[:-1])[: len(order)]
    new_value = new_kind | np.append(True, value[1:] != value[:-1])[: len(order)]
    # The number of the value among those of its kind, and of the row among those of its value.
    nth_value = np.cumsum(new_value)
    nth_value -= np.maximum.accumulate(np.where(new_kind, nth_value, 0))
    nth_row = np.arange(len(order))
    nth_row = nth_row - np.maximum.accumulate(np.where(new_value, nth_row, 0))
    return merged.take(pa.array(order[(nth_value < most) & (nth_row < most)]))


def _combined(kinds: NDArray[np.int64], codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Numbers the pairs of two small numbers, int64 [n], from 0."""
    pairs = kinds * (int(codes.max(initial=0)) + 2) + codes + 1
    numbers: NDArray[np.int64] = np.unique(pairs, return_inverse=True)[1].reshape(-1)
    return numbers


def _numbers(column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64]:
    """Numbers the values of a column; every null is -1."""
    encoded = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = encoded.dictionary_encode()
    numbers: NDArray[np.int64] = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    return numbers


def _count(
    queries: QueryCodes, own_items: pa.ChunkedArray, kept: pa.Table, rules: JoinRules, k: int
) -> Possible:
    n = len(queries)
    items = _numbers(pa.chunked_array([*own_items.chunks, *kept[_ITEM].chunks], pa.string()))
    values = np.full(len(kept), -1, dtype=np.int64)
    if rules.max_per:
        values = _numbers(kept[_CAPPED])
    keys = np.zeros(n + len(kept), dtype=np.int64)
    for row, of_queries in enumerate(queries.same):
        codes = np.concatenate([of_queries, kept[f"same{row}"].to_numpy()])
        keys = _combined(keys, codes)
    # Rows of one key, then of one capped value, then of one item are next to each other.
    order = np.lexsort((items[n:], values, keys[n:]))
    rows = keys[n:][order]
    different = np.empty((len(kept), len(queries.different) - 1), dtype=np.int32)
    for row in range(different.shape[1]):
        different[:, row] = kept[f"different{row}"].to_numpy()[order]
    # A null is the same as nothing: such a query has no candidates.
    asked = (queries.same >= 0).all(axis=0)
    starts = np.searchsorted(rows, keys[:n])
    stops = np.where(asked, np.searchsorted(rows, keys[:n], side="right"), starts)
    images, neighbors = _count_kinds(
        starts,
        stops,
        items[:n],
        np.ascontiguousarray(queries.different[1:].T),
        queries.excluded_offsets,
        queries.excluded,
        items[n:][order],
        values[order],
        different,
        kept["excluded"].to_numpy()[order],
        kept[_IMAGES].to_numpy()[order],
        rules.max_per[0][1] if rules.max_per else k,
        k,
    )
    return Possible(images, neighbors)


@njit(cache=True, nogil=True)
def _count_kinds(
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    q_items: NDArray[np.int64],
    q_different: NDArray[np.int32],
    q_offsets: NDArray[np.int64],
    q_excluded: NDArray[np.int32],
    items: NDArray[np.int64],
    values: NDArray[np.int64],
    different: NDArray[np.int32],
    excluded: NDArray[np.int32],
    weights: NDArray[np.int64],
    cap: int,
    k: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts images and neighbours of each query among the rows of its key, up to k."""
    images = np.zeros(len(starts), dtype=np.int64)
    neighbors = np.zeros(len(starts), dtype=np.int64)
    for q in range(len(starts)):
        out = q_excluded[q_offsets[q] : q_offsets[q + 1]]
        value, item, used = np.int64(-2), np.int64(-2), np.int64(0)
        for x in range(starts[q], stops[q]):
            if items[x] >= 0 and items[x] == q_items[q]:
                continue
            allowed = True
            for d in range(different.shape[1]):
                if q_different[q, d] >= 0 and q_different[q, d] == different[x, d]:
                    allowed = False
            if allowed and excluded[x] >= 0:
                place = np.searchsorted(out, excluded[x])
                allowed = not (place < len(out) and out[place] == excluded[x])
            if not allowed:
                continue
            images[q] += weights[x]
            if values[x] != value:
                value, item, used = values[x], np.int64(-2), np.int64(0)
            # Rows without an item are nobody's second image; equal ones were merged.
            fresh = weights[x] if items[x] < 0 else np.int64(items[x] != item)
            item = items[x]
            if value >= 0:
                fresh = min(fresh, cap - used)
            used += fresh
            neighbors[q] += fresh
            if neighbors[q] >= k:
                break
        images[q], neighbors[q] = min(images[q], k), min(neighbors[q], k)
    return images, neighbors
