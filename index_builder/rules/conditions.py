"""Conditions on metadata columns: which rows take part in a join, and as what.

A null satisfies no condition, except `is_null`, which asks for it (or for its absence) by name.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_builder.errors import ConfigError

Value = bool | int | float | str

# Bounds and lists by the names of the configuration, for messages.
_TESTS = ("equals", "in", "not_in", "at_least", "at_most", "is_null")


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a row's value of a column must be; all that is given must hold.

    `equals`, `one_of` and `not_in` compare, `at_least` and `at_most` are inclusive bounds, `is_null`
    asks for a null or for none. Text is ordered by its UTF-8 bytes. Raises ValueError.
    """

    column: str
    equals: Value | None = None
    one_of: tuple[Value, ...] | None = None
    not_in: tuple[Value, ...] | None = None
    at_least: Value | None = None
    at_most: Value | None = None
    is_null: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in self.tests() if value is not None]
        if not given:
            raise ValueError(
                f"the condition on {self.column!r} tests nothing, wanted at least one of "
                f"{', '.join(_TESTS)}. Say what the value must be."
            )
        if self.is_null and len(given) > 1:
            raise ValueError(
                f"the condition on {self.column!r} asks for null and for {given[0]}, which no row can "
                "satisfy. Keep one of them."
            )

    def tests(self) -> tuple[tuple[str, Any], ...]:
        """Returns (name in the configuration, value) of every test; None is not given."""
        values = (self.equals, self.one_of, self.not_in, self.at_least, self.at_most, self.is_null)
        return tuple(zip(_TESTS, values, strict=True))

    def satisfied(self, column: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Tells which values satisfy the condition, bool [n]."""
        if self.is_null:
            return _bools(pc.is_null(column))
        if pa.types.is_floating(column.type):
            column = pc.add(column, 0.0).cast(column.type)  # Arrow tells -0.0 from 0.0 in a list.
        found = pc.is_valid(column)
        if self.equals is not None:
            found = pc.and_(found, pc.is_in(column, value_set=_values([self.equals], column.type)))
        if self.one_of is not None:
            found = pc.and_(found, pc.is_in(column, value_set=_values(self.one_of, column.type)))
        if self.not_in is not None:
            listed = pc.is_in(column, value_set=_values(self.not_in, column.type))
            found = pc.and_(found, pc.invert(listed))
        if self.at_least is not None:
            low = _bound(self.at_least, column.type, math.ceil)
            found = pc.and_(found, pc.fill_null(pc.greater_equal(column, low), False))
        if self.at_most is not None:
            high = _bound(self.at_most, column.type, math.floor)
            found = pc.and_(found, pc.fill_null(pc.less_equal(column, high), False))
        return _bools(found)


def satisfied(conditions: Sequence[Condition], table: pa.Table) -> NDArray[np.bool_]:
    """Tells which rows satisfy all conditions, bool [n]."""
    found = np.ones(len(table), dtype=bool)
    for condition in conditions:
        found &= condition.satisfied(table[condition.column])
    return found


def check_condition(condition: Condition, kind: pa.DataType, key: str) -> None:
    """Raises ConfigError when a condition's values do not fit the type of its column.

    `key` is the configuration's key of the condition, for the message.
    """
    for name, value in condition.tests():
        if value is None or name == "is_null":
            continue
        bound = name in ("at_least", "at_most")
        for one in value if isinstance(value, tuple) else (value,):
            if not _fits(one, kind, bound=bound):
                raise ConfigError(
                    f"{key}.{name}: got {one!r} ({type(one).__name__}) for the column "
                    f"{condition.column!r}, which is {kind}, wanted {_wanted(kind, bound=bound)}. "
                    "Correct the value; in YAML quotes make a text."
                )


def _fits(value: Value, kind: pa.DataType, *, bound: bool) -> bool:
    if pa.types.is_boolean(kind):
        return isinstance(value, bool) and not bound
    if pa.types.is_integer(kind):
        if isinstance(value, float):
            # A bound between two whole numbers is as good as the next one inside.
            return bound and abs(value) < 2**62
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if pa.types.is_floating(kind):
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return pa.types.is_string(kind) and isinstance(value, str)


def _wanted(kind: pa.DataType, *, bound: bool) -> str:
    if pa.types.is_boolean(kind):
        return "equals, in or not_in, as a truth value has no order" if bound else "true or false"
    if pa.types.is_integer(kind):
        return "a number" if bound else "a whole number"
    if pa.types.is_floating(kind):
        return "a number"
    return "a text" if pa.types.is_string(kind) else "is_null alone, as the type has no conditions"


def _values(values: Sequence[Value], kind: pa.DataType) -> pa.Array:
    listed = pa.array(list(values), kind)
    return pc.add(listed, 0.0).cast(kind) if pa.types.is_floating(kind) else listed


def _bound(value: Value, kind: pa.DataType, rounded: Any) -> pa.Scalar:
    if pa.types.is_integer(kind) and isinstance(value, float):
        value = rounded(value)
    return pa.scalar(value, kind)


def _bools(found: pa.ChunkedArray) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = found.to_numpy()
    return flags
