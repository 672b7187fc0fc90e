"""Whether the images of every item agree on the column that `max_per` counts.

Keeping the best under two kinds of caps in a list of k is exact only where one kind of group lies
inside the other: an item with two brands would be in two groups, neither of which holds the other.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.errors import ConfigError
from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.rules.rules import OWN_ITEM, JoinRules
from index_builder.search.groups import COLUMNS

_MOST_LISTED = 3


def check_items(index: IndexDataset, rules: JoinRules) -> None:
    """Raises ConfigError when images of one item have different values of a `max_per` column.

    Memory: 16 bytes a row. Items whose hashes meet are compared in a second pass over the shards.
    """
    if index.single_images:
        return
    for name, _ in rules.max_per:
        if name not in (OWN_ITEM, "image_id"):
            _check_column(index, name)


def _check_column(index: IndexDataset, name: str) -> None:
    hashes = np.concatenate([_hashes(pairs, name) for pairs in _pairs(index, name)])
    # Equal pairs are one item in several shards; what is left twice has two values.
    items = np.unique(hashes, axis=0)[:, 0]
    suspects = np.unique(items[1:][items[1:] == items[:-1]])
    if not len(suspects):
        return
    values: dict[str, set[object]] = {}
    for pairs in _pairs(index, name):
        among = np.isin(_hashes(pairs, name)[:, 0], suspects)
        for row in pairs.filter(pa.array(among)).to_pylist():
            values.setdefault(row[OWN_ITEM], set()).add(row[name])
    torn = {item: found for item, found in sorted(values.items()) if len(found) > 1}
    if torn:
        listed = [
            f"{item!r} has {' and '.join(sorted(map(repr, found)))}" for item, found in torn.items()
        ]
        # Near copies are grouped image by image, so nobody can correct that.
        remedy = (
            "Keep one image of a group instead, with {column: is_representative, equals: true} among "
            "join.rules.candidates."
            if name in COLUMNS
            else "Correct the metadata, or cap another column."
        )
        raise ConfigError(
            f"join.rules.max_per: in {index.folder} the images of {len(torn):,} items have different "
            f"values of {name!r}, wanted one value an item, or the best cannot be kept exactly; the "
            f"first: {'; '.join(listed[:_MOST_LISTED])}. {remedy}"
        )


def _pairs(index: IndexDataset, name: str) -> Iterator[pa.Table]:
    """Yields the distinct pairs of item and value, shard by shard."""
    for number in range(index.layout.shards):
        table = read_shard_table(index, number, (OWN_ITEM, name))
        yield table.group_by([OWN_ITEM, name]).aggregate([])


def _hashes(pairs: pa.Table, name: str) -> NDArray[np.int64]:
    """Hashes of item and value, int64 [n, 2]; they differ from process to process.

    Values are hashed as text: -1 and -2 have the same hash as numbers.
    """
    values = [map(hash, map(repr, pairs[column].to_pylist())) for column in (OWN_ITEM, name)]
    return np.stack([np.fromiter(found, np.int64, len(pairs)) for found in values], axis=1)
