"""Measuring a join: recall against exact neighbours, and hits on known right answers."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, storage
from index_builder.datasets.manifests import Part
from index_builder.index.shards import IndexDataset, open_shard, read_shard_table
from index_builder.index.transform import Transform
from index_builder.recall.confidence import lower_bound
from index_builder.recall.query_sample import QuerySample, choose_queries, require_queries
from index_builder.recall.recall import Certificate, Promise, recalls_of_values
from index_builder.rules.conditions import satisfied
from index_builder.rules.exclusions import add_excluded, excluded_pairs, read_exclusions
from index_builder.rules.rules import IMAGE, JoinRules
from index_builder.search.corpus import Corpus
from index_builder.search.exact_search import ExactSearch, merge_found, search_part, searchable_rules
from index_builder.search.join import JoinSpec

# Queries of the sample that are also searched for in the encoder's own space.
ENCODER_QUERIES = 250


def draw_queries(
    index: IndexDataset, number: int, spec: JoinSpec, sample: QuerySample, by: str | None = None
) -> pa.Table:
    """Returns the rows of an index shard that may be in the sample, as `choose_queries` takes them.

    Columns: image_id, the rule columns of queries, `index_row` int64 and `shard` int32, `code` float16
    [dim], the sample's `key`, the column `by` as `value`, and what `add_excluded` adds where pairs are
    excluded. Rows that the rules do not let ask for neighbours are no queries.
    """
    names = (IMAGE, *spec.rules.query_columns, *([] if by is None else [by]))
    table = read_shard_table(index, number, names)
    rows, keys = sample.candidates(table[IMAGE])
    first_row, _ = index.layout.shard_rows(number)
    table = table.take(pa.array(rows))
    values = pa.nulls(len(rows), pa.string()) if by is None else table[by].cast(pa.string())
    columns = {
        "index_row": pa.array(first_row + rows),
        "shard": pa.array(np.full(len(rows), number, dtype=np.int32)),
        "key": pa.array(keys),
        "value": values,
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    asked = np.flatnonzero(satisfied(spec.rules.queries, table))
    # Only those that can be chosen in the end need their vectors.
    kept = asked[sample.choose(keys[asked])]
    with open_shard(index, number, (IMAGE,)) as shard:
        codes = shard.vectors().take(rows[kept]).matrix()
    table = table.take(pa.array(kept)).append_column("code", embeddings.list_array(codes))
    if spec.rules.exclude is None or spec.exclusions is None:
        return table
    return add_excluded(table, spec.rules.exclude.by, read_exclusions(spec.exclusions, number))


def search_exactly(index: IndexDataset, number: int, queries: pa.Table, spec: JoinSpec) -> pa.Table:
    """Finds the k best neighbours of the sample among all rows of one index shard.

    Columns: `query` int32 (its place in the sample), `score` float32, `index_row` int64, image_id and
    the rule columns of candidates.
    """
    columns = (IMAGE, *spec.rules.candidate_columns)
    search = ExactSearch(
        embeddings.list_matrix(queries["code"]),
        queries,
        spec.k,
        spec.rules,
        index.trained.metric,
        index.trained.transform.unscale,
        _excluded(queries, spec),
    )
    with open_shard(index, number, columns) as shard:
        numbers = np.arange(shard.first_row, shard.first_row + len(shard.table), dtype=np.int64)
        table = shard.table.append_column("index_row", pa.array(numbers))
        return search.search([(table, shard.vectors().matrix())])


def _excluded(queries: pa.Table, spec: JoinSpec) -> pa.Table | None:
    exclude = spec.rules.exclude
    return None if exclude is None else excluded_pairs(queries, exclude.by)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The recall of each query of a sample, float64 [n], with the query's id and value.

    `found` are the ids that the join has for the first ENCODER_QUERIES of them.
    """

    image_ids: list[str]
    recalls: NDArray[np.float64]
    values: list[str | None]
    found: list[list[str]]


