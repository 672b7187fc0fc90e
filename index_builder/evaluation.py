"""Measuring a join: recall against exact neighbours, and hits on known right answers."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder import storage
from index_builder.join import JoinSpec, Queries, search_shards
from index_builder.manifests import Part
from index_builder.rules import JoinRules
from index_builder.sampling import sample_rows
from index_builder.shards import IndexDataset, open_shard

CONFIDENCE = 0.95

# Constant bets of the lower bound: the share of the stake that a value of 0 loses, and how the
# stake is spread over them, half of it on the boldest, which is right where no query fails.
_BET_SHARES = np.concatenate([np.arange(1, 20) / 20, [0.99]])
_BET_STAKES = np.concatenate([np.full(19, 0.5 / 19), [0.5]])
_ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Recall:
    """Recall@k of a join: estimate and one-sided lower bound over `queries` sampled of `rows`."""

    estimate: float
    lower_bound: float
    queries: int
    rows: int
    k: int
    seed: int


def measure_recall(
    index: IndexDataset,
    neighbors_folder: str,
    neighbors_parts: Sequence[Part],
    spec: JoinSpec,
    sample: int,
    seed: int,
) -> Recall:
    """Compares a join's neighbours with exact ones for a seeded random sample of its queries.

    The exact neighbours are those of the whole index, under the same rules. Neighbours that tie
    with the k-th exact score count as right. A query without any eligible neighbour has recall 1.
    """
    rows = sample_rows(index.layout.rows, sample, seed)
    queries, scores = _read_queries(index, neighbors_folder, neighbors_parts, spec.rules, rows)
    exact = search_shards(index, queries, spec)
    recalls = np.ones(len(rows))
    for i, (count, found) in enumerate(zip(exact.counts, scores, strict=True)):
        if count:
            right = int((found >= exact.scores[i, count - 1]).sum())
            recalls[i] = min(right, int(count)) / int(count)
    bound = lower_bound(recalls, index.layout.rows)
    return Recall(float(recalls.mean()), bound, len(rows), index.layout.rows, spec.k, seed)


def _read_queries(
    index: IndexDataset,
    neighbors_folder: str,
    neighbors_parts: Sequence[Part],
    rules: JoinRules,
    rows: NDArray[np.int64],
) -> tuple[Queries, list[NDArray[np.float32]]]:
    """Reads the sampled queries, probing every list, and the scores the join found for them.

    A neighbours part has the rows of the index shard with its number, in the same order.
    """
    import pyarrow.parquet as pq

    codes, norms, tables, scores = [], [], [], []
    shards = index.layout.shard_of_rows(rows)
    for number in np.unique(shards):
        with open_shard(index, int(number), ("image_id", *rules.columns, "squared_norm")) as shard:
            local = rows[shards == number] - shard.first_row
            codes.append(shard.codes()[local])
            norms.append(shard.squared_norms()[local])
            tables.append(shard.table.take(local))
        part = neighbors_parts[int(number)]
        path = storage.join(neighbors_folder, part.file(".parquet").path)
        with storage.open_binary(path) as file:
            found = pq.read_table(file, columns=["scores"])["scores"].take(local)
        scores += [np.asarray(row.as_py(), dtype=np.float32) for row in found]
    nlist = index.trained.nlist
    probes = np.tile(np.arange(nlist, dtype=np.int32), (len(rows), 1))
    table = pa.concat_tables(tables)
    vectors, squared = np.concatenate(codes), np.concatenate(norms)
    return Queries.build(vectors, squared, probes, table, rules), scores


def lower_bound(values: NDArray[np.float64], population: int) -> float:
    """Returns a one-sided 95 % lower confidence bound of a mean of values in [0, 1].

    `values` [n] are a random sample, without replacement, of a population of that many; their order
    is of no account. Distribution-free: the betting bound of Waudby-Smith and Ramdas, "Estimating
    means of bounded random variables by betting" (JRSS B 2024), in its form for sampling without
    replacement, with a mixture of constant bets. Normal approximations promise too much where few
    queries fail. A sample of the whole population has no sampling error, so its bound is its mean.
    """
    n = len(values)
    mean = float(values.mean())
    if n >= population:
        return mean
    # A sample comes sorted by row, and failures cluster in lists: betting needs a random order.
    shuffled = np.random.default_rng(_ORDER_SEED).permutation(values)
    low, high = 0.0, mean
    for _ in range(40):
        middle = (low + high) / 2
        if _refuted(shuffled, population, middle):
            low = middle
        else:
            high = middle
    return low


def _refuted(values: NDArray[np.float64], population: int, mean: float) -> bool:
    """Tells whether betting against a population mean ever multiplies the stake by 1 / 0.05.

    Before each value, the mean of what has not been drawn yet follows from the hypothesis; a bet of
    share c multiplies its stake by 1 - c + c value / mean, which is fair if the hypothesis is true.
    """
    drawn = np.concatenate([[0.0], np.cumsum(values)[:-1]])
    waiting = population - np.arange(len(values))
    means = (population * mean - drawn) / waiting
    if (means <= 0).any():
        return True
    shares = _BET_SHARES[:, None]
    capital = np.cumsum(np.log(1 - shares + shares * values / means), axis=1)
    total = np.logaddexp.reduce(capital + np.log(_BET_STAKES)[:, None], axis=0)
    return bool(total.max() >= -math.log(1 - CONFIDENCE))


@dataclasses.dataclass(frozen=True)
class TruthHits:
    """Queries with a known right answer in the catalogue, and hits among their first neighbours."""

    queries: int
    hits_at_1: int
    hits_at_k: int
    k: int

    @property
    def rate_at_1(self) -> float:
        """Share of queries whose best neighbour is right (0 without queries)."""
        return self.hits_at_1 / self.queries if self.queries else 0.0

    @property
    def rate_at_k(self) -> float:
        """Share of queries with a right neighbour among the first k."""
        return self.hits_at_k / self.queries if self.queries else 0.0


def truth_ranks(neighbors: pa.Table, truth: str) -> NDArray[np.int64]:
    """Returns the rank of each query's first right neighbour, int64 [n]; 0 where there is none.

    A neighbour is right when its truth column has the query's value; `neighbors` is a part of the
    neighbours dataset that carries that column.
    """
    ranks = np.zeros(len(neighbors), dtype=np.int64)
    own = neighbors[f"query_{truth}"].to_pylist()
    for i, found in enumerate(neighbors[f"neighbor_{truth}"].to_pylist()):
        if own[i] is not None and own[i] in found:
            ranks[i] = found.index(own[i]) + 1
    return ranks
