"""What becomes of neighbours: they are measured, turned around, exported and published."""

from typing import Literal

from pydantic import Field

from pipelines.sections.base import Section


class Evaluate(Section):
    """What is measured before anything is published."""

    sample: int = Field(
        1000,
        ge=1,
        description="Queries in the random sample that recall is measured on, at most half of the rows "
        "that are set apart from training (about 10,000, at most half of the index). As many as the "
        "index has rows, or more: all of them are measured.",
    )
    seed: int = Field(1, ge=0, lt=2**31, description="Seed of the sample.")
    min_recall: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A run whose recall has a 95 % lower bound below this is not published. With "
        "index.nprobe `auto` it is also what nprobe is calibrated for, and raised for.",
    )
    max_attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="How often a run may certify recall, with nprobe raised by half each time, before "
        "it is refused. A fixed index.nprobe is never raised.",
    )
    recall_by: str | None = Field(
        None, description="Metadata column by whose values recall is certified, too."
    )
    truth: str | None = Field(
        None,
        description="Metadata column whose equal values are right answers; adds hit rates.",
    )
    truth_k: int = Field(10, ge=1, description="A hit is a right answer among this many.")
    group_by: str | None = Field(
        None, description="Metadata column by which figures and examples are listed."
    )
    examples: int = Field(
        3, ge=0, le=20, description="Best, typical and worst queries a group on the page."
    )


class Graph(Section):
    """Mutual neighbours, reverse neighbours and hubness, from the finished join."""

    enabled: bool = Field(
        False, description="Make it in the nightly run; `kith graph` makes it in any case."
    )
    max_reverse: int = Field(
        100,
        ge=1,
        description="Reverse neighbours of an item that are kept, best first; all are counted.",
    )


class Export(Section):
    """The files that a recommender loads."""

    formats: tuple[Literal["parquet", "jsonl"], ...] = Field(
        ("parquet", "jsonl"), min_length=1, description="`parquet`, `jsonl`, or both."
    )
    columns: tuple[str, ...] = Field((), description="Metadata of the neighbours to write along.")
    min_score: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Neighbours with a lower score are left out; the query keeps its row.",
    )
    by: Literal["image", "item"] = Field(
        "image",
        description="What a row is of. `item`: all images of an item together, its neighbours items, "
        "each with its best image.",
    )


class Nightly(Section):
    """The nightly run."""

    publish: bool = Field(True, description="Point `current.json` at a run that passed its gates.")
    report: bool = Field(True, description="Write the HTML page.")
