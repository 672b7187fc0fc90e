"""The k best: order, ties, caps, metrics, and independence of how they are fed."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.index.assignment import nearest_lists
from index_builder.scoring import topk
from index_builder.scoring.blocks import IdColumn, PreparedCandidates
from index_builder.scoring.intrinsics import WIDE
from index_builder.scoring.key_order import MOST_RANKED, sort_keys
from index_builder.scoring.metrics import Metric
from index_builder.scoring.products import NumpyProduct, TimedProduct
from index_builder.scoring.topk import TopK
from index_builder.scoring.vectors import unit_float16
from tests.topk_oracle import (
    METRICS,
    RoundedProduct,
    RuledCase,
    all_scores,
    best,
    corpus_block,
    drawn_ids,
    drawn_vectors,
    kept,
    pieces,
    query_block,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_brute_force_however_it_is_fed(data: st.DataObject) -> None:
    """Corpus in pieces of any size, in any order; queries in two blocks; ties everywhere."""
    metric = data.draw(st.sampled_from(METRICS))
    unscale = 1.0 if metric is Metric.COSINE else data.draw(st.sampled_from([1.0, 2.0**-10, 64.0]))
    dim = data.draw(st.integers(1, 4))
    corpus, queries = drawn_vectors(data, dim, 25, metric), drawn_vectors(data, dim, 6, metric)
    ids, column = drawn_ids(data, len(corpus))
    k = data.draw(st.integers(1, 9))
    middle = data.draw(st.integers(0, len(queries)))

    top = TopK(len(queries), k, column.max_bytes, metric, unscale)
    slots = np.arange(len(queries))
    for start, stop in pieces(data, len(corpus)):
        part, id_part = corpus_block(corpus).slice(start, stop), column.slice(start, stop)
        for rows in (slots[middle:], slots[:middle]):
            top.offer(rows, query_block(queries[rows]), part, id_part, start)
    assert kept(top, ids) == best(all_scores(queries, corpus, metric, unscale), ids, k)
    assert not np.signbit(top.scores[top.scores == 0]).any()
    assert (top.counts == min(k, len(corpus))).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rules_and_caps_equal_an_oracle_that_applies_them_first(data: st.DataObject) -> None:
    case = RuledCase.drawn(data, most_queries=4)
    k = data.draw(st.integers(1, 7))

    top = case.no_rows_yet(k)
    for start, stop in pieces(data, len(case.corpus)):
        block = corpus_block(case.corpus, case.others).slice(start, stop)
        rows = np.arange(len(case.queries))
        ids = case.column.slice(start, stop)
        top.offer(rows, query_block(case.queries, case.own), block, ids, start)

    assert kept(top, case.ids) == case.best(k)
    columns = case.others.caps
    for cap in range(2):
        held = [sorted(columns[cap][row[:n]]) for row, n in zip(top.rows, top.counts, strict=True)]
        codes = [sorted(row[:n]) for row, n in zip(top.cap_codes[cap], top.counts, strict=True)]
        assert codes == held
        assert all((row[n:] == -1).all() for row, n in zip(top.cap_codes[cap], top.counts, strict=True))


def test_ties_go_by_bytes_and_a_prefix_comes_first() -> None:
    ids = ["b", "ab", "a", "é", "abc", "", "z"]
    vectors, _ = unit_float16(np.ones((len(ids), 8)))
    column = IdColumn.from_arrow(pa.array(ids))
    top = TopK(1, 5, column.max_bytes)
    top.offer(np.arange(1), query_block(vectors[:1]), corpus_block(vectors), column, 0)
    assert [ids[row] for row in top.rows[0]] == ["", "a", "ab", "abc", "b"]


@pytest.mark.parametrize("tiles", [(1, 1), (3, 7), (1024, 4096)])
@pytest.mark.parametrize("metric", METRICS)
def test_tiles_do_not_matter(
    tiles: tuple[int, int], metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "QUERY_TILE_ROWS", tiles[0])
    monkeypatch.setattr(topk, "CORPUS_TILE_ROWS", tiles[1])
    vectors, _ = unit_float16(np.random.default_rng(2).choice([-1.0, 1.0], size=(60, 16)))
    ids = [str(row * 31 % 60) for row in range(60)]
    column = IdColumn.from_arrow(pa.array(ids))
    top = TopK(60, 9, column.max_bytes, metric)
    top.offer(np.arange(60), query_block(vectors), corpus_block(vectors), column, 0)
    assert kept(top, ids) == best(all_scores(vectors, vectors, metric), ids, 9)
    assert top.proposed == 3600


def test_few_pairs_are_scored_exactly() -> None:
    """The threshold is tight from the first tile on: the k best of it come first."""
    rng = np.random.default_rng(4)
    vectors, _ = unit_float16(rng.normal(size=(3000, 32)))
    top = TopK(100, 10, 4)
    for start in range(0, 3000, 600):
        part = vectors[start : start + 600]
        top.offer(np.arange(100), query_block(vectors[:100]), corpus_block(part),
                  IdColumn.numbers(600), start)  # fmt: skip
    # 10 of the first piece; of piece p about 10 / p more belong to the ten best so far.
    assert 1000 <= top.rescored < 100 * 10 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) * 1.1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sorts_keys_with_their_columns(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([0, 1, 2, 15, 16, 17, MOST_RANKED, MOST_RANKED + 1, 300]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Few different keys: ties, and both infinities among them.
    values = np.append(rng.normal(size=data.draw(st.integers(1, 40))), [np.inf, -np.inf])
    keys = np.full(-(-count // WIDE) * WIDE, np.nan, dtype=np.float32)
    keys[:count] = rng.choice(values, count)
    found = np.full(7 + count, -5, dtype=np.int32)
    found[7:] = rng.permutation(count)
    pairs = sorted(zip(keys[:count].tolist(), found[7:].tolist(), strict=True))
    scratch = [np.full(MOST_RANKED, 9, dtype=kind) for kind in (np.int32, np.float32, np.int32)]
    sort_keys(keys, found, 7, count, *scratch)
    assert keys[:count].tolist() == sorted(keys[:count].tolist(), reverse=True)
    assert sorted(zip(keys[:count].tolist(), found[7:].tolist(), strict=True)) == pairs
    assert (found[:7] == -5).all()


@pytest.mark.parametrize(("spread", "gives_way"), [(0.01, True), (1.0, False)])
def test_a_product_that_lets_too_many_through_gives_way(
    spread: float, gives_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    # In a narrow cone an error of 2^-7 hides every difference.
    vectors, _ = unit_float16(np.ones(64) + spread * rng.normal(size=(3000, 64)))
    names = [f"{row:04d}" for row in range(3000)]
    ids = IdColumn.from_arrow(pa.array(names))
    taken = []

    def timed() -> list[TimedProduct]:
        taken.append(NumpyProduct())
        return [TimedProduct(taken[-1], 1e9)]

    monkeypatch.setattr(topk, "timed_products", timed)
    found = {}
    for worth in (topk._WORTH_SCORING, 2.0):
        monkeypatch.setattr(topk, "_WORTH_SCORING", worth)
        top = TopK(1500, 5, ids.max_bytes)
        queries, corpus = query_block(vectors[:1500]), corpus_block(vectors)
        top.offer(np.arange(1500), queries, corpus, ids, 0, RoundedProduct())
        found[worth] = top
    first, second = found.values()
    assert len(taken) == gives_way
    assert (first.rescored < second.rescored / 2) == gives_way
    assert kept(first, names) == kept(second, names)
    scores = all_scores(vectors[:20], vectors, Metric.COSINE)
    assert kept(first, names)[:20] == best(scores, names, 5)


def test_equal_vectors_are_scored_once_and_kept_in_the_order_of_their_ids() -> None:
    rng = np.random.default_rng(5)
    vectors, _ = unit_float16(np.repeat(rng.normal(size=(3, 24)), [5, 20_000, 1], axis=0))
    ids = IdColumn.numbers(len(vectors))
    prepared = PreparedCandidates.of(corpus_block(vectors), ids, 0)
    assert prepared.arrays.runs.tolist() == [0, 5, 20_005, 20_006]
    # All rows ask: with every pair scored this would be 4e8 of them.
    top = TopK(len(vectors), 10, 4)
    top.offer(np.arange(len(vectors)), query_block(vectors), corpus_block(vectors), ids, 0)
    assert top.proposed == 3 * len(vectors)
    assert top.rows[5:20_005].tolist() == [list(range(5, 15))] * 20_000
    assert (top.scores[5:20_005] == 1.0).all()


def test_rows_out_of_the_order_of_their_ids_are_no_run() -> None:
    vectors, _ = unit_float16(np.ones((4, 8)))
    ids = IdColumn.from_arrow(pa.array(["b", "ba", "a", "c"]))
    prepared = PreparedCandidates.of(corpus_block(vectors), ids, 0)
    assert prepared.arrays.runs.tolist() == [0, 2, 4]


def test_id_columns_of_slices_chunks_and_nothing() -> None:
    whole = pa.array(["x", "", "日本", "yy", "z"])
    column = IdColumn.from_arrow(pa.chunked_array([whole.slice(1, 2), whole.slice(3)]))

    def texts(ids: IdColumn) -> list[str]:
        bounds = zip(ids.offsets[:-1], ids.offsets[1:], strict=True)
        return [ids.data[start:stop].tobytes().decode() for start, stop in bounds]

    assert texts(column) == ["", "日本", "yy", "z"]
    assert column.max_bytes == 6
    assert texts(column.slice(1, 3)) == ["日本", "yy"]
    for empty in (pa.array([], pa.string()), pa.chunked_array([], pa.string())):
        assert texts(IdColumn.from_arrow(empty)) == []
    assert texts(IdColumn.from_arrow(pa.array(["", ""]))) == ["", ""]
    assert IdColumn.from_arrow(pa.array([""])).max_bytes == 1
    assert IdColumn.numbers(300).data.reshape(-1, 4)[-1].tolist() == [0, 0, 1, 43]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("nprobe", [1, 4, 60, 250, 300])
def test_nearest_lists_are_nearest_with_ties_to_the_lower_number(metric: Metric, nprobe: int) -> None:
    rng = np.random.default_rng(3)
    centroids, _ = unit_float16(rng.choice([-1.0, 1.0], size=(300, 16)))
    vectors, _ = unit_float16(rng.choice([-1.0, 1.0], size=(50, 16)))
    if metric is Metric.EUCLIDEAN:
        # Centroids of other lengths: near is not what a large product says.
        centroids = (centroids * rng.choice([0.25, 0.5, 1.0], size=(300, 1))).astype(np.float16)
    ranked_by = Metric.EUCLIDEAN if metric is Metric.EUCLIDEAN else Metric.INNER_PRODUCT
    nearest = np.argsort(-all_scores(vectors, centroids, ranked_by), axis=1, kind="stable")
    found = nearest_lists(vectors, centroids, nprobe, metric)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, nearest[:, :nprobe])
    for threads in (1, 3):
        again = nearest_lists(vectors, centroids, nprobe, metric, threads, NumpyProduct())
        np.testing.assert_array_equal(again, found)
