"""`run.json`: every figure of one run, with times, hosts and paths, which datasets leave out."""

import dataclasses
import datetime
import os
import platform
from typing import Any

from index_builder.datasets import storage
from index_builder.search.neighbors import STATUSES
from pipelines.config import Config
from pipelines.embed_images import Embedded
from pipelines.preflight import kith_version, recorded_versions
from pipelines.stage import Dataset

SCHEMA_VERSION = 1
FILE_NAME = "run.json"

# Passed all gates; `current.json` says whether the pointer was moved.
PUBLISHING = "publishing"
PUBLISHED = "published"
NOT_PUBLISHED = "not published"
# By a gate.
REFUSED = "refused"
# The pointer could not be moved.
FAILED = "failed"

# Stage to the kind of its dataset.
_STAGES = {
    "embed": "embeddings",
    "build": "index",
    "join": "neighbors",
    "evaluate": "evaluation",
    "export": "recommendations",
    "groups": "groups",
    "graph": "graph",
}

# What a run tells of each attempt to reach evaluate.min_recall.
ATTEMPT_FIGURES = ("attempt", "nprobe", "estimate", "lower_bound", "confidence", "queries")
# What a run and the commands tell of the groups and of the graph.
GROUP_FIGURES = ("threshold", "groups", "grouped", "largest")
GRAPH_FIGURES = (
    "edges",
    "mutual_edges",
    "mutual_share",
    "unreached",
    "unreached_share",
    "max_reverse_degree",
    "reverse_degree_skewness",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the stages of one run made of its embeddings."""

    index: Dataset
    neighbors: Dataset
    evaluation: Dataset
    figures: dict[str, Any]
    export: Dataset | None
    groups: Dataset | None = None
    attempts: tuple[dict[str, Any], ...] = ()
    graph: Dataset | None = None

    def datasets(self) -> dict[str, Dataset]:
        """Returns the datasets by kind."""
        found = {
            "index": self.index,
            "neighbors": self.neighbors,
            "evaluation": self.evaluation,
        }
        if self.export is not None:
            found["recommendations"] = self.export
        if self.groups is not None:
            found["groups"] = self.groups
        if self.graph is not None:
            found["graph"] = self.graph
        return found


def new_run_id(workspace: str, now: datetime.datetime) -> str:
    """Returns an id that no run of the workspace has: the time in UTC, with a number if needed."""
    base = now.strftime("%Y%m%dT%H%M%SZ")
    run_id, number = base, 1
    while storage.exists(storage.join(workspace, "runs", run_id, FILE_NAME)):
        number += 1
        run_id = f"{base}-{number}"
    return run_id


def with_status(run: dict[str, Any], status: str, reason: str | None = None) -> dict[str, Any]:
    """Returns the document of a run with another end; `reason` says why nothing was published."""
    return {**run, "status": status, "reason": reason}


def describe_run(
    config: Config,
    run_id: str,
    started: datetime.datetime,
    ended: datetime.datetime,
    embedded: Embedded,
    outcome: Outcome | None,
) -> dict[str, Any]:
    """Returns the document that is written to `run.json`, still without a status.

    Without an outcome it is that of a run which was refused for its embeddings.
    """
    seconds = embedded.embeddings.seconds
    made = embedded.datasets()
    if outcome is not None:
        made |= outcome.datasets()
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "started_at": started.isoformat(),
        "ended_at": ended.isoformat(),
        "seconds": round((ended - started).total_seconds(), 3),
        "kith_version": kith_version(),
        "versions": recorded_versions(),
        "host": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "workspace": config.workspace,
        "config": config.model_dump(mode="json"),
        "seeds": {
            "encoder": config.encoder.seed,
            "index": config.index.seed,
            "evaluate": config.evaluate.seed,
        },
        "images": {
            **dataclasses.asdict(embedded.books),
            "per_second": round(embedded.books.embedded / seconds, 1) if seconds else 0.0,
        },
        "encoder": {
            **embedded.embeddings.manifest.properties["encoder"],
            "name": config.encoder.name,
            "dim": embedded.embeddings.manifest.properties["dim"],
        },
        **_describe_outcome(config, outcome),
        "stages": {stage: made[kind].describe() for stage, kind in _STAGES.items() if kind in made},
        "fingerprints": {kind: dataset.manifest.fingerprint for kind, dataset in made.items()},
    }


def _describe_outcome(config: Config, outcome: Outcome | None) -> dict[str, Any]:
    """Returns the figures of all stages behind the embedding; null for a run that had none."""
    if outcome is None:
        names = ("index", "join", "recall", "truth", "duplicates", "graph", "export")
        return dict.fromkeys(names) | {"attempts": []}
    index, joined = outcome.index.manifest, outcome.neighbors.manifest
    return {
        "index": {
            name: index.properties[name]
            for name in ("shards", "nlist", "nprobe", "dim", "metric", "empty_lists", "imbalance")
        }
        | {
            "rows": index.rows,
            "fan_out": joined.properties["fan_out"],
            "metadata": index.properties.get("metadata"),
        },
        "join": {
            "queries": joined.rows,
            **{name: joined.properties[name] for name in ("k", "pairs", *STATUSES)},
            **{name: joined.properties[name] for name in ("filtered", "widened", "rules")},
        },
        "recall": outcome.figures["recall"] | {"minimum": config.evaluate.min_recall},
        "attempts": list(outcome.attempts),
        "truth": outcome.figures["truth"],
        "duplicates": _figures(outcome.groups, GROUP_FIGURES),
        "graph": _figures(outcome.graph, GRAPH_FIGURES),
        "export": _describe_export(outcome.export),
    }


def _figures(dataset: Dataset | None, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns some of a dataset's properties, or None where the run did not make it."""
    return None if dataset is None else {name: dataset.manifest.properties[name] for name in names}


def _describe_export(export: Dataset | None) -> dict[str, Any] | None:
    if export is None:
        return None
    files = [file.path for part in export.manifest.parts for file in part.files]
    return {
        "queries": export.manifest.rows,
        "pairs": export.manifest.properties["pairs"],
        "files": [storage.join(export.folder, name) for name in files],
    }
