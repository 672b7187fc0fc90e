"""Refusing a dataset in which an image id occurs more than once, in one process and little memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.datasets import embeddings
from index_builder.datasets.manifests import Part
from index_builder.errors import DatasetError

_COLUMNS = ("image_id", "source_shard", "row")
_MOST_LISTED = 5


def check_unique_ids(folder: str, parts: Sequence[Part]) -> None:
    """Raises DatasetError when an image id of a dataset occurs twice, with both places.

    Memory: 8 bytes a row. Ids whose hashes meet are compared in a second pass over the ids.
    """
    hashes = np.concatenate(
        [np.empty(0, np.int64), *(_hash_ids(block["image_id"]) for block in _blocks(folder, parts))]
    )
    hashes.sort()
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(suspects):
        return
    places: dict[str, list[str]] = {}
    for block in _blocks(folder, parts):
        among = np.flatnonzero(np.isin(_hash_ids(block["image_id"]), suspects))
        for row in block.take(among).to_pylist():
            place = f"{row['source_shard']} row {row['row']}"
            places.setdefault(row["image_id"], []).append(place)
    repeated = {name: found for name, found in sorted(places.items()) if len(found) > 1}
    if repeated:
        listed = [f"{name!r} at {' and '.join(found[:2])}" for name, found in repeated.items()]
        raise DatasetError(
            f"{len(repeated)} image ids occur more than once (rows counted from 0), wanted each once. "
            f"Remove the rows that are not wanted: {'; '.join(listed[:_MOST_LISTED])}."
        )


def _blocks(folder: str, parts: Sequence[Part]) -> Iterator[pa.Table]:
    for part in parts:
        yield from embeddings.read_part(folder, part, _COLUMNS, verify=False)


def _hash_ids(ids: pa.ChunkedArray) -> NDArray[np.int64]:
    """Python's hash of each id; it differs from process to process, so it decides nothing."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))
