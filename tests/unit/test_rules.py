"""Rules on columns: equal values, and what a null means."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from index_builder.rules import JoinRules, RuleCodes, RuleEncoder

QUERIES = pa.table(
    {
        "item_id": ["i1", "i2", "i3"],
        "brand": ["a", None, "b"],
        "year": pa.array([2020, 2021, None], pa.int64()),
        "sold": [True, False, None],
    }
)
CORPUS = pa.table(
    {
        "item_id": pa.chunked_array([["i3", "i9"], ["i1", None]]),
        "brand": pa.chunked_array([["a", "z"], [None, "b"]]),
        "year": pa.array([None, 2021, 2020, 1999], pa.int64()),
        "sold": [False, None, True, True],
    }
)


def allowed(codes: RuleCodes, others: RuleCodes, query: int, row: int) -> bool:
    """Decides about a pair by its codes, as the kernel does."""
    same = all(
        own[query] >= 0 and own[query] == other[row]
        for own, other in zip(codes.same, others.same, strict=True)
    )
    return same and not any(
        own[query] >= 0 and own[query] == other[row]
        for own, other in zip(codes.different, others.different, strict=True)
    )


@pytest.mark.parametrize("same", [(), ("brand",), ("year",), ("sold",), ("brand", "year")])
@pytest.mark.parametrize("different", [(), ("brand",), ("year",), ("year", "sold")])
def test_codes_decide_like_the_values(same: tuple[str, ...], different: tuple[str, ...]) -> None:
    rules = JoinRules(same, different)
    encoder = RuleEncoder(rules, QUERIES)
    queries, corpus = encoder.encode(QUERIES), encoder.encode(CORPUS)
    assert queries.same.dtype == queries.different.dtype == np.int32
    assert queries.same.shape == (len(same), 3)
    assert corpus.different.shape == (1 + len(different), 4)
    for (q, query), (x, row) in itertools.product(
        enumerate(QUERIES.to_pylist()), enumerate(CORPUS.to_pylist())
    ):
        equal = {name: query[name] is not None and query[name] == row[name] for name in query}
        wanted = all(equal[name] for name in same) and not any(
            equal[name] for name in ("item_id", *different)
        )
        assert allowed(queries, corpus, q, x) == wanted


def test_columns_are_named_once_with_the_item_first() -> None:
    rules = JoinRules(same=("brand", "item_id"), different=("year", "brand"))
    assert rules.columns == ("item_id", "brand", "year")
    assert JoinRules().columns == ("item_id",)


def test_slices_and_selections_keep_columns() -> None:
    codes = RuleEncoder(JoinRules(("brand",), ("year",)), QUERIES).encode(CORPUS)
    part = codes.slice(1, 3)
    np.testing.assert_array_equal(part.same, codes.same[:, 1:3])
    np.testing.assert_array_equal(part.different, codes.different[:, 1:3])
    chosen = codes.take(np.asarray([3, 0, 0]))
    np.testing.assert_array_equal(chosen.different, codes.different[:, [3, 0, 0]])
    assert RuleCodes.none(5).same.shape == (0, 5)


def test_a_null_column_matches_nothing() -> None:
    queries = pa.table({"item_id": pa.nulls(2, pa.string())})
    codes = RuleEncoder(JoinRules(), queries).encode(CORPUS)
    assert codes.different.tolist() == [[-1] * 4]
