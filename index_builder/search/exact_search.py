"""Exact neighbours of a few queries, by searching everything.

This is what recall is held against: before there is an index (calibration), in the finished index (the
certificate), and in the encoder's own space. It is written for itself and shares no code with the
join's kernel beside the rules, so it would not make the kernel's mistakes.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.datasets import embeddings
from index_builder.index.transform import Transform
from index_builder.rules.rules import IMAGE, CandidateCodes, JoinRules, QueryCodes, RuleEncoder
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import squared_norms
from index_builder.search.corpus import Corpus

_FIRST_ROWS, _MOST_ROWS = 256, 4096
# Numbers of the pairs whose exact dot products are computed at a time: they stay in the cache.
_NUMBERS_AT_ONCE = 1 << 16
# Unit roundoff of float32.
_UNIT_ROUNDOFF = 2.0**-24


@dataclasses.dataclass(frozen=True, eq=False)
class ExactSearch:
    """Queries and what is a neighbour of them.

    `codes` float16 [n, dim] are compared under `metric`; `unscale` is that of the index's transform.
    `table` has image_id and the rule columns of the queries; `excluded` (`query_id`, `neighbor_id`) at
    least their excluded pairs, where the rules have any.
    """

    codes: NDArray[np.float16]
    table: pa.Table
    k: int
    rules: JoinRules
    metric: Metric = Metric.COSINE
    unscale: float = 1.0
    excluded: pa.Table | None = None

    def search(self, blocks: Iterable[tuple[pa.Table, NDArray[np.float16]]]) -> pa.Table:
        """Finds the k best neighbours of every query in some rows, given block by block.

        A block is a table with image_id and the rule columns, and its codes. Returns one row a pair, by
        query, best first: `query` int32 (its place), `score` float32, and the columns of the blocks.
        Memory: a block, 4096 of its rows widened, and a few times k rows a query.
        """
        state = _State(self)
        for table, codes in blocks:
            start = 0
            # An empty block counts, too: the result has its columns.
            while start < max(1, len(table)):
                stop = start + state.block_rows
                state.add(table.slice(start, stop - start), codes[start:stop])
                start = stop
        return state.finish()


def merge_found(tables: Iterable[pa.Table], k: int, rules: JoinRules) -> pa.Table:
    """Returns the k best of what several searches found, as `ExactSearch.search` does.

    It may be done in stages, in any order: what a search keeps under the caps of the rules holds all
    that is kept in the end, since nested caps are a matroid, whose greedy choice may be so divided.
    """
    table = pa.concat_tables(tables).combine_chunks()
    table = table.sort_by([("query", "ascending"), ("score", "descending"), (IMAGE, "ascending")])
    for name, most in zip(rules.capped_columns, rules.caps, strict=True):
        table = table.filter(pa.array(_places(table, name) < most))
    return table.filter(pa.array(_places(table, None) < k))


class _State:
    """A search under way: the pairs kept so far, and the score that a new one must reach."""

    def __init__(self, search: ExactSearch) -> None:
        self._search = search
        self._encoder = RuleEncoder(search.rules, search.table, search.excluded)
        self._rules = self._encoder.encode_queries(search.table)
        self._wide = search.codes.astype(np.float64)
        self._narrow = search.codes.astype(np.float32)
        self._norms = squared_norms(search.codes)
        if search.metric is Metric.COSINE:
            self._narrow = _directions(search.codes, self._norms)
        self._worst = np.full(len(search.codes), -np.inf)
        self._kept: list[pa.Table] = []
        self._waiting = 0
        # While nothing is known of the scores every pair counts, so the first blocks are small.
        self.block_rows = _FIRST_ROWS

    def add(self, table: pa.Table, codes: NDArray[np.float16]) -> None:
        """Offers some rows to all queries."""
        norms = squared_norms(codes)
        proposed = self._propose(codes, norms)
        codes_of = self._encoder.encode_candidates(table)
        owners, rows = np.nonzero(proposed & codes_of.eligible)
        allowed = _allowed(self._rules, codes_of, owners, rows)
        owners, rows = owners[allowed], rows[allowed]
        dots = self._exact_dots(codes, owners, rows)
        # Adding zero makes a negative zero a zero: a sum's order may decide which it is.
        scores = self._score(dots, self._norms[owners], norms[rows]).astype(np.float32) + np.float32(0)
        good = scores >= self._worst[owners]
        owners, rows, scores = owners[good], rows[good], scores[good]
        pairs = table.take(pa.array(rows))
        pairs = pairs.append_column("query", pa.array(owners.astype(np.int32)))
        self._kept.append(pairs.append_column("score", pa.array(scores)))
        self._waiting += len(owners)
        if self._waiting >= 2 * self._search.k * len(self._worst) or self.block_rows < _MOST_ROWS:
            self._prune()
        self.block_rows = min(2 * self.block_rows, _MOST_ROWS)

    def _propose(self, codes: NDArray[np.float16], norms: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tells which pairs may score well enough, bool [queries, rows], by a float32 product.

        A sum of d products is off by gamma_d |q| |x| at most, in any order (Higham, Accuracy and
        Stability of Numerical Algorithms, 2nd ed., section 3.1); gamma_(d + 16) also covers dividing by
        lengths, subtracting |x|^2 / 2 and rounding what is compared.
        """
        cosine = self._search.metric is Metric.COSINE
        products = self._narrow @ (_directions(codes, norms) if cosine else codes.astype(np.float32)).T
        roundings = (codes.shape[1] + 16) * _UNIT_ROUNDOFF
        gamma = roundings / (1 - roundings)
        least = self._worst - np.abs(self._worst) * 2.0**-22
        slack: NDArray[np.float64] | float = gamma
        if not cosine:
            least = least / self._search.unscale
            offsets = np.zeros(len(norms))
            if self._search.metric is Metric.EUCLIDEAN:
                least, offsets = (least + self._norms) / 2, norms / 2
                products -= offsets.astype(np.float32)
            longest = np.sqrt(norms.max(initial=0.0))
            slack = gamma * (np.sqrt(self._norms) * longest + offsets.max(initial=0.0) + np.abs(least))
        # A query that has fewer than k takes all.
        least = np.where(np.isfinite(self._worst), least - slack, -np.inf)
        return np.asarray(products >= least.astype(np.float32)[:, None])

    def _score(
        self,
        dots: NDArray[np.float64],
        q_norms: NDArray[np.float64],
        x_norms: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Returns the scores of pairs before they are rounded to float32."""
        if self._search.metric is Metric.COSINE:
            lengths = np.sqrt(q_norms * x_norms)
            return np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
        if self._search.metric is Metric.EUCLIDEAN:
            dots = 2 * dots - q_norms - x_norms
        return dots * self._search.unscale

    def _exact_dots(
        self, codes: NDArray[np.float16], owners: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Returns the dot products of pairs; their sums are exact in any order."""
        dots, wide = np.empty(len(owners)), codes.astype(np.float64)
        step = max(1, _NUMBERS_AT_ONCE // max(1, codes.shape[1]))
        for start in range(0, len(owners), step):
            part = slice(start, start + step)
            dots[part] = np.einsum("ij,ij->i", self._wide[owners[part]], wide[rows[part]])
        return dots

    def _prune(self) -> None:
        kept = merge_found(self._kept, self._search.k, self._search.rules)
        self._kept, self._waiting = [kept], 0
        owners = kept["query"].to_numpy()
        counts = np.bincount(owners, minlength=len(self._worst))
        last = np.cumsum(counts) - 1
        full = counts == self._search.k
        self._worst[full] = kept["score"].to_numpy()[last[full]]

    def finish(self) -> pa.Table:
        """Returns what `ExactSearch.search` promises."""
        if not self._kept:
            raise ValueError("an exact search needs at least one block, if only an empty one")
        return merge_found(self._kept, self._search.k, self._search.rules)


def _directions(codes: NDArray[np.float16], norms: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns vectors of unit length, float32 [n, d]; a zero vector stays."""
    lengths = np.where(norms > 0, np.sqrt(norms), 1.0)
    unit: NDArray[np.float32] = (codes.astype(np.float64) / lengths[:, None]).astype(np.float32)
    return unit


def _allowed(
    queries: QueryCodes,
    candidates: CandidateCodes,
    owners: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Tells which pairs the rules allow, of eligible candidates."""
    allowed = np.ones(len(owners), dtype=bool)
    for of_query, of_row in zip(queries.same, candidates.same, strict=True):
        allowed &= (of_query[owners] >= 0) & (of_query[owners] == of_row[rows])
    for of_query, of_row in zip(queries.different, candidates.different, strict=True):
        allowed &= (of_query[owners] < 0) | (of_query[owners] != of_row[rows])
    if len(queries.excluded):
        lengths = np.diff(queries.excluded_offsets)
        listed = np.repeat(np.arange(len(lengths)), lengths) << 32 | queries.excluded
        codes = candidates.excluded[rows]
        allowed &= (codes < 0) | ~np.isin(owners << 32 | np.maximum(codes, 0), listed)
    return allowed


def _places(table: pa.Table, name: str | None) -> NDArray[np.int64]:
    """Returns which of its kind each row is, from 0: of the rows of its query, or with the same value.

    Rows whose value is null are of no kind: each is a first.
    """
    queries = table["query"].to_numpy().astype(np.int64)
    kinds = queries
    if name is not None:
        encoded = table[name].combine_chunks().dictionary_encode()
        values = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
        kinds = queries * (len(encoded.dictionary) + 1) + values
        # Different negative numbers, so that no two nulls are of one kind.
        kinds = np.where(values < 0, -1 - np.arange(len(kinds)), kinds)
    order = np.argsort(kinds, kind="stable")
    ordered = kinds[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(ordered)), 0))
    places = np.empty(len(ordered), dtype=np.int64)
    places[order] = np.arange(len(ordered)) - starts
    return places


def search_part(
    corpus: Corpus,
    number: int,
    queries: pa.Table,
    k: int,
    rules: JoinRules,
    transform: Transform,
    excluded: pa.Table | None = None,
) -> pa.Table:
    """Finds the k best neighbours of queries in one part of the embeddings.

    `queries` has image_id, vector and the rule columns; vectors are compared after `transform`;
    `excluded` is as ExactSearch has it. The columns of the result are those of `ExactSearch.search`,
    with `part` int32 and `row` int64 in it.
    """
    codes = transform.apply(embeddings.list_matrix(queries["vector"]))
    search = ExactSearch(codes, queries, k, rules, transform.metric, transform.unscale, excluded)
    return search.search(_transformed(corpus, number, rules, transform))


def _transformed(
    corpus: Corpus, number: int, rules: JoinRules, transform: Transform
) -> Iterator[tuple[pa.Table, NDArray[np.float16]]]:
    first_row = 0
    for block in corpus.read_blocks(number, rules.candidate_columns):
        codes = transform.apply(embeddings.list_matrix(block["vector"]))
        rows = np.arange(first_row, first_row + len(block), dtype=np.int64)
        block = block.drop_columns(["vector"]).append_column("row", pa.array(rows))
        yield block.append_column("part", pa.array(np.full(len(rows), number, np.int32))), codes
        first_row += len(block)


def searchable_rules(rules: JoinRules, columns: Collection[str]) -> JoinRules:
    """Returns what of the rules an exact search of embeddings can apply.

    Left out are rules on columns that only exist beside an index (duplicate groups): good enough to
    choose nprobe, not to certify it. So are excluded pairs, which a caller may have by other means.
    """
    return dataclasses.replace(
        rules,
        same=tuple(name for name in rules.same if name in columns),
        different=tuple(name for name in rules.different if name in columns),
        queries=tuple(one for one in rules.queries if one.column in columns),
        candidates=tuple(one for one in rules.candidates if one.column in columns),
        max_per=tuple(one for one in rules.max_per if one[0] in columns),
        exclude=None,
    )
