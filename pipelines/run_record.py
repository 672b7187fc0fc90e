"""What a run leaves of itself in `runs/<id>`: `run.json` and the page, which tell its end.

The pointer is what counts. A run says `publishing` before it moves the pointer and `published` after,
so whenever it is killed, neither file claims what is not so; the next run completes the word.
"""

import contextlib
import dataclasses
from typing import Any

from rich.console import Console

from index_builder.datasets import storage
from index_builder.errors import KithError
from pipelines import run_manifest
from pipelines.publish import publish, read_pointer
from pipelines.report.build import Page


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """The record of one run: where it is, the document without a status, the page if one is wanted."""

    folder: str
    document: dict[str, Any]
    page: Page | None

    @property
    def run_path(self) -> str:
        """The path of `run.json`."""
        return storage.join(self.folder, run_manifest.FILE_NAME)

    @property
    def report_path(self) -> str | None:
        """The path of the page."""
        return None if self.page is None else storage.join(self.folder, "report.html")

    def write(self, status: str, reason: str | None = None) -> dict[str, Any]:
        """Writes `run.json` and the page with a status; returns the document."""
        run = run_manifest.with_status(self.document, status, reason)
        storage.write_json(self.run_path, run)
        if self.page is not None and self.report_path is not None:
            self.page.write(self.report_path, run)
        return run

    def publish(
        self, workspace: str, datasets: dict[str, str], console: Console
    ) -> tuple[dict[str, Any], str]:
        """Publishes the run; returns its document and the path of the pointer.

        Raises what moving the pointer raises; the record says `failed` and why then.
        """
        self.write(run_manifest.PUBLISHING)
        try:
            pointer = publish(workspace, self.document["run_id"], datasets)
        except Exception as error:  # Whatever it was, the record tells it, and it goes on.
            # The disk that had no room for the pointer may have none for this either.
            with contextlib.suppress(KithError, OSError):
                self.write(run_manifest.FAILED, str(error))
            raise
        try:
            run = self.write(run_manifest.PUBLISHED)
        except (KithError, OSError) as error:
            # It is published all the same.
            run = run_manifest.with_status(self.document, run_manifest.PUBLISHED)
            console.print(
                f"The run is published, but its record still says {run_manifest.PUBLISHING!r}: {error} "
                "The next run corrects run.json.",
                markup=False,
            )
        return run, pointer


def complete_published_record(workspace: str) -> None:
    """Lets the `run.json` of the published run say so, where a kill or an error came in between."""
    # What is damaged or gone is not mended here; who needs it says so.
    with contextlib.suppress(KithError, FileNotFoundError):
        pointer = read_pointer(workspace)
        if pointer is None:
            return
        folder = storage.join(workspace, str(pointer.get("run_path")))
        path = storage.join(folder, run_manifest.FILE_NAME)
        run = storage.read_json(path)
        unfinished = (run_manifest.PUBLISHING, run_manifest.FAILED)
        if isinstance(run, dict) and run.get("status") in unfinished:
            storage.write_json(path, run_manifest.with_status(run, run_manifest.PUBLISHED))
