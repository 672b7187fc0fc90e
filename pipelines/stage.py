"""What all stages share: skip when nothing changed, run, commit, and say what happened."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from index_builder.datasets import manifests, storage
from index_builder.datasets.fingerprints import short
from index_builder.datasets.manifests import Manifest
from pipelines.forecast import Forecast, Meter
from pipelines.progress import watch_stage
from pipelines.runners import Define, RunnerSpec, run_pipeline

UNCHANGED = "unchanged"
RESUMED = "resumed"
MADE = "made"

# Kind of a dataset to the folder of the workspace in which its versions live.
FOLDERS = {
    "embeddings": "embeddings",
    "failures": "failures",
    "index": "index",
    "queries": "queries",
    "exclusions": "exclusions",
    "groups": "groups",
    "neighbors": "neighbors",
    "graph": "graph",
    "evaluation": "evaluations",
    "recommendations": "exports",
}


@dataclasses.dataclass(frozen=True)
class Session:
    """How this process runs pipelines and talks to people (on standard error)."""

    runner: RunnerSpec
    console: Console


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A complete dataset and how it came about: `state` is made, resumed or unchanged.

    `forecast` holds `predicted` and `actual` of a stage that was predicted and made in one go.
    """

    folder: str
    manifest: Manifest
    state: str
    seconds: float
    counters: dict[str, int]
    forecast: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the stage's entry of `run.json`."""
        return {
            "state": self.state,
            "seconds": round(self.seconds, 3),
            "path": self.folder,
            "rows": self.manifest.rows,
            "bytes": self.manifest.bytes,
            "fingerprint": self.manifest.fingerprint,
            "content": self.manifest.content,
            "counters": self.counters,
            **(self.forecast or {}),
        }


def dataset_folder(workspace: str, kind: str, fingerprint: str) -> str:
    """Returns the folder of the dataset of a kind with a fingerprint."""
    return storage.join(workspace, FOLDERS[kind], short(fingerprint))


@dataclasses.dataclass(frozen=True)
class StageTask:
    """One stage's work on one dataset.

    `prepare` runs before the pipeline (checks, reused parts), `define` builds its graph, `finish`
    reads the markers and returns the manifest. `parts` and `unit` are for the progress display.
    `forecast` predicts what a whole run of the stage takes, on workers in this process, or returns
    None where it cannot; `settled` predicts it again once the work is done, with what the work chose.
    """

    name: str
    kind: str
    folder: str
    fingerprint: str
    parts: int
    unit: str
    define: Define
    finish: Callable[[], Manifest]
    prepare: Callable[[], None] = lambda: None
    forecast: Callable[[], Forecast | None] | None = None
    settled: Callable[[Forecast], Forecast] = lambda forecast: forecast


def run_stage(task: StageTask, session: Session) -> Dataset:
    """Makes a dataset, or finds that it is there already.

    Raises KithError; what was finished until then is kept, and the next run goes on from there.
    """
    start = time.monotonic()
    manifest = manifests.load_if_usable(task.folder, task.kind, task.fingerprint)
    if manifest is not None:
        manifests.clear_work(task.folder)
        session.console.print(f"{task.name}: unchanged, nothing to do")
        return Dataset(task.folder, manifest, UNCHANGED, time.monotonic() - start, {})
    resumed = manifests.count_finished(task.folder) > 0
    if resumed:
        session.console.print(f"{task.name}: going on where an earlier run stopped")
    forecast = None
    if task.forecast is not None and not resumed and session.runner.is_local:
        forecast = task.forecast()
    meter = Meter()
    task.prepare()
    with watch_stage(task.name, task.folder, task.parts, task.unit, session.console):
        counters = run_pipeline(task.define, session.runner)
    manifest = task.finish()
    forecast = None if forecast is None else task.settled(forecast)
    manifests.commit(task.folder, manifest)
    state = RESUMED if resumed else MADE
    seconds = time.monotonic() - start
    session.console.print(f"{task.name}: {manifest.rows:,} {task.unit} in {seconds:.1f} s")
    figures = None if forecast is None else meter.compare(forecast)
    return Dataset(task.folder, manifest, state, seconds, counters, figures)
