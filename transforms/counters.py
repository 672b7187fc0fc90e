"""Counting uniformly: every stage counts in, out, failed, bytes and milliseconds.

Beam counters reach the driver on every runner. Beside them a plain count in this process feeds the
progress display of the in-process runner, which reports its counters only at the end.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from apache_beam.metrics import Metrics

NAMESPACE_PREFIX = "kith."


class LocalProgress:
    """A count that driver and workers share when they are one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = 0

    def add(self, amount: int) -> None:
        """Adds finished units (images, rows)."""
        with self._lock:
            self._done += amount

    def take(self) -> int:
        """Returns the count since the last call, and starts again from zero."""
        with self._lock:
            done, self._done = self._done, 0
        return done


LOCAL_PROGRESS = LocalProgress()


def count(stage: str, name: str, amount: int) -> None:
    """Adds to a Beam counter of a stage."""
    Metrics.counter(NAMESPACE_PREFIX + stage, name).inc(int(amount))


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Adds the wall time of a block to the stage's `milliseconds`."""
    start = time.monotonic()
    try:
        yield
    finally:
        count(stage, "milliseconds", round((time.monotonic() - start) * 1000))
