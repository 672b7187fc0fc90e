"""Showing that long work goes on: a bar on a terminal, a line now and then in a log.

Finished parts are counted by their markers, which works on every runner; on the in-process runner
finished units (images, rows) are counted too. Everything goes to standard error.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from index_builder.datasets import manifests, storage
from transforms.counters import LOCAL_PROGRESS

_POLL_SECONDS = 0.5
_REMOTE_POLL_SECONDS = 5.0
_LOG_SECONDS = 10.0


@contextmanager
def watch_stage(name: str, folder: str, parts: int, unit: str, console: Console) -> Iterator[None]:
    """Shows the progress of a stage that writes `parts` parts into `folder`, until the block ends."""
    LOCAL_PROGRESS.take()
    stop = threading.Event()
    show = _draw_bar if console.is_terminal else _write_lines
    watcher = threading.Thread(
        target=show, args=(name, folder, parts, unit, console, stop), daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _poll(folder: str, stop: threading.Event) -> Iterator[tuple[int, int]]:
    """Yields (finished parts, finished units) until the stage ends."""
    pause = _REMOTE_POLL_SECONDS if storage.is_remote(folder) else _POLL_SECONDS
    units = 0
    while True:
        ended = stop.wait(pause)
        units += LOCAL_PROGRESS.take()
        yield manifests.count_finished(folder), units
        if ended:
            return


def _draw_bar(
    name: str, folder: str, parts: int, unit: str, console: Console, stop: threading.Event
) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} parts"),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=parts, detail="")
        start = time.monotonic()
        for done, units in _poll(folder, stop):
            detail = _detail(units, unit, time.monotonic() - start)
            progress.update(task, completed=min(done, parts), detail=detail)
        progress.update(task, completed=parts)


def _write_lines(
    name: str, folder: str, parts: int, unit: str, console: Console, stop: threading.Event
) -> None:
    start = last = time.monotonic()
    for done, units in _poll(folder, stop):
        now = time.monotonic()
        if now - last >= _LOG_SECONDS and not stop.is_set():
            last = now
            detail = _detail(units, unit, now - start)
            print(f"{name}: {done} of {parts} parts {detail}".rstrip(), file=sys.stderr, flush=True)


def _detail(units: int, unit: str, seconds: float) -> str:
    return f"{units:,} {unit}, {units / max(seconds, 1e-9):,.0f}/s" if units else ""