def compare_with_join(
    queries: pa.Table, exact: pa.Table, neighbors_folder: str, parts: Sequence[Part]
) -> Measured:
    """Compares a join's neighbours with the exact ones of a sample of its queries.

    `exact` is what `search_exactly` found in all shards, merged. A neighbour is right when it is among
    the exact ones, or ties with the last of them. A query without any exact neighbour has recall 1, one
    that the join has no row for has 0. Raises DatasetError for an empty sample.
    """
    require_queries(len(queries))
    joined = _read_joined(queries, neighbors_folder, parts)
    owners = exact["query"].to_numpy()
    bounds = np.searchsorted(owners, np.arange(len(queries) + 1))
    rows, scores = exact["index_row"].to_numpy(), exact["score"].to_numpy()
    recalls = np.ones(len(queries))
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            found_rows, found_scores, _ = joined[i]
            right = np.isin(found_rows, rows[start:stop]) | (found_scores == scores[stop - 1])
            distinct = len(np.unique(found_rows[right]))
            recalls[i] = min(distinct, stop - start) / (stop - start)
    return Measured(
        queries[IMAGE].to_pylist(),
        recalls,
        queries["value"].to_pylist(),
        [found for _, _, found in joined[:ENCODER_QUERIES]],
    )


_Joined = tuple[NDArray[np.int64], NDArray[np.float32], list[str]]


def _read_joined(queries: pa.Table, folder: str, parts: Sequence[Part]) -> list[_Joined]:
    """Returns rows, scores and ids of the neighbours of the sampled queries; none where it has none.

    The part of an index shard has the shard's number.
    """
    none = (np.empty(0, np.int64), np.empty(0, np.float32), list[str]())
    joined: list[_Joined] = [none] * len(queries)
    shards, wanted = queries["shard"].to_numpy(), queries["index_row"]
    columns = ["query_row", "neighbor_rows", "scores", "neighbor_ids"]
    for number in np.unique(shards):
        places = np.flatnonzero(shards == number)
        with storage.open_arrow(storage.join(folder, parts[number].file(".parquet").path)) as file:
            table = pq.read_table(file, columns=columns)
        at = pc.index_in(wanted.take(pa.array(places)), value_set=table["query_row"].combine_chunks())
        at = pc.fill_null(at, -1).to_numpy()
        for place, row in zip(places[at >= 0], at[at >= 0], strict=True):
            found = table.slice(row, 1).to_pylist()[0]
            joined[place] = (
                np.asarray(found["neighbor_rows"], dtype=np.int64),
                np.asarray(found["scores"], dtype=np.float32),
                found["neighbor_ids"],
            )
    return joined


def certify(
    measured: Measured,
    index: IndexDataset,
    k: int,
    promise: Promise,
    attempt: int,
    by: str | None = None,
    rows_of: Mapping[str | None, int] | None = None,
    encoder: tuple[float | None, int] = (None, 0),
) -> Certificate:
    """Returns the certificate of a join of which a sample was measured.

    `rows_of` are the numbers of queries with each value of the column `by`; `encoder` is what
    `encoder_recall` returned, with the number of its queries.
    """
    rows, alpha = index.layout.rows, promise.alpha(attempt)
    if certificate_sample(index, promise, attempt).is_census:
        # Rows that the rules do not let ask for neighbours are no part of what is measured whole.
        rows = len(measured.recalls)
        rows_of = None if rows_of is None else Counter(measured.values)
    return Certificate(
        promise.target,
        float(measured.recalls.mean()),
        lower_bound(measured.recalls, rows, alpha),
        1 - alpha,
        len(measured.recalls),
        rows,
        k,
        index.nprobe,
        index.trained.nlist,
        promise.seed,
        attempt,
        by,
        () if rows_of is None else recalls_of_values(measured.recalls, measured.values, rows_of, alpha),
        *encoder,
    )


def measure_recall(
    index: IndexDataset,
    neighbors_folder: str,
    parts: Sequence[Part],
    spec: JoinSpec,
    promise: Promise,
    attempt: int = 1,
    by: str | None = None,
    corpus: Corpus | None = None,
) -> Certificate:
    """Certifies a join in one process, shard by shard; a Beam pipeline takes the same steps.

    With the column `by` also for its values, with the `corpus` that the index was made of also in the
    encoder's own space.
    """
    sample = certificate_sample(index, promise, attempt)
    numbers = range(index.layout.shards)
    queries = choose_queries((draw_queries(index, n, spec, sample, by) for n in numbers), sample)
    exact = merge_found((search_exactly(index, n, queries, spec) for n in numbers), spec.k, spec.rules)
    measured = compare_with_join(queries, exact, neighbors_folder, parts)
    rows_of = None if by is None else _count_values(index, spec, by)
    encoder = (None, 0) if corpus is None else _measure_encoder(corpus, index, spec, queries, measured)
    return certify(measured, index, spec.k, promise, attempt, by, rows_of, encoder)


