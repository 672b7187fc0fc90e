"""Rows that one pass left with fewer than k neighbours: whether there are more, and where to look.

How many candidates a query can have at most is counted first, over the rule columns of the whole
index. Rows that have as many are exhausted; the others are searched again over more lists, by the
same search, and replaced. The remaining rows and their order stay.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_builder.assignment import nearest_lists
from index_builder.conditions import satisfied
from index_builder.join import JoinSpec, StoredQueries, find_neighbors
from index_builder.neighbors import CAPPED, EXHAUSTED
from index_builder.rules import OWN_ITEM, JoinRules
from index_builder.shards import IndexDataset, read_shard_table

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

    `counts` is that of `count_all`; `indexed` says that the queries are rows of the index. Columns
    that must differ and excluded pairs are not counted, so it is no tight bound where there are some.
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
    table = _settle(index, stored, spec, table, places, counts)
    lists = lists_at_most(index, spec)
    capped = _capped(table)
    if not lists or not len(capped):
        return table, 0
    trained = index.trained
    probes = nearest_lists(
        stored.codes[places[capped]],
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
    return _settle(index, stored, spec, table, places, counts), len(capped)


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


def _settle(
    index: IndexDataset,
    stored: StoredQueries,
    spec: JoinSpec,
    table: pa.Table,
    places: NDArray[np.int64],
    counts: pa.Table | None,
) -> pa.Table:
    """Marks capped rows as exhausted that have all the neighbours that they can have."""
    capped = _capped(table)
    if not len(capped):
        return table
    queries = stored.table.take(pa.array(places[capped]))
    possible = most_possible(index, queries, spec.rules, counts, indexed=stored.home is not None)
    found = pc.list_value_length(table["neighbor_ids"]).to_numpy()[capped]
    status = np.array(table["status"].to_pylist(), dtype=object)
    status[capped[possible <= found]] = EXHAUSTED
    place = table.schema.get_field_index("status")
    return table.set_column(place, table.schema.field(place), pa.array(status, pa.string()))
