"""`run.json`: every figure of one run, with times, hosts and paths, which datasets leave out."""

import dataclasses
import datetime
import os
import platform
from typing import Any

from index_builder import storage
from index_builder.neighbors import STATUSES
from pipelines.config import Config
from pipelines.embed_images import Embedded
from pipelines.preflight import kith_version, recorded_versions
from pipelines.stage import Dataset

SCHEMA_VERSION = 1
FILE_NAME = "run.json"

PUBLISHED = "published"
NOT_PUBLISHED = "not published"
REFUSED = "refused"

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
    """What the stages of one run made."""

    embedded: Embedded
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
            "embeddings": self.embedded.embeddings,
            "failures": self.embedded.failures,
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


def describe_run(
    config: Config,
    run_id: str,
    status: str,
    started: datetime.datetime,
    ended: datetime.datetime,
    outcome: Outcome,
) -> dict[str, Any]:
    """Returns the document that is written to `run.json`."""
    embedded, index, joined = outcome.embedded, outcome.index.manifest, outcome.neighbors.manifest
    seconds = embedded.embeddings.seconds
    stages = {
        "embed": embedded.embeddings.describe(),
        "build": outcome.index.describe(),
        "join": outcome.neighbors.describe(),
        "evaluate": outcome.evaluation.describe(),
    }
    if outcome.export is not None:
        stages["export"] = outcome.export.describe()
    if outcome.groups is not None:
        stages["groups"] = outcome.groups.describe()
    if outcome.graph is not None:
        stages["graph"] = outcome.graph.describe()
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": status,
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
        "stages": stages,
        "fingerprints": {
            kind: dataset.manifest.fingerprint for kind, dataset in outcome.datasets().items()
        },
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
