"""The join."""

from typing import Literal

from pydantic import Field

from index_builder.search.join import MOST_NEIGHBORS
from pipelines.sections.base import AutoCount, AutoCountOrZero, Section
from pipelines.sections.rules import Rules


class Join(Section):
    """The all-against-all join."""

    k: int = Field(20, ge=1, le=MOST_NEIGHBORS, description="Neighbours of each item.")
    rules: Rules = Rules()
    max_probe: AutoCountOrZero = Field(
        None,
        description="A query that the probed lists leave with fewer than k neighbours is searched "
        "again over this many lists; `auto`: four times index.nprobe; 0: never.",
    )
    evidence: tuple[Literal["margin"], ...] = Field(
        (),
        description="More about each neighbour than its exact score and its rank, the place in the "
        "list, which are always there: `margin` is its score minus that of the next.",
    )
    threads: AutoCount = Field(None, description="Threads of one join task; `auto`: all cores.")
