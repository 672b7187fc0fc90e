"""Rows that one pass left with fewer than k neighbours: whether there are more, and where to look.

How many candidates a query can have at most is counted first, over the rule columns of the whole
index: by sums that all tasks share, and where those are no exact answer, query by query
(`candidate_counts`). Rows that have all their candidates are exhausted; the others are searched again
over more lists, by the same search, and replaced. The remaining rows and their order stay.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_builder.index.assignment import nearest_lists
from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.rules.conditions import satisfied
from index_builder.rules.rules import OWN_ITEM, JoinRules
from index_builder.search.candidate_counts import Possible, count_possible
from index_builder.search.join import JoinSpec, StoredQueries, find_neighbors
from index_builder.search.neighbors import CAPPED, EXHAUSTED

# `max_probe: auto` is so many times the lists of the first pass.
AUTO_FACTOR = 4
_COUNT = "candidates"


def lists_at_most(index: IndexDataset, spec: JoinSpec) -> int:
    """Returns how many lists a second search probes; 0 where it would probe no more than the first."""
    wanted = AUTO_FACTOR * index.nprobe if spec.max_probe is None else spec.max_probe
    lists = min(wanted, index.trained.nlist)
    return lists if lists > index.nprobe else 0


def needs_counts(rules: JoinRules) -> bool:
    """Tells whether the rules make some candidates of the index ineligible for everyone or by value."""
    return bool(rules.same or rules.candidates)


def count_candidates(index: IndexDataset, number: int, rules: JoinRules) -> pa.Table:
    """Counts the items of an index shard that may be neighbours, for all values of `rules.same`.

    Returns the columns of `same` and int64 `candidates`, without rows where one of them is null.
    """
    columns = tuple(dict.fromkeys((OWN_ITEM, *rules.same, *(c.column for c in rules.candidates))))
    table = read_shard_table(index, number, columns)
    table = table.filter(pa.array(satisfied(rules.candidates, table)))
    for name in rules.same:
        table = table.filter(table[name].is_valid())
    same = list(dict.fromkeys(rules.same))
    items = table.group_by(list(dict.fromkeys((*same, OWN_ITEM)))).aggregate([])
    return merge_counts([_with_count(items.select(same), np.ones(len(items), dtype=np.int64))])


def _with_count(table: pa.Table, counts: NDArray[np.int64]) -> pa.Table:
    arrays = {name: table[name] for name in table.column_names}
    return pa.table(arrays | {_COUNT: pa.array(counts)})


def merge_counts(blocks: Iterable[pa.Table]) -> pa.Table:
    """Adds up the counts of several shards.

    An item whose images are in several shards counts in each: the sums are upper bounds.
    """
    table = pa.concat_tables(list(blocks))
    same = [name for name in table.column_names if name != _COUNT]
    if not same:
        total = pc.sum(table[_COUNT]).as_py() or 0
        return pa.table({_COUNT: pa.array([total], pa.int64())})
    summed = table.group_by(same).aggregate([(_COUNT, "sum")])
    return _with_count(summed.select(same), summed[f"{_COUNT}_sum"].to_numpy())


def count_all(index: IndexDataset, rules: JoinRules) -> pa.Table | None:
    """Counts the candidates of the whole index, or returns None where the rules need no counting."""
    if not needs_counts(rules):
        return None
    return merge_counts(count_candidates(index, number, rules) for number in range(index.layout.shards))


def most_possible(
    index: IndexDataset,
    queries: pa.Table,
    rules: JoinRules,
    counts: pa.Table | None,
    *,
    indexed: bool,
) -> NDArray[np.int64]:
    """Returns an upper bound of the neighbours that each query can have, int64 [n].

    `counts` is that of `count_all`; `indexed` says that the queries are rows of the index. It is exact
    where `sums_are_exact`.
    """
    n = len(queries)
    if counts is None:
        possible = np.full(n, index.layout.rows, dtype=np.int64)
    elif not rules.same:
        possible = np.full(n, counts[_COUNT][0].as_py(), dtype=np.int64)
    else:
        same = list(dict.fromkeys(rules.same))
        asked = queries.select(same).append_column("place", pa.array(np.arange(n)))
        found = asked.join(counts, same, join_type="inner")
        possible = np.zeros(n, dtype=np.int64)
        possible[found["place"].to_numpy()] = found[_COUNT].to_numpy()
    if indexed:
        # The query's own item is among those that were counted, unless a condition left it out.
        possible -= satisfied(rules.candidates, queries) & (possible > 0)
    return possible


def sums_are_exact(index: IndexDataset, rules: JoinRules, *, indexed: bool) -> bool:
    """Tells whether `most_possible` is what queries can have, rather than an upper bound.

    It leaves out items with several images, columns that must differ, excluded pairs, caps, and the
    items of queries that are not rows of the index.
    """
    more_rules = rules.different or rules.max_per or rules.exclude is not None
    return indexed and index.single_images and not more_rules


def search_again(
    index: IndexDataset,
    stored: StoredQueries,
    spec: JoinSpec,
    table: pa.Table,
    counts: pa.Table | None,
) -> tuple[pa.Table, int]:
    """Settles the rows of a neighbours part that are `capped`.

    `table` is what `join_queries` made of `stored`. Returns the part with its rows in the same order,
    and how many of them were searched again.
    """
    places = stored.asked(spec.rules)
    first = _capped(table)
    if not len(first):
        return table, 0
    possible = _possible(index, stored, spec, places[first], counts, _lengths(table)[first])
    # Whoever has all images that the rules allow has the best of them, too.
    table = _mark_exhausted(table, first, possible.images)
    lists = lists_at_most(index, spec)
    capped = _capped(table)
    if lists and len(capped):
        trained = index.trained
        probes = nearest_lists(
            stored.vectors.take(places[capped]).matrix(),
            trained.centroids,
            lists,
            trained.transform.metric,
            spec.threads,
            spec.product,
        )
        probes = with_first_probes(probes, stored.probes[places[capped]])
        again = find_neighbors(index, stored, spec, places[capped], probes)
        rows = np.arange(len(table))
        rows[capped] = len(table) + np.arange(len(capped))
        table = pa.concat_tables([table, again]).take(pa.array(rows)).combine_chunks()
    return _mark_exhausted(table, first, possible.neighbors), len(capped) if lists else 0


def with_first_probes(wider: NDArray[np.int32], first: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns `wider` [n, lists] with all of `first` [n, nprobe] among each row's lists.

    They are its beginning already where lists are ranked exactly. Where a graph proposes them, a
    larger request may miss one, and what the first search found must not be lost.
    """
    probes = wider.copy()
    for row in np.flatnonzero((wider[:, : first.shape[1]] != first).any(axis=1)):
        others = wider[row][~np.isin(wider[row], first[row])]
        probes[row] = np.concatenate([first[row], others])[: wider.shape[1]]
    return probes


