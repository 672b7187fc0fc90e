"""Choosing nprobe for a recall target, on real queries, before the index is built.

Exact neighbours of a sample of the catalogue's own queries are found in the whole catalogue; where
each neighbour's list stands in its query's order of lists says from which nprobe on it is found. So all
values of nprobe are judged at once, for one exact search of the sample.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.datasets import embeddings
from index_builder.index.assignment import nearest_lists, places_of_lists
from index_builder.index.training import TrainedIndex
from index_builder.recall.confidence import lower_bound
from index_builder.recall.query_sample import CALIBRATION, QuerySample, require_queries
from index_builder.recall.recall import Promise
from index_builder.rules import exclusions
from index_builder.rules.conditions import satisfied
from index_builder.rules.exclusions import ExclusionFiles, read_pairs_of
from index_builder.rules.rules import JoinRules
from index_builder.search import exact_search
from index_builder.search.corpus import Corpus
from index_builder.search.exact_search import searchable_rules


@dataclasses.dataclass(frozen=True)
class CalibrationSpec:
    """What nprobe is chosen for: recall at k under the rules, as promised.

    `rules` are without excluded pairs, which are in the files of `exclusions`. Ids in those that the
    catalogue does not have exclude nothing here; the join says which they are.
    """

    promise: Promise
    k: int
    rules: JoinRules
    exclusions: ExclusionFiles | None = None

    def fingerprint_value(self) -> dict[str, Any]:
        """Returns what decides nprobe, as plain JSON values, for fingerprints and manifests."""
        rules = self.rules
        if self.exclusions is not None:
            rules = dataclasses.replace(rules, exclude=self.exclusions.rule())
        value = dataclasses.asdict(dataclasses.replace(self, rules=rules, exclusions=None))
        del value["exclusions"]
        return value

    def most_queries(self, rows: int) -> int:
        """Returns about how many queries of so many rows nprobe is chosen on."""
        return self.sample(rows, 0).drawn

    def searchable(self, corpus: Corpus) -> JoinRules:
        """Returns the rules as far as a search of the embeddings can apply them."""
        rules = searchable_rules(self.rules, corpus.columns)
        if self.exclusions is None:
            return rules
        return dataclasses.replace(rules, exclude=self.exclusions.rule())

    def left_out(self, corpus: Corpus) -> list[str]:
        """Returns the columns of rules that there are none of before there is an index."""
        known = corpus.columns
        return [name for name in self.rules.columns if name not in known]

    def sample(self, rows: int, split_seed: int) -> QuerySample:
        """Returns the sample of queries that nprobe is chosen on."""
        return self.promise.queries(rows, split_seed, CALIBRATION)


def draw_queries(corpus: Corpus, number: int, spec: CalibrationSpec, sample: QuerySample) -> pa.Table:
    """Returns the rows of a part that may be in the sample: vectors, rule columns and their `key`."""
    rows, keys = sample.candidates(corpus.read_ids(number))
    rules = spec.searchable(corpus)
    table = corpus.read_rows(number, rows, rules.query_columns)
    table = table.append_column("key", pa.array(keys))
    return table.filter(pa.array(satisfied(rules.queries, table)))


def add_excluded(queries: pa.Table, spec: CalibrationSpec) -> pa.Table:
    """Returns the sample with a column of what each query excludes, read from the files once."""
    if spec.exclusions is None:
        return queries
    by = spec.exclusions.spec.by
    return exclusions.add_excluded(queries, by, read_pairs_of(spec.exclusions, queries[by]))


def search_part(
    corpus: Corpus, number: int, queries: pa.Table, spec: CalibrationSpec, trained: TrainedIndex
) -> pa.Table:
    """Finds the neighbours of the sample in one part of the embeddings, in the index's space."""
    files = spec.exclusions
    excluded = None if files is None else exclusions.excluded_pairs(queries, files.spec.by)
    return exact_search.search_part(
        corpus, number, queries, spec.k, spec.searchable(corpus), trained.transform, excluded
    )


