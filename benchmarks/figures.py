"""What the benchmarks have in common: a figure, the machine it was measured on, and the table."""

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

# CPU flags, as Linux names them, that decide how fast a network can be.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
VERSIONS = (
    "apache-beam",
    "faiss-cpu",
    "keras",
    "numpy",
    "openvino",
    "pillow",
    "pyarrow",
    "simplejpeg",
    "tensorflow",
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line: what was timed, how many of which unit in how many seconds, and against what."""

    part: str
    name: str
    units: int
    unit: str
    seconds: float
    peer: str = ""
    ratio: float | None = None
    note: str = ""

    @property
    def per_second(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    def against(self, name: str, per_second: float) -> "Figure":
        """Returns the figure with its speed relative to a peer's."""
        return dataclasses.replace(self, peer=name, ratio=self.per_second / per_second)

    def to_json(self) -> dict[str, Any]:
        """Returns the figure as an object of JSON."""
        return dataclasses.asdict(self) | {"per_second": self.per_second}


def timed(work: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best_of(repeats: int, work: Callable[[], Any]) -> float:
    """Returns the fewest seconds of a few calls."""
    return min(timed(work) for _ in range(repeats))


def describe_machine() -> dict[str, Any]:
    """Returns the CPU's model and flags, the cores that this process may use, and the versions."""
    info = _cpu_info()
    present = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in present],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


def _cpu_info() -> dict[str, str]:
    """Returns what Linux says of the first CPU; nothing on other systems."""
    if not os.path.exists("/proc/cpuinfo"):
        return {}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _versions() -> Iterable[tuple[str, str]]:
    for name in VERSIONS:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # An extra that is not installed.


def show_machine(machine: dict[str, Any], console: Console) -> None:
    """Prints what the figures were measured on."""
    flags = " ".join(machine["flags"])
    console.print(f"{machine['cpu']} ({flags}), {machine['cores']} cores, Python {machine['python']}")
    console.print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))


def show_figures(figures: Iterable[Figure], console: Console) -> None:
    """Prints the figures as a table."""
    table = Table("", "measured", "units", "seconds", "a second", "ratio", "note")
    last = ""
    for figure in figures:
        if last and figure.part != last:
            table.add_section()
        ratio = f"{figure.ratio:.2f} x {figure.peer}" if figure.ratio is not None else ""
        part = figure.part if figure.part != last else ""
        cells = (f"{figure.units:,} {figure.unit}", f"{figure.seconds:.3f}", speed(figure.per_second))
        table.add_row(part, figure.name, *cells, ratio, figure.note)
        last = figure.part
    console.print(table)


def speed(per_second: float) -> str:
    """Returns a number of units a second as people read it."""
    if per_second >= 1e6:
        return f"{per_second / 1e6:,.0f} M"
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"
