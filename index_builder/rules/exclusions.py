"""Pairs that may not be neighbours: from files of pairs to one sorted part a query shard.

The files are read as often as the ids of all query shards fill a group, and once more where the
candidates are another dataset; a join task then loads the pairs of its own queries and no others.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.table_files import as_text, is_text, match_files
from index_builder.errors import ConfigError, DatasetError
from index_builder.rules.rules import ExclusionRule

KIND = "exclusions"
# Raised when the same files and ids give other bytes than before.
REVISION = 1
# The configuration's section, for messages.
SECTION = "join.rules.exclude"

# Ids that are looked up at a time, and pairs read at a time: a look-up costs a pass over both.
_GROUP_IDS = 2_000_000
_BLOCK_PAIRS = 1 << 20
_ROW_GROUP_ROWS = 1 << 16
_MOST_LISTED = 5
_NAMES = ["query_id", "neighbor_id"]
# The column of a sample of queries that holds what each excludes.
_EXCLUDED = "excluded"
_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in _NAMES])


@dataclasses.dataclass(frozen=True)
class ExclusionSpec:
    """Exclusions as asked for.

    `paths` are Parquet files or globs with the two columns `columns`, the ids of a query and of a
    candidate in the index's column `by`; `symmetric` excludes the other direction, too;
    `ignore_unknown` accepts ids that the datasets do not have.
    """

    paths: tuple[str, ...]
    by: str = "image_id"
    columns: tuple[str, str] = ("query_id", "neighbor_id")
    symmetric: bool = False
    ignore_unknown: bool = False


@dataclasses.dataclass(frozen=True)
class ExclusionFiles:
    """Exclusions as they were found: the files, sorted, and the token of each one's content."""

    spec: ExclusionSpec
    paths: tuple[str, ...]
    tokens: tuple[str, ...]

    def rule(self) -> ExclusionRule:
        """Returns what decides about pairs, as the join's rules hold it."""
        spec = self.spec
        return ExclusionRule(self.tokens, spec.by, spec.columns, spec.symmetric)


def find_exclusions(spec: ExclusionSpec) -> ExclusionFiles:
    """Finds the files of pairs and takes the token of each. Raises as `list_exclusion_files` does."""
    paths = list_exclusion_files(spec)
    return ExclusionFiles(spec, paths, tuple(storage.content_tokens(paths)))


def list_exclusion_files(spec: ExclusionSpec) -> tuple[str, ...]:
    """Lists the files of pairs, sorted, after looking at the columns of each.

    Raises ConfigError for a path without files and a column that is missing or holds no ids,
    DatasetError where a file cannot be read.
    """
    paths = tuple(match_files(spec.paths, SECTION, "Parquet files of pairs"))
    for path in paths:
        _check_columns(spec, path)
    return paths


def _check_columns(spec: ExclusionSpec, path: str) -> None:
    with _reading(path) as parquet:
        schema = parquet.schema_arrow
        for key, name in zip(("query_column", "neighbor_column"), spec.columns, strict=True):
            if schema.names.count(name) != 1:
                raise ConfigError(
                    f"{SECTION}.{key}: {path} has {schema.names.count(name)} columns {name!r}, wanted "
                    f"one; its columns are {', '.join(schema.names)}. Correct the name or the file."
                )
            kind = schema.field(name).type
            plain = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (is_text(plain) or pa.types.is_integer(plain)):
                raise ConfigError(
                    f"{SECTION}.{key}: {path} has {name!r} as {kind}, wanted ids as text or whole "
                    "numbers. Name another column, or write it as text."
                )


@contextlib.contextmanager
def _reading(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with storage.open_arrow(path) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} ({SECTION}.paths) cannot be read as Parquet: {error}. Write it again."
        ) from error


@dataclasses.dataclass(frozen=True)
class IdShards:
    """The ids of a dataset, shard by shard: `read(number)` returns a string array."""

    shards: int
    read: Callable[[int], pa.Array]


def exclusions_identity(rule: ExclusionRule, queries: str, candidates: str) -> str:
    """Returns the fingerprint of prepared exclusions; the two texts are the contents of both sides."""
    return fingerprint(
        {
            "kind": KIND,
            "revision": REVISION,
            "rule": dataclasses.asdict(rule),
            "queries": queries,
            "candidates": candidates,
        }
    )


