"""The rules of the join."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from index_builder.rules.conditions import Condition
from index_builder.rules.exclusions import ExclusionSpec
from index_builder.rules.rules import JoinRules
from pipelines.sections.base import Section
from transforms.locations import Location

# In this order a YAML `true` stays a truth value and `1` a whole number.
ConditionValue = bool | int | float | str


class ConditionSection(Section):
    """A condition on a metadata column; all that is given must hold. Null satisfies only `is_null`."""

    column: str = Field(description="The metadata column.")
    equals: ConditionValue | None = Field(None, description="The value must be this.")
    one_of: tuple[ConditionValue, ...] | None = Field(
        None, alias="in", description="The value must be in this list."
    )
    not_in: tuple[ConditionValue, ...] | None = Field(
        None, description="There must be a value, and it must not be in this list."
    )
    at_least: ConditionValue | None = Field(
        None, description="The least value; texts are ordered by their bytes."
    )
    at_most: ConditionValue | None = Field(None, description="The greatest value.")
    is_null: bool | None = Field(
        None, description="`true`: there must be no value; `false`: there must be one."
    )

    @model_validator(mode="after")
    def _is_a_condition(self) -> "ConditionSection":
        self.condition()
        return self

    def condition(self) -> Condition:
        """Returns the condition as the join takes it."""
        return Condition(
            self.column,
            self.equals,
            self.one_of,
            self.not_in,
            self.at_least,
            self.at_most,
            self.is_null,
        )


class Exclude(Section):
    """Pairs that may not be neighbours. Absent unless `paths` is set."""

    paths: tuple[Location, ...] = Field(
        (), description="Parquet files of pairs, or globs, local or `gs://`; `[]` is none."
    )
    by: Literal["image_id", "item_id"] = Field(
        "image_id", description="What the pairs name; of items, all images."
    )
    query_column: str = Field("query_id", min_length=1, description="The files' column of the query.")
    neighbor_column: str = Field(
        "neighbor_id", min_length=1, description="The files' column of what it may not get."
    )
    symmetric: bool = Field(False, description="Exclude the other direction, too.")
    unknown_ids: Literal["error", "ignore"] = Field(
        "error", description="What pairs do whose ids are not in the index: stop the join, or nothing."
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def spec(self) -> ExclusionSpec | None:
        """Returns the exclusions as asked for, or None where there are none."""
        if not self.paths:
            return None
        columns = (self.query_column, self.neighbor_column)
        return ExclusionSpec(self.paths, self.by, columns, self.symmetric, self.unknown_ids == "ignore")


class Rules(Section):
    """Which items may be neighbours; applied before the best are chosen, never after."""

    same: tuple[str, ...] = Field(
        (), description="Metadata columns whose value must be equal; null equals nothing."
    )
    different: tuple[str, ...] = Field((), description="Metadata columns whose value must differ.")
    queries: tuple[ConditionSection, ...] = Field(
        (), description="Conditions on queries; one that fails them gets no row of neighbours."
    )
    candidates: tuple[ConditionSection, ...] = Field(
        (), description="Conditions on neighbours, such as `{column: in_stock, equals: true}`."
    )
    max_per: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="One metadata column, and how many neighbours of a query may share a value of it; "
        "all images of an item must have the same. Nulls are not counted. Of an item never more than "
        "one image is a neighbour, its best.",
    )
    exclude: Exclude = Exclude()

    @field_validator("max_per")
    @classmethod
    def _one_column(cls, value: dict[str, int]) -> dict[str, int]:
        JoinRules(max_per=tuple(value.items()))
        return value

    def rules(self) -> JoinRules:
        """Returns the rules as the join takes them, still without exclusions, which are in files."""
        return JoinRules(
            self.same,
            self.different,
            tuple(section.condition() for section in self.queries),
            tuple(section.condition() for section in self.candidates),
            tuple(self.max_per.items()),
        )
