"""Seeded random samples of a dataset's rows, drawn over all of its parts.

Rows that recall may be measured on are set apart by a hash of their ids, so training and evaluation
agree without telling each other, whatever the order of the rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit, uint64
from numpy.typing import NDArray

from index_builder.datasets import embeddings
from index_builder.datasets.in_order import map_in_order, readers
from index_builder.datasets.manifests import Part

# About so many rows are set apart for evaluation, at most half of the rows. They serve calibration,
# the certificate and its retries, each of which draws a thousand or two.
EVALUATION_ROWS = 10_000
# Below this there are too few for both: training takes every row, and every row may be evaluated.
LEAST_SPLIT_ROWS = 1_000


def sample_rows(rows: int, sample: int, seed: int) -> NDArray[np.int64]:
    """Returns `sample` different row numbers below `rows`, ascending, the same for the same seed."""
    if sample >= rows:
        return np.arange(rows, dtype=np.int64)
    chosen = np.random.default_rng(seed).choice(rows, size=sample, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def evaluation_overlaps_training(rows: int) -> bool:
    """Tells whether an index of so many rows is too small to set evaluation rows apart."""
    return rows < LEAST_SPLIT_ROWS


def evaluation_rows(rows: int) -> int:
    """Returns about how many of the rows of an index recall may be measured on."""
    return rows if evaluation_overlaps_training(rows) else min(EVALUATION_ROWS, rows // 2)


def evaluation_mask(image_ids: pa.Array | pa.ChunkedArray, rows: int, seed: int) -> NDArray[np.bool_]:
    """Tells which rows recall may be measured on, bool [n], for the ids of any of the rows.

    `rows` is how many the whole index has and `seed` the one of the index, both in its manifest. A
    row is an evaluation row when the seeded hash of its id is below EVALUATION_ROWS / rows of the
    range. In an index that is too small to set rows apart every row is.
    """
    if evaluation_overlaps_training(rows):
        return np.ones(len(image_ids), dtype=np.bool_)
    if len(image_ids) == 0:
        return np.zeros(0, dtype=np.bool_)
    array = image_ids.combine_chunks() if isinstance(image_ids, pa.ChunkedArray) else image_ids
    array = array.cast(pa.large_string())
    _, starts, content = array.buffers()
    offsets = np.frombuffer(starts, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(content, np.uint8) if content is not None and content.size else None
    hashes = _hash_ids(np.zeros(1, np.uint8) if data is None else data, offsets, seed)
    mask: NDArray[np.bool_] = hashes < np.uint64(min(0.5, EVALUATION_ROWS / rows) * 2.0**64)
    return mask


@njit(cache=True, nogil=True)
def _hash_ids(data: NDArray[np.uint8], offsets: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64-bit FNV-1a of each id, then the finaliser of SplitMix64 to spread it over the whole range.

    (FNV: http://www.isthe.com/chongo/tech/comp/fnv; SplitMix64: Steele, Lea and Flood, OOPSLA 2014.)
    """
    hashes = np.empty(len(offsets) - 1, dtype=np.uint64)
    for i in range(len(hashes)):
        value = uint64(0xCBF29CE484222325) ^ (uint64(seed) * uint64(0x9E3779B97F4A7C15))
        for j in range(offsets[i], offsets[i + 1]):
            value = (value ^ uint64(data[j])) * uint64(0x100000001B3)
        value = (value ^ (value >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> uint64(27))) * uint64(0x94D049BB133111EB)
        hashes[i] = value ^ (value >> uint64(31))
    return hashes


def read_sample(folder: str, parts: Sequence[Part], sample: int, seed: int) -> NDArray[Any]:
    """Reads a random sample of the vectors of a dataset to train on, [at most sample, dim].

    The vectors have the type of the dataset, float16 or float32. `sample` rows are drawn, every row
    of every part with the same chance, and those that evaluation may draw are left out. Only row
    groups that hold a chosen row are read, several at the same time.

    Memory: the sample, and a row group for each thread.
    """
    total = sum(part.rows for part in parts)
    groups = _chosen_groups(folder, parts, sample_rows(total, sample, seed))
    if not evaluation_overlaps_training(total):

        def left(group: _ChosenGroup) -> _ChosenGroup:
            ids = group.read(folder, "image_id").take(pa.array(group.rows))
            kept = ~evaluation_mask(ids, total, seed)
            return dataclasses.replace(group, rows=group.rows[kept])

        groups = list(map_in_order(left, groups, readers()))
    kind = embeddings.read_metadata(folder, parts[0]).schema.to_arrow_schema().field("vector").type
    stops = np.cumsum([len(group.rows) for group in groups], dtype=np.int64)
    number_type = np.float16 if kind.value_type == pa.float16() else np.float32
    vectors = np.empty((int(stops[-1]), kind.list_size), dtype=number_type)

    def fill(number: int) -> None:
        group, stop = groups[number], stops[number]
        found = embeddings.list_matrix(group.read(folder, "vector"))
        vectors[stop - len(group.rows) : stop] = found[group.rows]

    for _ in map_in_order(fill, range(len(groups)), readers()):
        pass
    return vectors


@dataclasses.dataclass(frozen=True, eq=False)
class _ChosenGroup:
    """A row group of which some rows are wanted, int64, counted from its first."""

    part: Part
    metadata: pq.FileMetaData
    number: int
    rows: NDArray[np.int64]

    def read(self, folder: str, column: str) -> pa.ChunkedArray:
        """Reads one column of the whole group."""
        group = embeddings.read_row_group(folder, self.part, self.metadata, self.number, [column])
        return group[column]


def _chosen_groups(folder: str, parts: Sequence[Part], chosen: NDArray[np.int64]) -> list[_ChosenGroup]:
    """Returns the row groups that hold a chosen row, in order, of all rows of all parts."""
    groups, start = [], 0
    for part in parts:
        wanted = chosen[(chosen >= start) & (chosen < start + part.rows)] - start
        start += part.rows
        if not len(wanted):
            continue
        metadata, first = embeddings.read_metadata(folder, part), 0
        for number in range(metadata.num_row_groups):
            last = first + metadata.row_group(number).num_rows
            rows = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, last)] - first
            if len(rows):
                groups.append(_ChosenGroup(part, metadata, number, rows))
            first = last
    return groups