def prepare_exclusions(
    files: ExclusionFiles,
    folder: str,
    identity: str,
    queries: IdShards,
    candidates: IdShards | None = None,
) -> Manifest:
    """Writes the exclusions of every query shard as a dataset, unless that is there already.

    Without `candidates` the queries are the candidates. A part has the columns `query_id` and
    `neighbor_id`, sorted by both, each pair once. Raises DatasetError for ids that are unknown,
    before anything is written.

    Memory: the ids of some query shards, the pairs of one, and two bytes for every pair.
    """
    manifest = manifests.load_if_usable(folder, KIND, identity)
    if manifest is not None:
        return manifest
    with storage.scratch_folder(storage.join(folder, manifests.WORK_FOLDER)) as scratch:
        known = _split(files, queries, candidates, scratch)
        unknown = int(len(known) - known.sum())
        if unknown and not files.spec.ignore_unknown:
            raise _unknown_ids(files, known)
        parts = tuple(
            _write_part(folder, identity, number, os.path.join(scratch, str(number)))
            for number in range(queries.shards)
        )
    manifest = Manifest(
        KIND,
        identity,
        {"code": {"exclusions": REVISION}, "config": dataclasses.asdict(files.rule())},
        embeddings.describe_schema(_SCHEMA),
        parts,
        {"pairs_read": len(known), "pairs_unknown": unknown},
    )
    manifests.commit(folder, manifest)
    return manifest


