"""One join task: the k best neighbours of every row of one query shard.

The task streams the corpus shards that its queries probe, one at a time, and keeps its candidates in
memory: one query shard and one corpus shard (mapped), and k slots a query. Rows are scored list by
list, one matrix product a list. Each thread owns a range of the queries and uses single-threaded
products.
"""

import dataclasses

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.index.shards import (
    IndexDataset,
    IndexShard,
    open_index,
    open_shard,
    read_shard_table,
)
from index_builder.rules.conditions import satisfied
from index_builder.rules.exclusions import read_exclusions
from index_builder.rules.rules import JoinRules, QueryCodes, RuleEncoder
from index_builder.scoring.blocks import Block, PreparedCandidates, PreparedQueries
from index_builder.scoring.list_scan import list_scan
from index_builder.scoring.products import Product
from index_builder.scoring.query_ranges import count_probes
from index_builder.scoring.topk import TopK
from index_builder.scoring.vector_rows import VectorRows
from index_builder.search.compressed_search import propose
from index_builder.search.groups import GroupsRef, with_groups
from index_builder.search.neighbors import EVIDENCE, NeighborsSchema, neighbors_table, slots
from index_builder.search.proposal_scoring import decide

# Neighbours of a row at most: a task keeps room for all of them.
MOST_NEIGHBORS = 10_000


