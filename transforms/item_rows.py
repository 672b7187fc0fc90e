"""Neighbours of items: the best over all images of an item, each neighbouring item once.

What a join finds for an image is the best of a greedy choice by score under its caps; the greedy
choice from what the images of an item found is that from all candidates, so merging loses nothing.
"""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class ItemRows:
    """How many neighbours an item gets, and the (column, most neighbours a value) caps of the join."""

    k: int
    max_per: tuple[tuple[str, int], ...] = ()


def shares(items: pa.ChunkedArray, count: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields (number of a share, the rows whose items fall to it), by a hash of the item's id."""
    encoded = items.combine_chunks().dictionary_encode()
    hashes = [zlib.crc32(item.encode()) % count for item in encoded.dictionary.to_pylist()]
    numbers = np.asarray(hashes, dtype=np.int64)[encoded.indices.to_numpy()]
    for number in np.unique(numbers):
        yield int(number), np.flatnonzero(numbers == number)


def best_of_items(table: pa.Table, spec: ItemRows) -> tuple[pa.Array, NDArray[np.int64], pa.Table]:
    """Merges the neighbours of the images of items.

    `table` has `query_item_id`, and lists of one length a row: `neighbor_ids`, `scores`,
    `neighbor_item_id`, the capped columns and any others. Returns the items by their bytes, and the
    pairs in a table of the list columns, flattened: by item, best first, ties by image id; `owners`
    int64 is the place of each pair's item.
    """
    items = table["query_item_id"].unique().sort()
    names = [field.name for field in table.schema if pa.types.is_list(field.type)]
    parents = table["scores"].combine_chunks().value_parent_indices()
    flat = {name: table[name].combine_chunks().flatten() for name in names}
    flat["item"] = _codes(table["query_item_id"].combine_chunks().take(parents), items)
    order = [("item", "ascending"), ("scores", "descending"), ("neighbor_ids", "ascending")]
    pairs = pa.table(flat).sort_by(order).combine_chunks()
    pairs = pairs.filter(pa.array(_places(pairs, "neighbor_item_id") < 1))
    for name, most in spec.max_per:
        pairs = pairs.filter(pa.array(_places(pairs, f"neighbor_{name}") < most))
    pairs = pairs.filter(pa.array(_places(pairs, None) < spec.k))
    return items, pairs["item"].to_numpy(), pairs.drop_columns(["item"])


def _codes(values: pa.Array, among: pa.Array) -> pa.Array:
    return pc.index_in(values, value_set=among).cast(pa.int64())


def _places(pairs: pa.Table, name: str | None) -> NDArray[np.int64]:
    """Returns which pair of its item each is, from 0, or of its item with the same value of a column.

    A pair whose value is null is the first of its kind.
    """
    kinds = pairs["item"].to_numpy()
    if name is not None:
        encoded = pairs[name].combine_chunks().dictionary_encode()
        values = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
        kinds = kinds * len(encoded.dictionary) + values
        kinds = np.where(values < 0, -1 - np.arange(len(kinds)), kinds)
    order = np.argsort(kinds, kind="stable")
    _, starts, sizes = np.unique(kinds[order], return_index=True, return_counts=True)
    places = np.empty(len(kinds), dtype=np.int64)
    places[order] = np.arange(len(kinds)) - np.repeat(starts, sizes)
    return places
