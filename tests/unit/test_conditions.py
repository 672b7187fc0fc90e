"""Conditions on columns: what satisfies them, what a null does, and values of the wrong type."""

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.errors import ConfigError
from index_builder.rules.conditions import Condition, check_condition, satisfied
from tests.unit.rules_for_tests import holds

PRICES = pa.table(
    {"price": pa.chunked_array([pa.array([1.0, None], pa.float64()), pa.array([9.5, 10.0])])}
)


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        (Condition("price", equals=10), [False, False, False, True]),
        (Condition("price", one_of=(1, 9.5)), [True, False, True, False]),
        (Condition("price", one_of=()), [False] * 4),
        (Condition("price", not_in=(1,)), [False, False, True, True]),
        (Condition("price", not_in=()), [True, False, True, True]),
        (Condition("price", at_least=9.5), [False, False, True, True]),
        (Condition("price", at_most=9.5), [True, False, True, False]),
        (Condition("price", at_least=2, at_most=9.9), [False, False, True, False]),
        (Condition("price", is_null=True), [False, True, False, False]),
        (Condition("price", is_null=False), [True, False, True, True]),
    ],
)
def test_what_satisfies_a_condition(condition: Condition, wanted: list[bool]) -> None:
    assert satisfied([condition], PRICES).tolist() == wanted


def test_all_conditions_must_hold_and_none_is_no_condition() -> None:
    both = [Condition("price", at_least=2), Condition("price", at_most=9.9)]
    assert satisfied(both, PRICES).tolist() == [False, False, True, False]
    assert satisfied([], PRICES).tolist() == [True] * 4
    assert satisfied(both, PRICES.slice(0, 0)).tolist() == []


VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), st.text(alphabet="ab\u00e9", max_size=2)),
    "whole": (pa.int64(), st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1])),
    "real": (pa.float64(), st.floats(allow_nan=False, allow_infinity=True, width=16)),
    "truth": (pa.bool_(), st.booleans()),
}


@pytest.mark.parametrize("name", VALUES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_conditions_decide_as_a_loop_does(name: str, data: st.DataObject) -> None:
    kind, values = VALUES[name]
    column = data.draw(st.lists(st.none() | values, max_size=6))
    bound = st.none() if name == "truth" else st.none() | values
    listed = st.none() | st.lists(values, max_size=3).map(tuple)
    tests: dict[str, Any] = {
        "equals": data.draw(st.none() | values),
        "one_of": data.draw(listed),
        "not_in": data.draw(listed),
        "at_least": data.draw(bound),
        "at_most": data.draw(bound),
        "is_null": data.draw(st.sampled_from([None, False])),
    }
    if all(value is None for value in tests.values()):
        tests = {"is_null": True}
    condition = Condition("column", **tests)
    check_condition(condition, kind, "key")
    table = pa.table({"column": pa.array(column, kind)})
    assert satisfied([condition], table).tolist() == [holds(condition, value) for value in column]


def test_a_bound_between_two_whole_numbers() -> None:
    table = pa.table({"n": pa.array([1, 2, 3], pa.int64())})
    assert satisfied([Condition("n", at_least=1.5)], table).tolist() == [False, True, True]
    assert satisfied([Condition("n", at_most=2.5)], table).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("condition", "kind", "message"),
    [
        (
            Condition("stock", equals="yes"),
            pa.bool_(),
            "rules.0.equals: got 'yes' (str) for the column 'stock', which is bool, wanted true or "
            "false. Correct the value; in YAML quotes make a text.",
        ),
        (Condition("stock", at_least=True), pa.bool_(), "wanted equals, in or not_in"),
        (Condition("n", equals=1.5), pa.int64(), "which is int64, wanted a whole number"),
        (Condition("n", equals=True), pa.int64(), "got True (bool)"),
        (Condition("n", equals=2**63), pa.int64(), "wanted a whole number"),
        (Condition("n", at_least=math.inf), pa.int64(), "wanted a number"),
        (Condition("n", one_of=(1, "2")), pa.int64(), "rules.0.in: got '2' (str)"),
        (Condition("n", at_most="3"), pa.float64(), "which is double, wanted a number"),
        (Condition("n", at_most=math.nan), pa.float64(), "got nan"),
        (Condition("name", not_in=("a", 7)), pa.string(), "rules.0.not_in: got 7 (int)"),
        (Condition("v", equals=1), pa.list_(pa.int64()), "wanted is_null alone"),
    ],
)
def test_values_of_the_wrong_type_are_refused(
    condition: Condition, kind: pa.DataType, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_condition(condition, kind, "rules.0")
    assert message in str(caught.value)


def test_a_condition_must_ask_something_that_can_be() -> None:
    with pytest.raises(ValueError, match="tests nothing, wanted at least one of equals, in, not_in"):
        Condition("brand")
    with pytest.raises(ValueError, match="asks for null and for equals, which no row can satisfy"):
        Condition("brand", equals="a", is_null=True)