def _capped(table: pa.Table) -> NDArray[np.int64]:
    return np.flatnonzero(pc.equal(table["status"], CAPPED).to_numpy())


def _lengths(table: pa.Table) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = pc.list_value_length(table["neighbor_ids"]).to_numpy()
    return lengths


def _possible(
    index: IndexDataset,
    stored: StoredQueries,
    spec: JoinSpec,
    places: NDArray[np.int64],
    counts: pa.Table | None,
    found: NDArray[np.int64],
) -> Possible:
    """Returns what some stored queries can find, of which `found` was: int64 [n], up to k.

    Every query is counted by itself that the sums leave more than it has; where items have several
    images, every query is: the sums are of items.
    """
    queries, indexed = stored.table.take(pa.array(places)), stored.home is not None
    most = np.minimum(most_possible(index, queries, spec.rules, counts, indexed=indexed), spec.k)
    images, neighbors = most.copy(), most.copy()
    unsure = np.flatnonzero((most > found) | (not index.single_images))
    if len(unsure) and not sums_are_exact(index, spec.rules, indexed=indexed):
        exact = count_possible(
            index, queries.take(pa.array(unsure)), spec.rules, spec.k, stored.exclusions
        )
        images[unsure], neighbors[unsure] = exact.images, exact.neighbors
    return Possible(images, neighbors)


def _mark_exhausted(table: pa.Table, rows: NDArray[np.int64], possible: NDArray[np.int64]) -> pa.Table:
    """Marks those of some rows that are capped though they have as many as is possible, int64 [n]."""
    status = np.array(table["status"].to_pylist(), dtype=object)
    status[rows[(status[rows] == CAPPED) & (possible <= _lengths(table)[rows])]] = EXHAUSTED
    place = table.schema.get_field_index("status")
    return table.set_column(place, table.schema.field(place), pa.array(status, pa.string()))
