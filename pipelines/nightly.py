"""The nightly run: every stage with one configuration, the gates, the publication."""

import dataclasses
import datetime
from typing import Any

from index_builder import storage
from index_builder.errors import GateError
from pipelines import run_manifest
from pipelines.build_index import build_index, next_attempt
from pipelines.config import Config
from pipelines.embed_images import Embedded, embed_images
from pipelines.evaluate_neighbors import check_recall, evaluate_neighbors, read_evaluation
from pipelines.export_neighbors import export_neighbors
from pipelines.find_groups import find_groups
from pipelines.join_neighbors import join_neighbors
from pipelines.neighbor_graph import neighbor_graph
from pipelines.preflight import check_environment, check_inputs
from pipelines.publish import publish
from pipelines.report.build import write_report
from pipelines.run_manifest import Outcome
from pipelines.runners import workspace_lock
from pipelines.stage import Session


@dataclasses.dataclass(frozen=True)
class NightlyResult:
    """What a run left: its `run.json` (the document and where it is), the page, the pointer."""

    run: dict[str, Any]
    run_path: str
    report_path: str | None
    pointer_path: str | None


def run_nightly(config: Config, session: Session) -> NightlyResult:
    """Runs all stages and publishes the result.

    Raises ConfigError before any work for a wrong environment or path; KithError when a stage
    fails, GateError when a gate refuses. What was published before stays published then.
    """
    started = datetime.datetime.now(datetime.UTC)
    check_environment()
    check_inputs(config)
    with workspace_lock(config.workspace):
        run_id = run_manifest.new_run_id(config.workspace, started)
        embedded = embed_images(config, session)
        outcome = _join_until_certified(config, session, embedded)
        try:
            check_recall(outcome.figures, config.evaluate.min_recall)
        except GateError:
            _write_run(config, session, run_id, run_manifest.REFUSED, started, outcome)
            raise
        index, neighbors = outcome.index, outcome.neighbors
        export = export_neighbors(config, session, neighbors.folder)
        outcome = dataclasses.replace(outcome, export=export)
        if config.graph.enabled:
            graph = neighbor_graph(config, session, index.folder, neighbors.folder)
            outcome = dataclasses.replace(outcome, graph=graph)
        published = config.nightly.publish
        status = run_manifest.PUBLISHED if published else run_manifest.NOT_PUBLISHED
        run, run_path, report_path = _write_run(config, session, run_id, status, started, outcome)
        pointer = None
        if published:
            folders = {kind: dataset.folder for kind, dataset in outcome.datasets().items()}
            pointer = publish(config.workspace, run_id, folders)
    return NightlyResult(run, run_path, report_path, pointer)


def _join_until_certified(config: Config, session: Session, embedded: Embedded) -> Outcome:
    """Builds, joins and evaluates, again with more lists a query while recall is below its target.

    Returns the last attempt, whether it reached the target or not.
    """
    retry, attempts = None, []
    while True:
        folders = embedded.embeddings.folder, embedded.failures.folder
        index = build_index(config, session, *folders, retry)
        groups = None
        if config.duplicates.threshold is not None:
            groups = find_groups(config, session, index.folder)
        neighbors = join_neighbors(config, session, index.folder)
        evaluation = evaluate_neighbors(config, session, index.folder, neighbors.folder, folders[0])
        figures = read_evaluation(evaluation)
        recall = figures["recall"]
        attempts.append({name: recall[name] for name in run_manifest.ATTEMPT_FIGURES})
        outcome = Outcome(embedded, index, neighbors, evaluation, figures, None, groups)
        outcome = dataclasses.replace(outcome, attempts=tuple(attempts))
        if recall["lower_bound"] >= config.evaluate.min_recall:
            return outcome
        retry = next_attempt(config, index.folder, index.manifest)
        if retry is None:
            return outcome
        session.console.print(
            f"evaluate: recall@{recall['k']} is at least {recall['lower_bound']:.4f} with nprobe "
            f"{recall['nprobe']}, wanted {config.evaluate.min_recall}; trying nprobe {retry.nprobe} "
            f"(attempt {retry.attempt} of {config.evaluate.max_attempts})"
        )


def _write_run(
    config: Config,
    session: Session,
    run_id: str,
    status: str,
    started: datetime.datetime,
    outcome: Outcome,
) -> tuple[dict[str, Any], str, str | None]:
    """Writes `run.json` and the page; returns the document and both paths."""
    ended = datetime.datetime.now(datetime.UTC)
    run = run_manifest.describe_run(config, run_id, status, started, ended, outcome)
    folder = storage.join(config.workspace, "runs", run_id)
    run_path = storage.join(folder, run_manifest.FILE_NAME)
    storage.write_json(run_path, run)
    if not config.nightly.report:
        return run, run_path, None
    report_path = storage.join(folder, "report.html")
    write_report(
        report_path,
        run,
        outcome.figures,
        outcome.embedded.failures.folder,
        outcome.index.folder,
        config.images.sources,
        config.images.max_pixels,
    )
    session.console.print(f"report: {report_path}")
    return run, run_path, report_path
