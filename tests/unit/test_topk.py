"""The kernel that keeps the k best: order, ties, error bound, and independence of how it is fed."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder import topk
from index_builder.assignment import nearest_lists
from index_builder.rules import RuleCodes
from index_builder.topk import Block, IdColumn, TopK, error_bound
from index_builder.vectors import squared_norms, unit_float16


def block(vectors: NDArray[np.float16]) -> Block:
    return Block(vectors.astype(np.float32), squared_norms(vectors), RuleCodes.none(len(vectors)))


def wanted(
    queries: NDArray[np.float16], corpus: NDArray[np.float16], ids: list[str], k: int
) -> list[list[tuple[float, str]]]:
    """The k best (score, id) of every query by brute force in float64."""
    q, x = queries.astype(np.float64), corpus.astype(np.float64)
    norms = np.sqrt((q * q).sum(axis=1)[:, None] * (x * x).sum(axis=1)[None, :])
    scores = (q @ x.T / norms).astype(np.float32)
    result = []
    for row in scores:
        pairs = sorted((-float(score), name.encode()) for score, name in zip(row, ids, strict=True))
        result.append([(-score, name.decode()) for score, name in pairs[:k]])
    return result


def kept(top: TopK, ids: list[str]) -> list[list[tuple[float, str]]]:
    """What a finished top-k holds, as `wanted` returns it."""
    return [
        [(float(top.scores[i, j]), ids[top.rows[i, j]]) for j in range(top.counts[i])]
        for i in range(len(top.counts))
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_brute_force_however_it_is_fed(data: st.DataObject) -> None:
    """Corpus in pieces of any size, in any order; queries in two blocks; ties everywhere."""
    dim = data.draw(st.integers(1, 4))
    numbers = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim).filter(any)
    corpus, _ = unit_float16(np.asarray(data.draw(st.lists(numbers, min_size=1, max_size=25))))
    queries, _ = unit_float16(np.asarray(data.draw(st.lists(numbers, min_size=1, max_size=6))))
    ids = data.draw(
        st.lists(st.text(max_size=3), min_size=len(corpus), max_size=len(corpus), unique=True)
    )
    column = IdColumn.from_arrow(pa.array(ids, pa.string()))
    k = data.draw(st.integers(1, 9))
    cuts = data.draw(st.lists(st.integers(0, len(corpus)), max_size=4))
    bounds = sorted({0, len(corpus), *cuts})
    pieces = data.draw(st.permutations(list(itertools.pairwise(bounds))))
    middle = data.draw(st.integers(0, len(queries)))

    top = TopK(len(queries), k, column.max_bytes)
    slots = np.arange(len(queries))
    for start, stop in pieces:
        part, names = block(corpus).slice(start, stop), column.slice(start, stop)
        for rows in (slots[middle:], slots[:middle]):
            top.offer(rows, block(queries[rows]), part, names, start)
    assert kept(top, ids) == wanted(queries, corpus, ids, k)
    assert (top.scores[top.rows < 0] == -np.inf).all()
    assert (top.counts == min(k, len(corpus))).all()


def test_ties_go_by_bytes_and_a_prefix_comes_first() -> None:
    ids = ["b", "ab", "a", "é", "abc", "", "z"]
    vectors, _ = unit_float16(np.ones((len(ids), 8)))
    column = IdColumn.from_arrow(pa.array(ids))
    top = TopK(1, 5, column.max_bytes)
    top.offer(np.arange(1), block(vectors[:1]), block(vectors), column, 0)
    assert [ids[row] for row in top.rows[0]] == ["", "a", "ab", "abc", "b"]


@pytest.mark.parametrize("dim", [256, 1280])
def test_error_bound_holds_for_sequential_float32_on_positive_vectors(dim: int) -> None:
    rng = np.random.default_rng(0)
    vectors, _ = unit_float16(rng.uniform(0.5, 1.0, size=(300, dim)))
    q, x = vectors[:150].astype(np.float32), vectors[150:].astype(np.float32)
    # np.cumsum adds one number after another, which loses the most.
    fast = np.cumsum(q * x, axis=1, dtype=np.float32)[:, -1]
    exact = (q.astype(np.float64) * x.astype(np.float64)).sum(axis=1)
    lengths = np.sqrt(squared_norms(vectors[:150]) * squared_norms(vectors[150:]))
    worst = (np.abs(fast - exact) / lengths).max()
    assert worst <= error_bound(dim)
    # Neither side of the comparison is empty: errors are real, and the bound is of their order.
    assert worst > 2.0**-24
    assert error_bound(dim) == pytest.approx(dim * 2.0**-24, rel=1e-3)


def test_the_product_of_this_machine_keeps_the_bound() -> None:
    vectors, _ = unit_float16(np.random.default_rng(1).uniform(0.1, 1.0, size=(200, 1280)))
    wide = vectors.astype(np.float64)
    fast = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    lengths = np.sqrt(squared_norms(vectors)[:, None] * squared_norms(vectors)[None, :])
    assert (np.abs(fast - wide @ wide.T) <= error_bound(1280) * lengths).all()


@pytest.mark.parametrize("tiles", [(1, 1), (3, 7), (1024, 4096)])
def test_tiles_do_not_matter(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "QUERY_TILE_ROWS", tiles[0])
    monkeypatch.setattr(topk, "CORPUS_TILE_ROWS", tiles[1])
    vectors, _ = unit_float16(np.random.default_rng(2).choice([-1.0, 1.0], size=(60, 16)))
    ids = [str(row * 31 % 60) for row in range(60)]
    column = IdColumn.from_arrow(pa.array(ids))
    top = TopK(60, 9, column.max_bytes)
    top.offer(np.arange(60), block(vectors), block(vectors), column, 0)
    assert kept(top, ids) == wanted(vectors, vectors, ids, 9)


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


def test_nearest_lists_are_nearest_with_ties_to_the_lower_number() -> None:
    rng = np.random.default_rng(3)
    centroids, _ = unit_float16(rng.choice([-1.0, 1.0], size=(300, 16)))
    vectors, _ = unit_float16(rng.choice([-1.0, 1.0], size=(50, 16)))
    affinity = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    nearest = np.argsort(-affinity, axis=1, kind="stable")
    found = nearest_lists(vectors, centroids, 300)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, nearest)
    np.testing.assert_array_equal(nearest_lists(vectors, centroids, 4), nearest[:, :4])
