"""Whole runs: the nightly one, its page, and the check before it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipelines.commands.answers import Answer
from pipelines.commands.running import configured

if TYPE_CHECKING:
    from pipelines.config import Config
    from pipelines.stage import Session


@configured
def nightly(config: "Config", session: "Session") -> Answer:
    """Run every stage, check the gates, publish."""
    from pipelines.nightly import run_nightly

    result = run_nightly(config, session)
    return Answer(
        {
            "run": result.run,
            "run_path": result.run_path,
            "report_path": result.report_path,
            "pointer_path": result.pointer_path,
        },
        _show_run,
    )


def _show_run(result: dict[str, Any], console: Console) -> None:
    from pipelines.summary import summary_table

    console.print(summary_table(result["run"]))
    if result["report_path"]:
        console.print(f"Open this page: {result['report_path']}", markup=False)


@configured
def report(
    config: "Config",
    session: "Session",
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Default: the published run.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="Default: in the run's folder.")
    ] = None,
) -> Answer:
    """Write the HTML page of a run again."""
    from pipelines.report.build import rewrite_report

    return Answer({"report_path": rewrite_report(config, run, output)})


@configured
def check(
    config: "Config",
    session: "Session",
    data: Annotated[
        bool, typer.Option("--data", help="Also verify the checksums of all published files.")
    ] = False,
) -> Answer:
    """Check the environment, the configuration and its paths, without any work."""
    from pipelines.check import check_everything

    return Answer(check_everything(config, data))
