"""The groups dataset: near-duplicates as connected components, with a representative each.

A part has the rows of the index shard with its number, in the same order, so that its columns can be
read as if they were the index's own (`with_groups`).
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from index_builder.datasets import manifests
from index_builder.datasets.embeddings import describe_schema
from index_builder.errors import FingerprintError
from index_builder.index.shards import ColumnsBeside, IndexDataset, read_shard_table

KIND = "groups"
# What rules and exports may name once there are groups.
COLUMNS = ("group", "is_representative", "group_size")

# Edges that are merged at a time, at least.
_EDGES_AT_ONCE = 1 << 20

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("is_representative", pa.bool_(), nullable=False),
        pa.field("group_size", pa.int32(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """All groups of two rows or more.

    `rows` int64 [m] are rows of the index, ascending, and `labels` int32 [m] the number of the group
    of each, from 0.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int32]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The rows of each group."""
        return np.bincount(self.labels).astype(np.int64)


def connect(forests: Iterable[NDArray[np.int64]]) -> Groups:
    """Returns the connected components of edges, int64 [edges, 2] each, in rows of the index.

    Memory: about 130 bytes for every row that is in a group, and the largest forest; nothing that
    grows with other rows, or with the edges between the same rows in several forests.
    """
    found = Groups(np.empty(0, np.int64), np.empty(0, np.int32))
    waiting: list[NDArray[np.int64]] = []
    edges = 0
    for forest in forests:
        waiting.append(forest)
        edges += len(forest)
        # As many new edges as there were rows: so every row is numbered a few times only.
        if edges >= max(_EDGES_AT_ONCE, len(found.rows)):
            found, waiting, edges = _add_edges(found, waiting), [], 0
    return _add_edges(found, waiting)


def _add_edges(found: Groups, forests: list[NDArray[np.int64]]) -> Groups:
    """Returns the components of some groups and more edges, numbered by their smallest rows."""
    firsts = found.rows[np.unique(found.labels, return_index=True)[1]]
    star = np.stack([firsts[found.labels], found.rows], axis=1)
    edges = np.concatenate([star, *forests])
    rows, places = np.unique(edges, return_inverse=True)
    places = places.reshape(-1, 2).astype(np.int32)
    del edges, star
    ones = np.ones(len(places), dtype=np.int8)
    graph = coo_array((ones, (places[:, 0], places[:, 1])), shape=(len(rows), len(rows)))
    _, labels = connected_components(graph.tocsr(), directed=False)
    return Groups(rows, labels.astype(np.int32))


def group_tables(index: IndexDataset, groups: Groups) -> Iterator[pa.Table]:
    """Yields the rows of every part, one index shard after another.

    A group is named by its representative: the smallest image id by bytes. A row that is near no
    other is a group of its own. Memory: the ids of all rows that are in groups, and one shard's.
    """
    numbers = range(index.layout.shards)
    bounds = np.searchsorted(groups.rows, [index.layout.shard_rows(number) for number in numbers])
    grouped = [pa.chunked_array([], pa.string())]
    for number, (start, stop) in zip(numbers, bounds, strict=True):
        if stop > start:
            local = groups.rows[start:stop] - index.layout.shard_rows(number)[0]
            grouped.append(read_shard_table(index, number, ("image_id",))["image_id"].take(local))
    ids = pa.chunked_array([chunk for column in grouped for chunk in column.chunks], pa.string())
    table = pa.table({"label": pa.array(groups.labels), "image_id": ids})
    order = pc.sort_indices(table, [("label", "ascending"), ("image_id", "ascending")]).to_numpy()
    # The first of each label in that order; labels have no gaps.
    first = order[np.unique(groups.labels[order], return_index=True)[1]]
    is_first = np.zeros(len(groups.rows), dtype=bool)
    is_first[first] = True
    names, sizes = ids.take(first), groups.sizes
    for number, (start, stop) in zip(numbers, bounds, strict=True):
        own = read_shard_table(index, number, ("image_id",))["image_id"]
        labels = groups.labels[start:stop]
        local = groups.rows[start:stop] - index.layout.shard_rows(number)[0]
        source = np.arange(len(own))
        source[local] = len(own) + np.arange(len(local))
        representative = np.ones(len(own), dtype=bool)
        representative[local] = is_first[start:stop]
        size = np.ones(len(own), dtype=np.int32)
        size[local] = sizes[labels]
        group = pa.chunked_array([*own.chunks, *names.take(labels).chunks], pa.string()).take(source)
        yield pa.table([own, group, pa.array(representative), pa.array(size)], schema=SCHEMA)


@dataclasses.dataclass(frozen=True)
class GroupsRef:
    """A finished groups dataset, as a join names it: where it is, and the digest of its content."""

    folder: str
    content: str


def with_groups(index: IndexDataset, ref: GroupsRef) -> IndexDataset:
    """Returns an index whose shards also have the columns of its groups dataset.

    Raises DatasetError where there is none, FingerprintError where it is of another index or has
    another content than was asked for.
    """
    folder = ref.folder
    manifest = manifests.load(folder, KIND)
    if manifest.content != ref.content:
        raise FingerprintError(
            f"The groups {folder} have content {manifest.content}, wanted {ref.content}: they were "
            "made again meanwhile. Run the join again."
        )
    found, wanted = manifest.properties.get("index"), index.manifest.content
    if found != wanted:
        raise FingerprintError(
            f"The groups {folder} are of an index with content {found}, but {index.folder} has "
            f"{wanted}. Run kith groups for this index, or name the index that they were made of."
        )
    fields = tuple(field for field in describe_schema(SCHEMA) if field["name"] in COLUMNS)
    beside = ColumnsBeside(folder, manifest.parts, fields)
    return dataclasses.replace(index, beside=beside)
