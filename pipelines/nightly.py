"""The nightly run: every stage with one configuration, the gates, the publication."""

import dataclasses
import datetime
from typing import Any

from index_builder.datasets import storage
from index_builder.errors import GateError
from pipelines import run_manifest
from pipelines.build_index import build_index, next_attempt
from pipelines.config import Config
from pipelines.embed_images import Embedded, check_embedded, make_embeddings
from pipelines.evaluate_neighbors import check_recall, evaluate_neighbors, read_evaluation
from pipelines.export_neighbors import export_neighbors
from pipelines.find_groups import find_groups
from pipelines.join_neighbors import join_neighbors
from pipelines.neighbor_graph import neighbor_graph
from pipelines.preflight import check_environment, check_inputs
from pipelines.report.build import gather_page
from pipelines.run_manifest import NOT_PUBLISHED, REFUSED, Outcome
from pipelines.run_record import RunRecord, complete_published_record
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
        complete_published_record(config.workspace)
        run_id = run_manifest.new_run_id(config.workspace, started)
        embedded = make_embeddings(config, session)
        try:
            check_embedded(config, embedded)
        except GateError as error:
            _record(config, session, run_id, started, embedded).write(REFUSED, str(error))
            raise
        outcome = _join_until_certified(config, session, embedded)
        try:
            check_recall(outcome.figures, config.evaluate.min_recall)
        except GateError as error:
            _record(config, session, run_id, started, embedded, outcome).write(REFUSED, str(error))
            raise
        index, neighbors = outcome.index, outcome.neighbors
        export = export_neighbors(config, session, neighbors.folder)
        outcome = dataclasses.replace(outcome, export=export)
        if config.graph.enabled:
            graph = neighbor_graph(config, session, index.folder, neighbors.folder)
            outcome = dataclasses.replace(outcome, graph=graph)
        record = _record(config, session, run_id, started, embedded, outcome)
        if not config.nightly.publish:
            run = record.write(NOT_PUBLISHED)
            return NightlyResult(run, record.run_path, record.report_path, None)
        datasets = embedded.datasets() | outcome.datasets()
        folders = {kind: dataset.folder for kind, dataset in datasets.items()}
        run, pointer = record.publish(config.workspace, folders, session.console)
    return NightlyResult(run, record.run_path, record.report_path, pointer)


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
        outcome = Outcome(index, neighbors, evaluation, figures, None, groups)
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


def _record(
    config: Config,
    session: Session,
    run_id: str,
    started: datetime.datetime,
    embedded: Embedded,
    outcome: Outcome | None = None,
) -> RunRecord:
    """Describes the run as far as it came, and gathers its page."""
    ended = datetime.datetime.now(datetime.UTC)
    document = run_manifest.describe_run(config, run_id, started, ended, embedded, outcome)
    folder = storage.join(config.workspace, "runs", run_id)
    page = None
    if config.nightly.report:
        page = gather_page(
            {} if outcome is None else outcome.figures,
            embedded.failures.folder,
            None if outcome is None else outcome.index.folder,
            config.images.sources,
            config.images.max_pixels,
        )
        session.console.print(f"report: {storage.join(folder, 'report.html')}")
    return RunRecord(folder, document, page)
