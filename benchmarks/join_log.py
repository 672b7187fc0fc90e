"""What `benchmarks.join` has measured, kept line by line, so that a run that is killed is not lost.

A file of runs may be given to several commands, each with some of the parts, on one machine: what it
holds counts as measured by the next.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.embed import Ratio
from benchmarks.join_figures import KITH, SEARCH, Product, Run

_MACHINE = ("cpu", "cores")


class Log:
    """Everything measured so far; each addition is printed and, with a path, written at once.

    Raises ValueError for a file that was measured on another machine.
    """

    def __init__(self, path: Path | None, machine: Mapping[str, Any], console: Console) -> None:
        self.runs: list[Run] = []
        self.products: list[Product] = []
        self.ratios: list[Ratio] = []
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._path = path
        self._console = console
        here = {key: machine[key] for key in _MACHINE}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                self._take(json.loads(line), here)
        self._write("machine", here)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line for people."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def add_run(self, run: Run, versions: Mapping[str, str]) -> None:
        """Keeps a measurement and the versions of what was measured."""
        self.runs.append(run)
        self.versions |= versions
        self._write("run", dataclasses.asdict(run) | {"versions": dict(versions)})
        reached = f", recall {run.recall:.4f}" if run.recall is not None else ""
        least = "at least " if run.at_least else ""
        self.say(
            f"{run.set}, seed {run.seed}: {run.row}: {run.method}: {least}{run.seconds:.2f} s{reached}"
        )

    def add_product(self, product: Product) -> None:
        """Keeps the rate of a matrix product."""
        self.products.append(product)
        self._write("product", dataclasses.asdict(product))
        self.say(f"{product.library}, {product.way}, {product.precision}: "
                 f"{product.rate / 1e9:,.0f} GFLOP/s")  # fmt: skip

    def add_ratio(self, ratio: Ratio) -> None:
        """Keeps a ratio; one of the same name is replaced."""
        self.ratios = [each for each in self.ratios if each.name != ratio.name] + [ratio]
        self._write("ratio", dataclasses.asdict(ratio))
        self.say(f"{ratio.name}: {ratio.value:.3f} {ratio.note}".rstrip())

    def skip(self, name: str, reason: str) -> None:
        """Keeps the reason why something was not measured."""
        self.skipped[name] = reason
        self._write("skipped", {"name": name, "reason": reason})
        self.say(f"{name}: skipped: {reason}", "yellow")

    def of(self, name: str, row: str, method: str) -> list[Run]:
        """Returns the runs of a set in a row by a method."""
        return [run for run in self.runs if (run.set, run.row, run.method) == (name, row, method)]

    def recall(self, name: str) -> float:
        """Returns the recall of Kith's search of a set, 1 where it was not measured."""
        found = [run.recall for run in self.of(name, SEARCH, KITH) if run.recall]
        return found[0] if found else 1.0

    def _take(self, value: dict[str, Any], here: Mapping[str, Any]) -> None:
        kind = value.pop("kind")
        if kind == "machine" and value != here:
            raise ValueError(
                f"{self._path} holds runs of {value}, this machine is {dict(here)}. Give another file."
            )
        if kind == "run":
            self.versions |= value.pop("versions")
            self.runs.append(Run(**value))
        elif kind == "product":
            self.products.append(Product(**value))
        elif kind == "ratio":
            ratio = Ratio(**value)
            self.ratios = [each for each in self.ratios if each.name != ratio.name] + [ratio]
        elif kind == "skipped":
            self.skipped[value["name"]] = value["reason"]

    def _write(self, kind: str, value: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"kind": kind, **value}) + "\n")
