"""Rules on columns as codes: equal values, nulls, conditions, caps and excluded pairs."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.errors import ConfigError
from index_builder.rules.conditions import Condition
from index_builder.rules.rules import (
    CandidateCodes,
    ExclusionRule,
    JoinRules,
    QueryCodes,
    RuleEncoder,
    check_rules,
)

QUERIES = pa.table(
    {
        "image_id": ["q1", "q2", "q3"],
        "item_id": ["i1", "i2", "i3"],
        "brand": ["a", None, "b"],
        "year": pa.array([2020, 2021, None], pa.int64()),
        "sold": [True, False, None],
    }
)
CORPUS = pa.table(
    {
        "image_id": ["x1", "x2", "x3", "x4"],
        "item_id": pa.chunked_array([["i3", "i9"], ["i1", None]]),
        "brand": pa.chunked_array([["a", "z"], [None, "b"]]),
        "year": pa.array([None, 2021, 2020, 1999], pa.int64()),
        "sold": [False, None, True, True],
    }
)
TYPES = {field.name: field.type for field in CORPUS.schema}


def allowed(queries: QueryCodes, candidates: CandidateCodes, query: int, row: int) -> bool:
    """Decides about a pair by its codes, as the kernel does."""
    same = all(
        own[query] >= 0 and own[query] == other[row]
        for own, other in zip(queries.same, candidates.same, strict=True)
    )
    differ = not any(
        own[query] >= 0 and own[query] == other[row]
        for own, other in zip(queries.different, candidates.different, strict=True)
    )
    start, stop = queries.excluded_offsets[query : query + 2]
    excluded = candidates.excluded[row] in queries.excluded[start:stop].tolist()
    return bool(candidates.eligible[row]) and same and differ and not excluded


@pytest.mark.parametrize("same", [(), ("brand",), ("year",), ("sold",), ("brand", "year")])
@pytest.mark.parametrize("different", [(), ("brand",), ("year",), ("year", "sold")])
def test_codes_decide_like_the_values(same: tuple[str, ...], different: tuple[str, ...]) -> None:
    rules = JoinRules(same, different)
    encoder = RuleEncoder(rules, QUERIES)
    queries, corpus = encoder.encode_queries(QUERIES), encoder.encode_candidates(CORPUS)
    assert queries.same.dtype == corpus.different.dtype == np.int32
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


def test_conditions_on_candidates_decide_who_is_eligible() -> None:
    rules = JoinRules(candidates=(Condition("sold", equals=True), Condition("year", at_least=2000)))
    codes = RuleEncoder(rules, QUERIES).encode_candidates(CORPUS)
    assert codes.eligible.tolist() == [False, False, True, False]


def test_capped_values_are_numbered_across_shards_and_nulls_are_not_counted() -> None:
    rules = JoinRules(max_per=(("brand", 2),))
    encoder = RuleEncoder(rules, QUERIES)
    first = encoder.encode_candidates(CORPUS.slice(0, 2)).caps
    second = encoder.encode_candidates(CORPUS.slice(1, 3)).caps
    assert rules.caps == (1, 2)
    assert first.tolist() == [[0, 1], [0, 1]]
    assert second.tolist() == [[1, 2, -1], [1, -1, 2]]


def test_without_second_images_nothing_is_counted_by_item() -> None:
    encoder = RuleEncoder(JoinRules(max_per=(("brand", 2),)), QUERIES, single_images=True)
    assert encoder.encode_candidates(CORPUS).caps.tolist() == [[0, 1, -1, 2]]
    assert encoder.caps == (2,)
    assert encoder.cap_values == 3


def test_rows_of_the_index_are_their_own_items() -> None:
    # The queries are the rows 11, 3 and 12 of an index, and the candidates those from 10 to 13.
    own_rows = np.asarray([11, 3, 12])
    rules = JoinRules(different=("brand",))
    encoder = RuleEncoder(rules, QUERIES, single_images=True, own_rows=own_rows)
    queries, corpus = encoder.encode_queries(QUERIES), encoder.encode_candidates(CORPUS, 10)
    assert queries.different[0].tolist() == [0, 1, 2]
    assert corpus.different[0].tolist() == [-1, 0, 2, -1]
    usual = RuleEncoder(rules, QUERIES, single_images=True)
    assert queries.different[1].tolist() == usual.encode_queries(QUERIES).different[1].tolist()
    assert corpus.different[1].tolist() == usual.encode_candidates(CORPUS).different[1].tolist()
    with pytest.raises(ValueError, match="which rows"):
        encoder.encode_candidates(CORPUS)
    with pytest.raises(ValueError, match="no item has a second image"):
        RuleEncoder(rules, QUERIES, own_rows=own_rows)


def test_capped_values_that_nothing_kept_has_are_forgotten() -> None:
    encoder = RuleEncoder(JoinRules(max_per=(("brand", 2),)), QUERIES)
    codes = encoder.encode_candidates(CORPUS).caps
    # Kept are the second and the fourth row: items i9 and none, brands z and b.
    kept = np.ascontiguousarray(codes[:, [[1, 3], [3, 3]]])
    kept[:, 1, 1] = -1
    encoder.forget_caps(kept)
    assert kept.tolist() == [[[0, -1], [-1, -1]], [[0, 1], [1, -1]]]
    assert encoder.cap_values == 3
    again = encoder.encode_candidates(CORPUS).caps
    assert again[0].tolist() == [1, 0, 2, -1]
    assert again[1].tolist() == [2, 0, -1, 1]


PAIRS = pa.table(
    {
        "query_id": ["q1", "q1", "q1", "q3", "elsewhere"],
        "neighbor_id": ["x3", "x1", "x1", "x1", "x2"],
    }
)


def test_excluded_pairs_are_those_of_the_queries() -> None:
    rules = JoinRules(exclude=ExclusionRule(("token",)))
    encoder = RuleEncoder(rules, QUERIES, PAIRS)
    queries, corpus = encoder.encode_queries(QUERIES), encoder.encode_candidates(CORPUS)
    listed = [
        queries.excluded[start:stop].tolist()
        for start, stop in itertools.pairwise(queries.excluded_offsets)
    ]
    assert [sorted(row) for row in listed] == listed
    assert [len(row) for row in listed] == [2, 0, 1]
    # Item i3 is the third query's own, i1 the first's.
    assert [[allowed(queries, corpus, q, x) for x in range(4)] for q in range(3)] == [
        [False, True, False, True],
        [True] * 4,
        [False, True, True, True],
    ]
    assert corpus.excluded[1] == -1


def test_excluded_items_hold_for_all_images_of_a_query() -> None:
    rules = JoinRules(exclude=ExclusionRule(("token",), by="item_id"))
    queries = pa.table({"item_id": ["i1", "i2", "i1", None]})
    pairs = pa.table({"query_id": ["i1", "i1"], "neighbor_id": ["i9", "i3"]})
    encoder = RuleEncoder(rules, queries, pairs)
    codes = encoder.encode_queries(queries)
    assert codes.excluded_offsets.tolist() == [0, 2, 2, 4, 4]
    assert encoder.encode_candidates(CORPUS).excluded.tolist() != [-1] * 4
    assert codes.excluded[:2].tolist() == codes.excluded[2:].tolist() == [0, 1]


def test_pairs_must_be_given_where_the_rules_exclude_some() -> None:
    with pytest.raises(ValueError, match="the rules exclude pairs, but the task was given none"):
        RuleEncoder(JoinRules(exclude=ExclusionRule(("token",))), QUERIES)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5), st.data())
def test_slices_and_selections_keep_their_exclusions(
    lists: list[list[int]], data: st.DataObject
) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    flat = np.asarray([code for row in lists for code in row], dtype=np.int32)
    empty = np.empty((0, len(lists)), np.int32)
    codes = QueryCodes(empty, empty, offsets, flat)
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists) + 2))
    part = codes.slice(start, stop)
    rows = st.lists(st.integers(0, len(part) - 1), max_size=4) if len(part) else st.just([])
    chosen = np.asarray(data.draw(rows), dtype=np.int64)
    taken = part.take(chosen)
    found = [taken.excluded[a:b].tolist() for a, b in itertools.pairwise(taken.excluded_offsets)]
    assert found == [lists[start:stop][row] for row in chosen]
    assert len(taken) == len(chosen)


def test_slices_and_selections_of_candidates() -> None:
    rules = JoinRules(("brand",), ("year",), max_per=(("brand", 1),))
    codes = RuleEncoder(rules, QUERIES).encode_candidates(CORPUS)
    part = codes.slice(1, 3).take(np.asarray([1, 0, 0]))
    for name in ("same", "different", "caps"):
        np.testing.assert_array_equal(getattr(part, name), getattr(codes, name)[:, [2, 1, 1]])
    np.testing.assert_array_equal(part.excluded, codes.excluded[[2, 1, 1]])
    assert len(part) == 3
    assert len(CandidateCodes.none(5)) == len(QueryCodes.none(5)) == 5
    assert CandidateCodes.none(5).eligible.all()


def test_columns_are_named_once_with_the_item_first() -> None:
    rules = JoinRules(
        same=("brand", "item_id"),
        different=("year", "brand"),
        queries=(Condition("sold", equals=True),),
        candidates=(Condition("year", at_least=1),),
        max_per=(("sold", 3),),
        exclude=ExclusionRule(("token",)),
    )
    assert rules.query_columns == ("item_id", "brand", "year", "sold", "image_id")
    assert rules.candidate_columns == ("item_id", "sold", "brand", "year", "image_id")
    assert set(rules.columns) == {"item_id", "brand", "year", "sold", "image_id"}
    assert JoinRules().columns == ("item_id",)
    assert JoinRules().caps == (1,)


def test_a_null_column_matches_nothing() -> None:
    queries = pa.table({"item_id": pa.nulls(2, pa.string())})
    codes = RuleEncoder(JoinRules(), queries).encode_candidates(CORPUS)
    assert codes.different.tolist() == [[-1] * 4]


def test_two_caps_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="max_per has 2 columns") as caught:
        JoinRules(max_per=(("brand", 1), ("year", 2)))
    assert str(caught.value) == (
        "max_per has 2 columns (brand, year), wanted one: the best under several caps cannot be kept "
        "in a list of k while candidates stream by. Keep the one that matters most."
    )
    with pytest.raises(ValueError, match="max_per brand is 0, wanted at least 1"):
        JoinRules(max_per=(("brand", 0),))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (JoinRules(same=("colour",)), "join.rules.same: there is no column 'colour', wanted one of"),
        (JoinRules(different=("colour",)), "join.rules.different: there is no column 'colour'"),
        (JoinRules(max_per=(("colour", 1),)), "join.rules.max_per: there is no column 'colour'"),
        (
            JoinRules(queries=(Condition("brand", equals="a"), Condition("colour", equals="a"))),
            "join.rules.queries.1.column: there is no column 'colour'",
        ),
        (
            JoinRules(candidates=(Condition("sold", equals="a"),)),
            "join.rules.candidates.0.equals: got 'a' (str) for the column 'sold', which is bool",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules: JoinRules, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rules(rules, TYPES, TYPES)
    assert message in str(caught.value)


def test_both_sides_must_have_a_compared_column_in_one_type() -> None:
    others: dict[str, Any] = TYPES | {"year": pa.string()}
    check_rules(JoinRules(candidates=(Condition("year", at_least=2000),)), others, TYPES)
    with pytest.raises(ConfigError, match="'year' is string among the queries and int64 among the"):
        check_rules(JoinRules(same=("year",)), others, TYPES)