@dataclasses.dataclass(frozen=True)
class JoinSpec:
    """What a join finds: k neighbours under the rules, with metadata columns carried along.

    Rows left with fewer than k are searched again over `max_probe` lists (None: four times the
    index's nprobe; 0: never). `evidence` are keys of neighbors.EVIDENCE, `exclusions` is the folder of
    the prepared pairs where the rules exclude some, `groups` the dataset whose columns rules or
    `columns` name. `product` proposes candidates (None: the fastest product of the host)
    until its rounding lets too many through; like `threads` it does not change the result.
    """

    k: int
    rules: JoinRules = dataclasses.field(default_factory=JoinRules)
    columns: tuple[str, ...] = ()
    threads: int | None = None
    max_probe: int | None = None
    evidence: tuple[str, ...] = ()
    exclusions: str | None = None
    groups: GroupsRef | None = None
    product: Product | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, wanted at least 1")
        if self.k > MOST_NEIGHBORS:
            raise ValueError(
                f"k is {self.k}, wanted at most {MOST_NEIGHBORS}: a task keeps room for all of them. "
                "Lower it."
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(
                f"threads is {self.threads}, wanted at least 1. Leave it out for those of all cores."
            )
        if self.max_probe is not None and self.max_probe < 0:
            raise ValueError(
                f"max_probe is {self.max_probe}, wanted at least 0: no second search. Leave it out for "
                "four times nprobe."
            )
        unknown = [name for name in self.evidence if name not in EVIDENCE]
        if unknown:
            raise ValueError(f"evidence is {unknown[0]!r}, wanted one of {', '.join(EVIDENCE)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """Queries of a join: their vectors and norms, the lists each probes, and their columns.

    `probes` int32 [n, nprobe], nearest list first; `table` holds image_id and the rule columns.
    """

    block: Block[QueryCodes]
    probes: NDArray[np.int32]
    encoder: RuleEncoder

    @staticmethod
    def build(
        vectors: VectorRows,
        norms: NDArray[np.float64],
        probes: NDArray[np.int32],
        table: pa.Table,
        rules: JoinRules,
        exclusions: pa.Table | None = None,
        *,
        single_images: bool = False,
        own_rows: NDArray[np.int64] | None = None,
    ) -> "Queries":
        """Prepares queries; `table` has their rule columns, in the order of the vectors.

        `exclusions` and `single_images` are as RuleEncoder takes them, and so are `own_rows` where no
        item has a second image.
        """
        encoder = RuleEncoder(
            rules,
            table,
            exclusions,
            single_images=single_images,
            own_rows=own_rows if single_images else None,
        )
        block = Block(vectors, norms, encoder.encode_queries(table))
        return Queries(block, probes, encoder)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredQueries:
    """The queries of one join task as a shard holds them.

    `vectors` are transformed; `squared_norms` float64 [n], `probes` int32 [n, nprobe];
    `table` has image_id, the rule columns and the carried ones. `first_row` is the number of the
    first in the dataset they are from, `home` the index shard whose rows they are, or None;
    `exclusions` are the pairs that they exclude, where the rules have such pairs.
    """

    vectors: VectorRows
    squared_norms: NDArray[np.float64]
    probes: NDArray[np.int32]
    table: pa.Table
    first_row: int
    home: int | None = None
    exclusions: pa.Table | None = None

    def asked(self, rules: JoinRules) -> NDArray[np.int64]:
        """Returns the places of the queries that the rules let ask for neighbours."""
        return np.flatnonzero(satisfied(rules.queries, self.table))


def open_joined(folder: str, spec: JoinSpec) -> IndexDataset:
    """Opens the index of a join, with the columns of its groups where the spec has some.

    Raises DatasetError for a missing or damaged dataset, FingerprintError for groups of another index.
    """
    index = open_index(folder)
    return index if spec.groups is None else with_groups(index, spec.groups)


def join_shard(index: IndexDataset, number: int, spec: JoinSpec) -> pa.Table:
    """Finds the neighbours of every row of one index shard in the whole index.

    Returns the rows of one neighbours part, in the order of the shard. Raises DatasetError when the
    shard's files do not match the manifest.
    """
    stored = read_index_queries(index, number, spec)
    return join_queries(index, stored, spec)


def read_index_queries(index: IndexDataset, number: int, spec: JoinSpec) -> StoredQueries:
    """Reads the rows of one index shard as queries, after verifying its files."""
    pairs = None if spec.exclusions is None else read_exclusions(spec.exclusions, number)
    with open_shard(index, number, _columns(spec, "squared_norm", "probes"), verify=True) as shard:
        return StoredQueries(
            shard.vectors(),
            shard.squared_norms(),
            shard.probes(),
            shard.table,
            shard.first_row,
            number,
            pairs,
        )


def join_queries(index: IndexDataset, stored: StoredQueries, spec: JoinSpec) -> pa.Table:
    """Finds the neighbours of stored queries in the whole index: the rows of one neighbours part.

    A query that the rules leave out has no row.
    """
    asked = stored.asked(spec.rules)
    return find_neighbors(index, stored, spec, asked, stored.probes[asked])


def find_neighbors(
    index: IndexDataset,
    stored: StoredQueries,
    spec: JoinSpec,
    places: NDArray[np.int64],
    probes: NDArray[np.int32],
) -> pa.Table:
    """Finds the neighbours of some stored queries in the lists of `probes`, int32 [n, lists].

    `places` are those of the n queries, ascending.
    """
    # Most often they are all of them, and then nothing is copied.
    everyone = len(places) == len(stored.table)
    table = stored.table if everyone else stored.table.take(pa.array(places))
    queries = Queries.build(
        stored.vectors if everyone else stored.vectors.take(places),
        stored.squared_norms if everyone else stored.squared_norms[places],
        probes,
        table,
        spec.rules,
        stored.exclusions,
        single_images=index.single_images,
        own_rows=None if stored.home is None else stored.first_row + places,
    )
    top = search_shards(index, queries, spec, home=stored.home)
    columns = tuple((name, table.schema.field(name).type) for name in spec.columns)
    return neighbors_table(
        NeighborsSchema(columns, spec.evidence),
        table,
        stored.first_row + places,
        top,
        lambda rows: lookup_rows(index, rows, ("image_id", *spec.columns)),
        k=spec.k,
        all_lists_probed=probes.shape[1] == index.trained.nlist,
    )


def _columns(spec: JoinSpec, *more: str) -> tuple[str, ...]:
    return ("image_id", *spec.rules.columns, *spec.columns, *more)


def search_shards(
    index: IndexDataset, queries: Queries, spec: JoinSpec, home: int | None = None
) -> TopK:
    """Finds the k best of the lists that each query probes, over all shards that own such a list.

    One more is kept of each where the evidence wants it (`slots`).
    The home shard comes first, then those that most queries probe, so that thresholds are tight
    early; the order does not change the result.
    """
    if index.refine is None or not len(queries.block):
        return _search_vectors(index, queries, spec, home)
    kept = index.refine * slots(spec.k, spec.evidence)
    return _search_codes(index, queries, spec, min(index.layout.rows, kept), home)


def _search_codes(
    index: IndexDataset, queries: Queries, spec: JoinSpec, kept: int, home: int | None
) -> TopK:
    """The same by codes: `kept` rows of each query are proposed, and their vectors decide.

    A query that is left with fewer than k, though there is more than what was proposed, is searched
    again by vectors: caps let few of its proposals pass.
    """
    columns = ("image_id", *spec.rules.candidate_columns)
    order = probed_shards(index, queries.probes, home)
    encoder, probes, threads = queries.encoder, queries.probes, spec.threads
    proposals = propose(index, queries.block, probes, encoder, order, columns, kept, threads)
    rows, counts = proposals.finish()
    top = _empty_top(index, queries, spec)
    decide(index, queries.block, probes, encoder, (rows, counts), columns[1:], top, threads)
    wanted = slots(spec.k, spec.evidence)
    short = np.flatnonzero((top.counts < wanted) & (counts == kept))
    if len(short):
        block = queries.block
        again = Block(block.vectors.take(short), block.squared_norms[short], block.codes.take(short))
        found = _search_vectors(index, Queries(again, probes[short], encoder), spec, home)
        top.scores[short], top.rows[short], top.counts[short] = found.scores, found.rows, found.counts
    return top


def _empty_top(index: IndexDataset, queries: Queries, spec: JoinSpec) -> TopK:
    transform = index.trained.transform
    wanted = slots(spec.k, spec.evidence)
    return TopK(
        len(queries.block),
        wanted,
        index.id_bytes,
        transform.metric,
        transform.unscale,
        queries.encoder.caps,
    )


def _search_vectors(index: IndexDataset, queries: Queries, spec: JoinSpec, home: int | None) -> TopK:
    """The same by vectors alone: every row of the lists is scored."""
    top = _empty_top(index, queries, spec)
    prepared = PreparedQueries.of(queries.block)
    with list_scan(top, prepared, queries.probes, spec.threads, spec.product) as scan:
        for number in probed_shards(index, queries.probes, home):
            columns = ("image_id", *spec.rules.candidate_columns, "squared_norm")
            with open_shard(index, number, columns) as shard:
                corpus = _Corpus(shard, queries.encoder)
                scan.run(shard.lists, corpus.candidates)
            queries.encoder.bound_caps(top.cap_codes)
    return top


def probed_shards(index: IndexDataset, probes: NDArray[np.int32], home: int | None = None) -> list[int]:
    """Returns the shards that own a probed list: home first, then by the number of probes."""
    layout = index.layout
    by_list = count_probes(probes, index.trained.nlist)
    weights = []
    for shard in range(layout.shards):
        first, last = layout.shard_lists(shard)
        weights.append(int(by_list[first:last].sum()))
    probed = [shard for shard in range(layout.shards) if weights[shard] > 0 or shard == home]
    return sorted(probed, key=lambda shard: (shard != home, -weights[shard], shard))


class _Corpus:
    """A corpus shard made ready for scoring, list by list, as its lists are asked for.

    Codes stay where they are mapped; norms, ids and rule codes are held for the whole shard.
    """

    def __init__(self, shard: IndexShard, encoder: RuleEncoder) -> None:
        self._shard = shard
        self._ids = shard.ids()
        self._vectors, self._norms = shard.vectors(), shard.squared_norms()
        self._codes = encoder.encode_candidates(shard.table, shard.first_row)
        self._prepared: dict[int, PreparedCandidates] = {}

    def candidates(self, list_number: int) -> PreparedCandidates:
        """Returns the rows of a list; two threads that prepare it at once make the same."""
        found = self._prepared.get(list_number)
        if found is None:
            start, stop = self._shard.layout.list_rows(self._shard.number, list_number)
            block = Block(
                self._vectors.slice(start, stop),
                self._norms[start:stop],
                self._codes.slice(start, stop),
            )
            ids = self._ids.slice(start, stop)
            found = PreparedCandidates.of(block, ids, self._shard.first_row + start)
            self._prepared[list_number] = found
        return found


def lookup_rows(index: IndexDataset, rows: NDArray[np.int64], columns: tuple[str, ...]) -> pa.Table:
    """Returns columns of some rows of the index, in the order of `rows`, one shard at a time."""
    first = index.layout.shard_offsets
    owner = np.searchsorted(first[1:-1], rows, side="right")
    wanted = np.flatnonzero(np.bincount(owner, minlength=1))
    if len(wanted) <= 1:
        number = int(wanted[0]) if len(wanted) else 0
        return read_shard_table(index, number, columns).take(pa.array(rows - first[number]))
    # Numbers of 16 bits are sorted in linear time.
    narrow = owner.astype(np.int16) if index.layout.shards < 1 << 15 else owner
    order = np.argsort(narrow, kind="stable")
    bounds = np.searchsorted(owner[order], np.append(wanted, index.layout.shards))
    tables = []
    for place, number in enumerate(wanted):
        table = read_shard_table(index, int(number), columns)
        asked = rows[order[bounds[place] : bounds[place + 1]]]
        tables.append(table.take(pa.array(asked - first[number])))
    inverse = np.empty(len(rows), dtype=np.int64)
    inverse[order] = np.arange(len(rows))
    return pa.concat_tables(tables).take(pa.array(inverse))
