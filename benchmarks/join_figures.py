"""From the runs of `benchmarks.join` to its figures and ratios: medians, no measuring."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.embed import Ratio
from benchmarks.figures import Figure, show_figures, show_machine, speed

# The two rows of every method, and what only Kith has.
SEARCH, WHOLE, LIBRARY, COMMAND = "search only", "from vectors", "library call", "kith join"
KITH, KITH_HALF, KITH_BYTE = "Kith", "Kith, bfloat16", "Kith, int8"
# Search only, over lists of one mean length whatever the rows.
EQUAL_LISTS = "search only, equal lists"
BATCH, IVF = "big_batch_search", "IndexIVFFlat"
# So much of `kith join`'s start is no part of its work.
MOST_STARTUP_SEC = 5.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One measurement: of which set, seed and round, in which row, by which method."""

    set: str
    dim: int
    rows: int
    seed: int
    row: str
    method: str
    seconds: float
    stages: dict[str, float]
    recall: float | None = None
    peak_bytes: int | None = None
    pairs: int | None = None
    note: str = ""
    # Seconds of all threads together, of the same work; `at_least`: it was stopped then.
    cpu_seconds: float | None = None
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Product:
    """A measured matrix product: operations a second, of which library, how called, at which dim."""

    set: str
    precision: str
    rate: float
    library: str
    way: str
    dim: int


class Summary:
    """The runs of all sets, and what follows from them."""

    def __init__(self, runs: Sequence[Run], products: Sequence[Product]) -> None:
        self._runs = runs
        self._products = products
        self.sets = list(dict.fromkeys(run.set for run in runs))

    def seconds(self, name: str, row: str, method: str) -> float | None:
        """Returns the median seconds of a method in a row, or None where it was not measured."""
        found = _finished([run for run in self._of(name, row) if run.method == method])
        return statistics.median(run.seconds for run in found) if found else None

    def _of(self, name: str, row: str) -> list[Run]:
        return [run for run in self._runs if run.set == name and run.row == row]

    def limit(self, name: str, precision: str) -> tuple[float, Product] | None:
        """Returns the seconds that the pairs of a set take at the best measured product, and which."""
        found = [p for p in self._products if p.set == name and p.precision == precision]
        counted = [run for run in self._of(name, SEARCH) if run.method == KITH and run.pairs]
        if not found or not counted:
            return None
        best = max(found, key=lambda product: product.rate)
        pairs = statistics.median(run.pairs or 0 for run in counted)
        return 2 * counted[0].dim * pairs / best.rate, best

    def figures(self) -> list[Figure]:
        """Returns a figure for every limit and every method, set by set."""
        return [figure for name in self.sets for figure in self._figures(name)]

    def _figures(self, name: str) -> Iterable[Figure]:
        rows = next(run.rows for run in self._runs if run.set == name)
        for precision in ("float32", "bfloat16"):
            limit = self.limit(name, precision)
            if limit is not None:
                seconds, best = limit
                note = f"{best.library}, {best.way}: {best.rate / 1e9:,.0f} GFLOP/s"
                yield Figure(name, f"limit, {precision}", rows, "vectors", seconds, note=note)
        first = (SEARCH, WHOLE, LIBRARY, COMMAND)
        others = dict.fromkeys(
            run.row for run in self._runs if run.set == name and run.row not in first
        )
        for row in (*first, *others):
            runs = self._of(name, row)
            kith = self.seconds(name, row, KITH)
            for method in dict.fromkeys(run.method for run in runs):
                mine = _finished([run for run in runs if run.method == method])
                seconds = statistics.median(run.seconds for run in mine)
                figure = Figure(name, f"{row}: {method}", rows, "vectors", seconds, note=_note(mine))
                if method != KITH and kith is not None:
                    figure = figure.against(KITH, rows / kith)
                yield figure

    def ratios(self) -> list[Ratio]:
        """Returns what Kith is held to, set by set, and how its cost grows over the sets."""
        found = [ratio for name in self.sets for ratio in self._ratios(name)]
        return found + list(self._growth())

    def _ratios(self, name: str) -> Iterable[Ratio]:
        for row, mine, precisions in (
            (SEARCH, KITH, ("float32",)),
            (WHOLE, KITH, ()),
            (SEARCH, KITH_HALF, ("float32", "bfloat16")),
            (SEARCH, KITH_BYTE, ("float32",)),
        ):
            kith = self.seconds(name, row, mine)
            for precision in precisions:
                limit = self.limit(name, precision)
                if limit is not None and kith:
                    yield Ratio(f"{name}: limit, {precision} / {mine}, {row}", limit[0] / kith)
            for method in dict.fromkeys(run.method for run in self._of(name, row)):
                other = self.seconds(name, row, method)
                if kith and other and method not in (KITH, KITH_HALF, KITH_BYTE):
                    stopped = all(run.at_least for run in self._of(name, row) if run.method == method)
                    note = "at least" if stopped else self._recalls(name, row, method)
                    yield Ratio(f"{name}: {method} / {mine}, {row}", other / kith, note)
        yield from self._command(name)

    def _command(self, name: str) -> Iterable[Ratio]:
        """Yields `kith join` against the library: by the clock, and by the CPU time of both."""
        command = [run for run in self._of(name, COMMAND) if run.method == KITH]
        bare = self._of(name, LIBRARY)
        if command and bare:
            # A difference of two short times: the fastest of each, which the machine disturbed least.
            start = min(run.stages["start"] for run in command)
            seconds = min(run.seconds for run in command)
            library = min(run.seconds for run in bare)
            work = seconds - min(start, MOST_STARTUP_SEC)
            note = f"{seconds:.2f} s, less {min(start, MOST_STARTUP_SEC):.2f} of a start of {start:.2f}"
            yield Ratio(f"{name}: kith join / library call", work / library, note)
        used = [[run.cpu_seconds for run in runs if run.cpu_seconds] for runs in (command, bare)]
        if all(used):
            mine, other = (statistics.median(each) for each in used)
            note = f"{mine:.2f} s of all threads beyond a tiny index's, against {other:.2f}"
            yield Ratio(f"{name}: kith join / library call, CPU time", mine / other, note)

    def _recalls(self, name: str, row: str, method: str) -> str:
        means = []
        for each in (KITH, method):
            runs = [run for run in self._of(name, row) if run.method == each]
            known = [run.recall for run in runs if run.recall is not None]
            if not known:
                return ""
            means.append(statistics.mean(known))
        return f"recall {means[0]:.4f} against {means[1]:.4f}: {means[0] / means[1]:.4f}"

    def _growth(self) -> Iterable[Ratio]:
        """Yields the time of a pair and dimension for every dim that was measured at several sizes."""
        for row in (SEARCH, EQUAL_LISTS):
            for method in (KITH, KITH_HALF):
                yield from self._growth_of(row, method)

    def _growth_of(self, row: str, method: str) -> Iterable[Ratio]:
        costs: dict[int, list[tuple[int, float, str]]] = {}
        for name in self.sets:
            runs = [run for run in self._of(name, row) if run.method == method and run.pairs]
            if runs and ", " not in name:  # Neither real sets nor those with identical rows.
                pairs = statistics.median(run.pairs or 1 for run in runs)
                cost = statistics.median(run.seconds for run in runs) / (pairs * runs[0].dim)
                note = f"{pairs / runs[0].rows:,.0f} pairs a query; {runs[-1].note}"
                costs.setdefault(runs[0].dim, []).append((runs[0].rows, cost, note))
        kind = f"{row.removeprefix(SEARCH)}{method.removeprefix(KITH)}"
        for dim, measured in costs.items():
            for rows, cost, note in sorted(measured):
                if len(measured) > 1:
                    yield Ratio(f"ps a pair and dimension{kind}, {rows:,} x {dim}", cost * 1e12, note)
            if len(measured) > 1:
                most, least = (choose(cost for _, cost, _ in measured) for choose in (max, min))
                yield Ratio(f"ps a pair and dimension{kind}, most / least, dim {dim}", most / least)


