"""What every part of the configuration has in common: what is not meant is refused."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Some keys and their values: unknown keys are refused, values do not change.

    `true` and `false` are no numbers here, although Python takes them for 1 and 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _tell_truth_from_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        numbers = {
            field.alias or name
            for name, field in cls.model_fields.items()
            if _only_a_number(field.annotation)
        }
        return {key: _marked(value) if key in numbers else value for key, value in values.items()}


@dataclasses.dataclass(frozen=True, repr=False)
class _TruthValue:
    """Stands for a truth value where pydantic would make a number of it; it refuses this, in place."""

    value: bool

    def __repr__(self) -> str:
        return repr(self.value)


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item) for item in value]
    return _TruthValue(value) if isinstance(value, bool) else value


def _only_a_number(annotation: Any) -> bool:
    """Tells whether a field takes numbers, alone or in a container, but no truth values."""
    types = set(_plain_types(annotation))
    return bool(types & {int, float}) and bool not in types


def _plain_types(annotation: Any) -> Iterator[type]:
    """Yields the types that an annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _plain_types(part)
