"""What the k best are by definition, and small drawn cases: vectors, ids and rule codes with ties."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.rules.rules import CandidateCodes, QueryCodes
from index_builder.scoring.blocks import Block, IdColumn
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import NumpyProduct
from index_builder.scoring.topk import TopK
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.vectors import squared_norms, unit_float16

METRICS = list(Metric)


class RoundedProduct(NumpyProduct):
    """A product that rounds its inputs as bfloat16 does, on hosts without bfloat16, too."""

    def __init__(self) -> None:
        super().__init__("rounded", 2.0**-8)

    def multiply(self, queries: np.ndarray, corpus: np.ndarray, out: np.ndarray) -> None:
        """See Product."""
        np.matmul(_rounded(queries), _rounded(corpus).T, out=out)


def _rounded(numbers: np.ndarray) -> np.ndarray:
    bits = numbers.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (nearest & np.uint32(0xFFFF0000)).view(np.float32)


def spread(matrix: NDArray[np.float16], seed: int = 0) -> VectorRows:
    """The rows of a matrix in another order in memory, with other bytes before and between them."""
    rng = np.random.default_rng(seed)
    rows, dim = matrix.shape
    order, gaps = rng.permutation(rows), rng.integers(0, 9, rows)
    starts = np.empty(rows, dtype=np.int64)
    starts[order] = np.cumsum(gaps) + np.arange(rows) * dim
    # What lies between are not numbers.
    bits = np.full(int(gaps.sum()) + rows * dim + 5, 0x7FFF, dtype=np.uint16)
    for row, start in enumerate(starts):
        bits[start : start + dim] = matrix[row].view(np.uint16)
    return VectorRows.at(bits, starts, dim)


def query_block(vectors: NDArray[np.float16], codes: QueryCodes | None = None) -> Block[QueryCodes]:
    """Wraps float16 vectors as queries, by default without rules; in memory they are spread."""
    return Block(spread(vectors), squared_norms(vectors), codes or QueryCodes.none(len(vectors)))


def corpus_block(
    vectors: NDArray[np.float16], codes: CandidateCodes | None = None
) -> Block[CandidateCodes]:
    """Wraps float16 vectors as candidates, by default without rules."""
    rows = VectorRows.of(vectors)
    return Block(rows, squared_norms(vectors), codes or CandidateCodes.none(len(vectors)))


def all_scores(
    queries: NDArray[np.float16], corpus: NDArray[np.float16], metric: Metric, unscale: float = 1.0
) -> NDArray[np.float32]:
    """Every score by the formulas of the metrics, in float64, where these sums are exact."""
    q, x = queries.astype(np.float64), corpus.astype(np.float64)
    norms = (q * q).sum(axis=1)[:, None], (x * x).sum(axis=1)[None, :]
    if metric is Metric.COSINE:
        scores = q @ x.T / np.sqrt(norms[0] * norms[1])
    elif metric is Metric.EUCLIDEAN:
        scores = (2 * (q @ x.T) - norms[0] - norms[1]) * unscale
    else:
        scores = q @ x.T * unscale
    return scores.astype(np.float32)


def best(
    scores: NDArray[np.float32], ids: Sequence[str], k: int, allowed: NDArray[np.bool_] | None = None
) -> list[list[tuple[float, str]]]:
    """The k best (score, id) of every query among the pairs that are allowed."""
    result = []
    for i, row in enumerate(scores):
        pairs = sorted(
            (-float(score), ids[j].encode())
            for j, score in enumerate(row)
            if allowed is None or allowed[i, j]
        )
        result.append([(-score, name.decode()) for score, name in pairs[:k]])
    return result


def kept(top: TopK, ids: Sequence[str]) -> list[list[tuple[float, str]]]:
    """What a finished top-k holds, as `best` returns it."""
    return [
        [(float(top.scores[i, j]), ids[top.rows[i, j]]) for j in range(top.counts[i])]
        for i in range(len(top.counts))
    ]


def drawn_vectors(data: st.DataObject, dim: int, most: int, metric: Metric) -> NDArray[np.float16]:
    """Vectors of a few small numbers: ties and copies everywhere, zeros where the metric has them."""
    numbers = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    if metric is Metric.COSINE:
        numbers = numbers.filter(any)
    drawn = np.asarray(data.draw(st.lists(numbers, min_size=1, max_size=most)), dtype=np.float64)
    return unit_float16(drawn)[0] if metric is Metric.COSINE else (drawn / 4).astype(np.float16)


def drawn_ids(data: st.DataObject, count: int) -> tuple[list[str], IdColumn]:
    """Different ids, some of them prefixes of others, as strings and as a column."""
    ids = data.draw(st.lists(st.text(max_size=3), min_size=count, max_size=count, unique=True))
    return ids, IdColumn.from_arrow(pa.array(ids, pa.string()))


def pieces(data: st.DataObject, count: int) -> list[tuple[int, int]]:
    """Ranges of 0 to count, some of them empty, in any order."""
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
    bounds = sorted([0, count, *cuts])
    return list(data.draw(st.permutations(list(itertools.pairwise(bounds)))))


def drawn_codes(data: st.DataObject, queries: int, corpus: int) -> tuple[QueryCodes, CandidateCodes]:
    """Codes of one `same`, one `different`, an exclusion list, eligibility, items within brands."""
    code = st.integers(-1, 2)

    def column(count: int, values: st.SearchStrategy[int] = code) -> NDArray[np.int32]:
        drawn = data.draw(st.lists(values, min_size=count, max_size=count))
        return np.asarray(drawn, dtype=np.int32)

    excluded = [sorted(set(column(3, st.integers(0, 4)).tolist())) for _ in range(queries)]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in excluded])]).astype(np.int64)
    flat = np.asarray([one for found in excluded for one in found], dtype=np.int32)
    items = column(corpus, st.integers(-1, 5))
    brands = np.where(items < 0, column(corpus), items // 2).astype(np.int32)
    rules = data.draw(st.sampled_from([0, 1]))
    return (
        QueryCodes(column(queries)[None][:rules], column(queries)[None], offsets, flat),
        CandidateCodes(
            column(corpus)[None][:rules],
            column(corpus)[None],
            column(corpus, st.integers(-1, 4)),
            np.stack([items, brands]),
            column(corpus, st.integers(0, 5)) > 0,
        ),
    )


def allowed_pairs(queries: QueryCodes, corpus: CandidateCodes) -> NDArray[np.bool_]:
    """Which pairs the codes allow, bool [queries, corpus]: the rules as they are documented."""
    allowed = np.tile(corpus.eligible, (len(queries), 1))
    for own, other in zip(queries.same, corpus.same, strict=True):
        allowed &= (own[:, None] == other) & (own[:, None] >= 0)
    for own, other in zip(queries.different, corpus.different, strict=True):
        allowed &= ~((own[:, None] == other) & (own[:, None] >= 0))
    for i in range(len(queries)):
        start, stop = queries.excluded_offsets[i : i + 2]
        allowed[i] &= ~np.isin(corpus.excluded, queries.excluded[start:stop])
    return allowed


def capped(
    ranked: list[tuple[float, str]], ids: Sequence[str], codes: CandidateCodes, caps: tuple[int, ...]
) -> list[tuple[float, str]]:
    """The best first, as long as no cap is exceeded."""
    taken: list[tuple[float, str]] = []
    used: dict[tuple[int, int], int] = {}
    for score, name in ranked:
        row = ids.index(name)
        keys = [(c, int(codes.caps[c, row])) for c in range(len(caps)) if codes.caps[c, row] >= 0]
        if all(used.get(key, 0) < caps[key[0]] for key in keys):
            taken.append((score, name))
            for key in keys:
                used[key] = used.get(key, 0) + 1
    return taken


@dataclasses.dataclass(frozen=True, eq=False)
class RuledCase:
    """A small search under all rules: two-dimensional vectors, ids, codes, and caps of two columns."""

    metric: Metric
    corpus: NDArray[np.float16]
    queries: NDArray[np.float16]
    ids: list[str]
    column: IdColumn
    own: QueryCodes
    others: CandidateCodes
    caps: tuple[int, int]

    @classmethod
    def drawn(cls, data: st.DataObject, most_queries: int) -> "RuledCase":
        """Draws a case of up to thirty candidates and so many queries."""
        metric = data.draw(st.sampled_from(METRICS))
        corpus = drawn_vectors(data, 2, 30, metric)
        queries = drawn_vectors(data, 2, most_queries, metric)
        ids, column = drawn_ids(data, len(corpus))
        own, others = drawn_codes(data, len(queries), len(corpus))
        caps = (1, data.draw(st.integers(1, 3)))
        return cls(metric, corpus, queries, ids, column, own, others, caps)

    def no_rows_yet(self, k: int) -> TopK:
        """Returns the k best of nothing, which takes the case's candidates."""
        return TopK(len(self.queries), k, self.column.max_bytes, self.metric, caps=self.caps)

    def best(self, k: int, searched: NDArray[np.bool_] | None = None) -> list[list[tuple[float, str]]]:
        """The k best (score, id) of every query by definition, among the pairs that are searched."""
        allowed = allowed_pairs(self.own, self.others)
        if searched is not None:
            allowed &= searched
        scores = all_scores(self.queries, self.corpus, self.metric)
        ranked = best(scores, self.ids, len(self.ids), allowed)
        return [capped(row, self.ids, self.others, self.caps)[:k] for row in ranked]
