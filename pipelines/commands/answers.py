"""What a command answers: the figures of `--json`, and how people are shown them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pipelines.stage import Dataset

Show = Callable[[dict[str, Any], Console], None]

_STAGE_FIGURES = ("state", "rows", "bytes", "seconds", "counters", "predicted", "actual")


def show_rows(result: dict[str, Any], console: Console) -> None:
    """Prints a table of two columns: what there is, and its value."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        table.add_row(key, str(value))
    console.print(table)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a command, as JSON takes it, and what prints it for people."""

    result: dict[str, Any]
    show: Show = show_rows


def stage_figures(dataset: "Dataset") -> dict[str, Any]:
    """Returns what every command tells of a dataset that it made."""
    described = dataset.describe()
    return {name: described[name] for name in _STAGE_FIGURES if name in described}


def dataset_answer(name: str, dataset: "Dataset", figures: Sequence[str], **beside: Any) -> Answer:
    """Answers with a dataset's folder, what was made beside it, some properties and its stage."""
    chosen = {figure: dataset.manifest.properties[figure] for figure in figures}
    return Answer({name: dataset.folder, **beside, "figures": chosen, **stage_figures(dataset)})