def _finished(runs: list[Run]) -> list[Run]:
    """Returns the runs that came to their end, or all where none did."""
    return [run for run in runs if not run.at_least] or runs


def _note(runs: Sequence[Run]) -> str:
    """Returns recall, memory, spread and the stages of a method's runs in words."""
    parts = []
    known = [run.recall for run in runs if run.recall is not None]
    if known:
        parts.append(f"recall {statistics.mean(known):.4f}")
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    if peaks:
        parts.append(f"peak {max(peaks) / 2**20:,.0f} MiB")
    if len(runs) > 1:
        times = sorted(run.seconds for run in runs)
        parts.append(f"{times[0]:.2f} to {times[-1]:.2f} s in {len(runs)}")
    last = runs[-1]
    if len(last.stages) > 1:
        parts.append(" + ".join(f"{name} {seconds:.2f}" for name, seconds in last.stages.items()))
    return "; ".join(parts + [last.note] * bool(last.note))


def run_of(about: dict[str, Any], seed: int, row: str, method: str, found: dict[str, Any]) -> Run:
    """Returns a run from what `benchmarks.vectors` said of a set and what a process printed.

    Search only is the stage `search`; any other row is all of its stages.
    """
    stages = found["stages"]
    seconds = stages["search"] if row == SEARCH else sum(stages.values())
    kept = {"search": seconds} if row == SEARCH else stages
    return Run(
        about["name"], about["dim"], about["rows"], seed, row, method, seconds, kept,
        found.get("recall"), found.get("peak_bytes"), found.get("pairs"), found.get("note", ""),
        found.get("cpu_seconds"), found.get("at_least", False),
    )  # fmt: skip


def show(
    machine: dict[str, Any], figures: list[Figure], ratios: list[Ratio], skipped: dict[str, str],
    console: Console,
) -> None:  # fmt: skip
    """Prints the figures, then the ratios, then what was skipped."""
    show_machine(machine, console)
    show_figures(figures, console)
    table = Table("ratio", "value", "note")
    for ratio in ratios:
        value = f"{ratio.value:.3f}" if ratio.value < 10 else speed(ratio.value)
        table.add_row(ratio.name, value, ratio.note)
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", markup=False)