def merge_found(tables: Iterable[pa.Table], corpus: Corpus, spec: CalibrationSpec) -> pa.Table:
    """Returns the exact neighbours of the sample from what was found in several parts."""
    return exact_search.merge_found(tables, spec.k, spec.searchable(corpus))


def list_ranks(
    corpus: Corpus, queries: pa.Table, found: pa.Table, trained: TrainedIndex
) -> NDArray[np.int64]:
    """Returns from which nprobe on each found pair is found, int64 [pairs].

    It is the place, from 1, of the neighbour's own list among the lists of its query.
    """
    lists = np.empty(len(found), dtype=np.int64)
    parts, rows = found["part"].to_numpy(), found["row"].to_numpy()
    for number in np.unique(parts):
        distinct, places = np.unique(rows[parts == number], return_inverse=True)
        table = corpus.read_rows(int(number), distinct, ())
        codes = trained.transform.apply(embeddings.list_matrix(table["vector"]))
        nearest = nearest_lists(codes, trained.centroids, 1, trained.transform.metric)
        lists[parts == number] = nearest[places, 0]
    owners = found["query"].to_numpy()
    codes = trained.transform.apply(embeddings.list_matrix(queries["vector"]))
    return places_of_lists(codes, trained.centroids, owners, lists, trained.transform.metric)


def recalls_by_nprobe(
    owners: NDArray[np.int64], ranks: NDArray[np.int64], queries: int, nprobe: int
) -> NDArray[np.float64]:
    """Returns the recall of each query with so many lists, float64 [queries]; 1 without neighbours."""
    all_pairs = np.bincount(owners, minlength=queries)
    right = np.bincount(owners[ranks <= nprobe], minlength=queries)
    return np.divide(right, all_pairs, out=np.ones(queries), where=all_pairs > 0)


def calibrate(
    corpus: Corpus,
    queries: pa.Table,
    found: pa.Table,
    spec: CalibrationSpec,
    sample: QuerySample,
    trained: TrainedIndex,
) -> dict[str, Any]:
    """Chooses nprobe from the sample and its exact neighbours; returns what `choose_nprobe` does."""
    require_queries(len(queries))
    ranks = list_ranks(corpus, queries, found, trained)
    owners = found["query"].to_numpy()
    figures = choose_nprobe(spec, sample, owners, ranks, len(queries), trained.nlist)
    left_out = spec.left_out(corpus)
    return figures if not left_out else figures | {"rules_left_out": left_out}


def choose_nprobe(
    spec: CalibrationSpec,
    sample: QuerySample,
    owners: NDArray[np.int64],
    ranks: NDArray[np.int64],
    queries: int,
    nlist: int,
) -> dict[str, Any]:
    """Chooses the smallest nprobe that will keep the promise; returns it with the figures behind it.

    The bound of the sample, less its standard error (the certificate's own sample will differ by about
    so much), must reach the target. Where no nprobe does, it is that of all lists. `owners` and `ranks`
    belong to the found pairs.
    """
    alpha = spec.promise.alpha(1)
    population = queries if sample.is_census else sample.rows

    def judge(nprobe: int) -> tuple[float, float, float]:
        recalls = recalls_by_nprobe(owners, ranks, queries, nprobe)
        error = 0.0 if sample.is_census else float(recalls.std()) / queries**0.5
        return float(recalls.mean()), lower_bound(recalls, population, alpha), error

    def suffices(nprobe: int) -> bool:
        _, bound, error = judge(nprobe)
        return bound - error >= spec.promise.target

    low, high = 0, nlist
    while high - low > 1:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle
    estimate, bound, _ = judge(high)
    return {
        "target": spec.promise.target,
        "queries": queries,
        "k": spec.k,
        "seed": spec.promise.seed,
        "nprobe": high,
        "estimate": estimate,
        "lower_bound": bound,
        "confidence": 1 - alpha,
        "disjoint": sample.is_disjoint,
    }
