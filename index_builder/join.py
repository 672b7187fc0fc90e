"""One join task: the k best neighbours of every row of one query shard.

The task streams the corpus shards that its queries probe, one at a time, and keeps its candidates in
memory: one query shard, one corpus shard (mapped) and k slots a query. Rows are scored list by list,
one matrix product a list. Each thread owns a range of the queries and uses single-threaded products.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from index_builder.neighbors import NeighborsSchema, neighbors_table
from index_builder.rules import JoinRules, RuleEncoder
from index_builder.shards import IndexDataset, IndexShard, open_shard, read_shard_table
from index_builder.topk import Block, IdColumn, TopK


@dataclasses.dataclass(frozen=True)
class JoinSpec:
    """What a join finds: k neighbours under the rules, with metadata columns carried along."""

    k: int
    rules: JoinRules = dataclasses.field(default_factory=JoinRules)
    columns: tuple[str, ...] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, wanted at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """Queries of a join: their vectors and norms, the lists each probes, and their columns.

    `probes` int32 [n, nprobe], nearest list first; `table` holds image_id and the rule columns.
    """

    block: Block
    probes: NDArray[np.int32]
    encoder: RuleEncoder

    @staticmethod
    def build(
        vectors: NDArray[np.float16],
        norms: NDArray[np.float64],
        probes: NDArray[np.int32],
        table: pa.Table,
        rules: JoinRules,
    ) -> "Queries":
        """Prepares queries; `table` has their rule columns, in the order of the vectors."""
        encoder = RuleEncoder(rules, table)
        block = Block(vectors.astype(np.float32), norms, encoder.encode(table))
        return Queries(block, probes, encoder)


def join_shard(index: IndexDataset, number: int, spec: JoinSpec) -> pa.Table:
    """Finds the neighbours of every row of one index shard in the whole index.

    Returns the rows of one neighbours part, in the order of the shard. Raises DatasetError when the
    shard's files do not match the manifest.
    """
    with open_shard(index, number, _columns(spec, "squared_norm", "probes"), verify=True) as shard:
        queries = Queries.build(
            shard.codes(), shard.squared_norms(), shard.probes(), shard.table, spec.rules
        )
        table, first_row = shard.table, shard.first_row
    top = search_shards(index, queries, spec, home=number)
    schema = NeighborsSchema(tuple((name, table.schema.field(name).type) for name in spec.columns))
    return neighbors_table(
        schema,
        table,
        first_row,
        top,
        lambda rows: lookup_rows(index, rows, ("image_id", *spec.columns)),
        all_lists_probed=queries.probes.shape[1] == index.trained.nlist,
    )


def _columns(spec: JoinSpec, *more: str) -> tuple[str, ...]:
    return ("image_id", *spec.rules.columns, *spec.columns, *more)


def search_shards(
    index: IndexDataset, queries: Queries, spec: JoinSpec, home: int | None = None
) -> TopK:
    """Finds the k best of the lists that each query probes, over all shards that own such a list.

    The home shard comes first, then those that most queries probe, so that thresholds are tight
    early; the order does not change the result.
    """
    top = TopK(len(queries.block), spec.k, index.id_bytes)
    threads = spec.threads or len(os.sched_getaffinity(0))
    bounds = np.linspace(0, len(queries.block), threads + 1).astype(int)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for number in probed_shards(index, queries.probes, home):
            columns = ("image_id", *spec.rules.columns, "squared_norm")
            with open_shard(index, number, columns) as shard:
                corpus = _Corpus.of(shard, queries.encoder)
                search = functools.partial(_search_range, top, queries, corpus)
                list(pool.map(search, bounds[:-1], bounds[1:]))
    return top


def probed_shards(index: IndexDataset, probes: NDArray[np.int32], home: int | None = None) -> list[int]:
    """Returns the shards that own a probed list: home first, then by the number of probes."""
    layout = index.layout
    by_list = np.bincount(probes.reshape(-1), minlength=index.trained.nlist)
    weights = []
    for shard in range(layout.shards):
        first, last = layout.shard_lists(shard)
        weights.append(int(by_list[first:last].sum()))
    probed = [shard for shard in range(layout.shards) if weights[shard] > 0 or shard == home]
    return sorted(probed, key=lambda shard: (shard != home, -weights[shard], shard))


@dataclasses.dataclass(frozen=True, eq=False)
class _Corpus:
    """A corpus shard made ready for scoring, list by list."""

    shard: IndexShard
    ids: IdColumn
    block: Block

    @staticmethod
    def of(shard: IndexShard, encoder: RuleEncoder) -> "_Corpus":
        # Codes are widened list by list; only norms and rule codes are held for the whole shard.
        empty = np.empty((len(shard.table), 0), dtype=np.float32)
        block = Block(empty, shard.squared_norms(), encoder.encode(shard.table))
        return _Corpus(shard, shard.ids(), block)

    def list_block(self, list_number: int) -> tuple[int, Block]:
        """Returns where a list begins in the shard, and its rows."""
        start, stop = self.shard.layout.list_rows(self.shard.number, list_number)
        rows = self.block.slice(start, stop)
        vectors = self.shard.list_codes(list_number).astype(np.float32)
        return start, Block(vectors, rows.squared_norms, rows.codes)


def _search_range(top: TopK, queries: Queries, corpus: _Corpus, start: int, stop: int) -> None:
    """Scores the queries start to stop against the lists they probe in one shard."""
    nearest, further = queries.probes[start:stop, :1], queries.probes[start:stop, 1:]
    for probes in (nearest, further):
        for list_number, rows in _queries_by_list(probes, corpus.shard.lists):
            offset, block = corpus.list_block(list_number)
            if not len(block):
                continue
            slots = rows + start
            tile = Block(
                queries.block.vectors[slots],
                queries.block.squared_norms[slots],
                queries.block.codes.take(slots),
            )
            ids = corpus.ids.slice(offset, offset + len(block))
            top.offer(slots, tile, block, ids, corpus.shard.first_row + offset)


def _queries_by_list(
    probes: NDArray[np.int32], lists: range
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields each list of a range with the rows of `probes` that name it, ascending."""
    flat = probes.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(lists.start, lists.stop + 1))
    for list_number, first, last in zip(lists, bounds[:-1], bounds[1:], strict=True):
        if last > first:
            yield list_number, order[first:last] // probes.shape[1]


def lookup_rows(index: IndexDataset, rows: NDArray[np.int64], columns: tuple[str, ...]) -> pa.Table:
    """Returns columns of some rows of the index, in the order of `rows`, one shard at a time."""
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    shards = index.layout.shard_of_rows(ascending)
    tables = []
    for number in np.unique(shards):
        first_row, _ = index.layout.shard_rows(int(number))
        table = read_shard_table(index, int(number), columns)
        tables.append(table.take(ascending[shards == number] - first_row))
    if not tables:
        tables.append(read_shard_table(index, 0, columns).slice(0, 0))
    inverse = np.empty(len(rows), dtype=np.int64)
    inverse[order] = np.arange(len(rows))
    return pa.concat_tables(tables).take(inverse)