def _count_values(index: IndexDataset, spec: JoinSpec, by: str) -> Counter[str | None]:
    """Counts the queries of an index by their value of a column."""
    counts: Counter[str | None] = Counter()
    for number in range(index.layout.shards):
        table = read_shard_table(index, number, (by, *spec.rules.query_columns))
        asked = table.filter(pa.array(satisfied(spec.rules.queries, table)))
        counts.update(asked[by].cast(pa.string()).to_pylist())
    return counts


def _measure_encoder(
    corpus: Corpus, index: IndexDataset, spec: JoinSpec, queries: pa.Table, measured: Measured
) -> tuple[float | None, int]:
    """Returns the recall in the encoder's own space, and on how many queries it was measured."""
    numbers = range(len(corpus.parts))
    asked = in_sample_order(read_encoder_queries(corpus, n, queries, spec) for n in numbers)
    transform = index.trained.transform
    found = (search_encoder_space(corpus, n, asked, spec, transform) for n in numbers)
    exact = merge_found(found, spec.k, searchable(corpus, spec.rules))
    return encoder_recall(asked, exact, measured), len(asked)


def certificate_sample(index: IndexDataset, promise: Promise, attempt: int) -> QuerySample:
    """Returns the sample of queries that an attempt is certified on."""
    return promise.queries(index.layout.rows, int(index.manifest.properties["seed"]), attempt)


def read_encoder_queries(corpus: Corpus, number: int, queries: pa.Table, spec: JoinSpec) -> pa.Table:
    """Returns those of the first ENCODER_QUERIES of a sample that are in a part of the embeddings.

    With their vectors as the encoder made them, the rule columns and `place` in the sample.
    """
    wanted = queries[IMAGE].slice(0, ENCODER_QUERIES).combine_chunks()
    places = pc.fill_null(pc.index_in(corpus.read_ids(number), value_set=wanted), -1).to_numpy()
    rows = np.flatnonzero(places >= 0)
    table = corpus.read_rows(number, rows, searchable(corpus, spec.rules).query_columns)
    table = table.append_column("place", pa.array(places[rows]))
    if spec.rules.exclude is None:
        return table
    return table.append_column("excluded", queries["excluded"].take(pa.array(places[rows])))


def in_sample_order(tables: Iterable[pa.Table]) -> pa.Table:
    """Returns such queries of several parts in the order of the sample."""
    return pa.concat_tables(tables).sort_by("place")


def searchable(corpus: Corpus, rules: JoinRules) -> JoinRules:
    """Returns what of a join's rules can be applied to the embeddings themselves."""
    return dataclasses.replace(searchable_rules(rules, corpus.columns), exclude=rules.exclude)


def search_encoder_space(
    corpus: Corpus, number: int, queries: pa.Table, spec: JoinSpec, transform: Transform
) -> pa.Table:
    """Finds the neighbours of such queries in one part of the embeddings, before any transform."""
    plain = Transform(metric=transform.metric, input_exponent=transform.input_exponent)
    rules = searchable(corpus, spec.rules)
    return search_part(corpus, number, queries, spec.k, rules, plain, _excluded(queries, spec))


def encoder_recall(queries: pa.Table, exact: pa.Table, measured: Measured) -> float | None:
    """Returns the mean share of the exact neighbours in the encoder's space that the join has.

    Neighbours are compared by id. None where there is no query with neighbours.
    """
    ids, owners = exact[IMAGE].to_pylist(), exact["query"].to_numpy()
    bounds = np.searchsorted(owners, np.arange(len(queries) + 1))
    shares = [
        len(set(ids[start:stop]) & set(measured.found[place])) / (stop - start)
        for place, start, stop in zip(
            queries["place"].to_pylist(), bounds[:-1], bounds[1:], strict=True
        )
        if start < stop
    ]
    return float(np.mean(shares)) if shares else None


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
