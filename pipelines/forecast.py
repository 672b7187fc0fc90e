"""Predicted against actual: what a stage was expected to take, and what it took."""

import contextlib
import dataclasses
import resource
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a stage is expected to take: memory that it adds to its process, and seconds."""

    memory_bytes: int
    seconds: float


class Meter:
    """Measures a stage of this process from its making on: time, and peak resident memory.

    The kernel's high-water mark is reset at the start where it lets itself be (Linux); elsewhere the
    peak is that of the process's whole life.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.memory_at_start = _resident_bytes("VmRSS")

    def compare(self, forecast: Forecast) -> dict[str, Any]:
        """Returns `predicted` and `actual`: peak resident bytes of the process, and seconds."""
        return {
            "predicted": {
                "memory_bytes": self.memory_at_start + forecast.memory_bytes,
                "seconds": round(forecast.seconds, 3),
            },
            "actual": {
                # The kernel may count a little less for the peak than it did for the start.
                "memory_bytes": max(_resident_bytes("VmHWM"), self.memory_at_start),
                "memory_at_start_bytes": self.memory_at_start,
                "seconds": round(time.monotonic() - self._start, 3),
            },
        }


def _resident_bytes(field: str) -> int:
    """Returns a memory figure of this process as the kernel tells it (VmRSS: now, VmHWM: peak)."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