def read_pairs_of(files: ExclusionFiles, ids: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Returns the excluded pairs of some queries, given their ids, from the files themselves.

    Columns: `query_id`, `neighbor_id`; a pair may be there twice. Every file is read once, a block at a
    time. Raises DatasetError where one cannot be read.
    """
    wanted = pc.unique(ids).drop_null()
    found = [_SCHEMA.empty_table()]
    for block in _blocks(files):
        for pair in (block, block[::-1]) if files.spec.symmetric else (block,):
            table = pa.table(pair, names=_NAMES).filter(pc.is_in(pair[0], value_set=wanted))
            found.append(table.filter(table["neighbor_id"].is_valid()).cast(_SCHEMA))
    return pa.concat_tables(found)


def add_excluded(queries: pa.Table, by: str, pairs: pa.Table) -> pa.Table:
    """Returns a sample of queries with the column `excluded`: what each excludes, a list of ids.

    `pairs` are at least theirs. So they travel with their queries, to tasks that search for a sample.
    """
    found: dict[str, list[str]] = {}
    theirs = pairs.filter(pc.is_in(pairs["query_id"], value_set=pc.unique(queries[by]).drop_null()))
    for query, neighbor in zip(*(theirs[name].to_pylist() for name in _NAMES), strict=True):
        found.setdefault(query, []).append(neighbor)
    excluded = [found.get(query, []) for query in queries[by].to_pylist()]
    return queries.append_column(_EXCLUDED, pa.array(excluded, pa.list_(pa.string())))


def excluded_pairs(queries: pa.Table, by: str) -> pa.Table:
    """Returns the pairs of queries that have them: `query_id`, `neighbor_id`."""
    lists = queries[_EXCLUDED].combine_chunks()
    owners = queries[by].take(pc.list_parent_indices(lists))
    return pa.table({"query_id": owners, "neighbor_id": lists.flatten()})


def _split(
    files: ExclusionFiles, queries: IdShards, candidates: IdShards | None, scratch: str
) -> NDArray[np.bool_]:
    """Writes the pairs of every query shard to scratch; tells which pairs have known ids."""
    both = candidates is None or files.spec.symmetric
    first: list[NDArray[np.bool_]] = []
    second: list[NDArray[np.bool_]] = []
    for group in _groups(queries):
        for number, block in enumerate(_blocks(files)):
            ids = [group.find(block[0]), group.find(block[1]) if both else None]
            _note(first, number, ids[0])
            _note(second, number, ids[1])
            group.write(scratch, ids[0], block)
            if files.spec.symmetric:
                group.write(scratch, ids[1], block[::-1])
    asked = _joined(first), _joined(second)
    if candidates is None:
        return asked[0] & asked[1]
    first, second = [], []
    for group in _groups(candidates):
        for number, block in enumerate(_blocks(files)):
            _note(first, number, group.find(block[0]) if both else None)
            _note(second, number, group.find(block[1]))
    found = _joined(first), _joined(second)
    known = asked[0] & found[1]
    return known | (asked[1] & found[0]) if both else known


def _note(seen: list[NDArray[np.bool_]], number: int, places: NDArray[np.int64] | None) -> None:
    """Adds to the flags of a block which of its ids were found."""
    if places is not None:
        if number == len(seen):
            seen.append(np.zeros(len(places), dtype=bool))
        seen[number] |= places >= 0


def _joined(flags: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(0, dtype=bool), *flags])


def _blocks(files: ExclusionFiles) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yields the two ids of all pairs as text, in the order of the files."""
    for path in files.paths:
        with _reading(path) as parquet:
            for batch in parquet.iter_batches(_BLOCK_PAIRS, columns=list(files.spec.columns)):
                first, second = (as_text(batch.column(name)) for name in files.spec.columns)
                yield first, second


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Ids of some shards: `ids` unique; the shards of id i are `shards[offsets[i]:offsets[i + 1]]`."""

    ids: pa.Array
    offsets: NDArray[np.int64]
    shards: NDArray[np.int64]

    def find(self, ids: pa.Array) -> NDArray[np.int64]:
        """Returns the place of each id among those of the group, int64 [n], -1 where it is not."""
        found = pc.fill_null(pc.index_in(ids, value_set=self.ids, skip_nulls=True), -1)
        places: NDArray[np.int64] = found.to_numpy(zero_copy_only=False).astype(np.int64)
        return places

    def write(
        self, scratch: str, places: NDArray[np.int64] | None, block: tuple[pa.Array, ...]
    ) -> None:
        """Appends pairs to the scratch files of the shards that have their first id."""
        assert places is not None
        rows = np.flatnonzero(places >= 0)
        starts, counts = self.offsets[places[rows]], np.diff(self.offsets)[places[rows]]
        before = np.cumsum(counts) - counts
        shards = self.shards[np.repeat(starts - before, counts) + np.arange(counts.sum())]
        rows = np.repeat(rows, counts)
        for number in np.unique(shards):
            chosen = pa.array(rows[shards == number])
            table = pa.table([column.take(chosen) for column in block], names=_NAMES)
            table = table.filter(pc.and_(table[0].is_valid(), table[1].is_valid()))
            folder = os.path.join(scratch, str(number))
            os.makedirs(folder, exist_ok=True)
            pq.write_table(table, os.path.join(folder, f"{len(os.listdir(folder))}.parquet"))


def _groups(source: IdShards) -> Iterator[_Group]:
    """Yields the ids of all shards, some shards at a time."""
    arrays: list[pa.Array] = []
    numbers: list[int] = []
    for number in range(source.shards):
        arrays.append(source.read(number).drop_null())
        numbers.append(number)
        if sum(map(len, arrays)) >= _GROUP_IDS or number == source.shards - 1:
            encoded = pa.concat_arrays(arrays).dictionary_encode()
            owners = np.repeat(numbers, [len(array) for array in arrays]).astype(np.int64)
            # One number for an id and a shard, so that sorting orders by id, then by shard.
            pairs = np.unique(encoded.indices.to_numpy().astype(np.int64) << 32 | owners)
            counts = np.bincount(pairs >> 32, minlength=len(encoded.dictionary))
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            yield _Group(encoded.dictionary, offsets, pairs & 0xFFFFFFFF)
            arrays, numbers = [], []


def _unknown_ids(files: ExclusionFiles, known: NDArray[np.bool_]) -> DatasetError:
    spec, start = files.spec, 0
    shown: list[str] = []
    for first, second in _blocks(files):
        bad = np.flatnonzero(~known[start : start + len(first)])[: _MOST_LISTED - len(shown)]
        shown += [f"({first[row].as_py()!r}, {second[row].as_py()!r})" for row in bad.tolist()]
        start += len(first)
        if len(shown) == _MOST_LISTED:
            break
    return DatasetError(
        f"{SECTION}: {int((~known).sum()):,} of {len(known):,} pairs name an {spec.by} that is not "
        f"there, the first {', '.join(shown)}; wanted ids of the datasets that are joined. Correct "
        f"the files, or set {SECTION}.unknown_ids: ignore."
    )


def _write_part(folder: str, identity: str, number: int, scratch: str) -> Part:
    """Writes one shard's pairs, sorted, each once."""
    names = sorted(os.listdir(scratch)) if os.path.isdir(scratch) else []
    tables = [pq.read_table(os.path.join(scratch, name)) for name in names]
    empty = pa.table({name: pa.array([], pa.string()) for name in _NAMES})
    table = pa.concat_tables([empty, *tables]).group_by(_NAMES).aggregate([])
    table = table.sort_by([(name, "ascending") for name in _NAMES]).cast(_SCHEMA)
    name = _part_name(number)
    with storage.atomic_path(storage.join(folder, f"{name}.parquet")) as temporary:
        pq.write_table(table, temporary, row_group_size=_ROW_GROUP_ROWS, compression="ZSTD")
    file = manifests.describe_file(folder, f"{name}.parquet")
    return Part(name, identity, len(table), (file,))


def _part_name(number: int) -> str:
    return f"part-{number:05d}"


def read_exclusions(folder: str, number: int) -> pa.Table:
    """Returns the excluded pairs of one query shard: `query_id`, `neighbor_id`.

    Raises DatasetError where the prepared dataset is missing or was changed.
    """
    manifest = manifests.load(folder, KIND)
    path: Any = manifests.verify_file(folder, manifest.parts[number].file(".parquet"))
    with storage.open_arrow(path) as file:
        return pq.read_table(file)
