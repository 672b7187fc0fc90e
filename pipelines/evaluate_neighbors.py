"""The evaluate stage: what a join is worth, measured."""

import dataclasses
from typing import Any

import apache_beam as beam

from index_builder import manifests, neighbors, storage
from index_builder.errors import ConfigError, FingerprintError, GateError
from index_builder.fingerprints import fingerprint
from index_builder.join import JoinSpec
from index_builder.manifests import Manifest, Part
from index_builder.shards import open_index
from pipelines.config import Config
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.evaluate import (
    FILE_NAME,
    KIND,
    PART_NAME,
    REVISION,
    EvaluateNeighbors,
    EvaluateSpec,
)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The graph's configuration."""

    index_folder: str
    neighbors_folder: str
    parts: tuple[Part, ...]
    join: JoinSpec
    spec: EvaluateSpec
    evaluation_folder: str
    key: str


def define_pipeline(root: beam.Pipeline, config: EvaluateConfig) -> beam.PCollection[Part]:
    """Defines the evaluate pipeline: recall on a sample, statistics over all neighbours."""
    return root | "EvaluateNeighbors" >> EvaluateNeighbors(
        config.index_folder,
        config.neighbors_folder,
        config.parts,
        config.join,
        config.spec,
        config.evaluation_folder,
        config.key,
    )


def evaluate_neighbors(
    config: Config, session: Session, index_folder: str, neighbors_folder: str
) -> Dataset:
    """Runs the evaluate stage on a neighbours dataset and the index that it came from.

    Raises FingerprintError when the two do not belong together, or when the join had other rules
    or another k than the configuration.
    """
    index = open_index(index_folder)
    source = manifests.load(neighbors_folder, neighbors.KIND)
    _check_belonging(index.manifest, source, config.join_spec(), index_folder, neighbors_folder)
    spec = config.evaluate_spec()
    carried = {field["name"].removeprefix("query_") for field in source.schema}
    for name in spec.columns:
        if name not in carried:
            raise ConfigError(
                f"evaluate needs the column {name!r}, which {neighbors_folder} does not carry. Run "
                "kith join with this configuration."
            )
    identity = fingerprint(
        {
            "kind": KIND,
            "revision": REVISION,
            "index": index.manifest.content,
            "neighbors": source.content,
            "spec": dataclasses.asdict(spec),
        }
    )
    folder = dataset_folder(config.workspace, KIND, identity)
    graph = EvaluateConfig(
        index_folder, neighbors_folder, source.parts, config.join_spec(), spec, folder, identity
    )

    def finish() -> Manifest:
        return Manifest(
            KIND,
            identity,
            {
                "code": {"evaluate": REVISION},
                "config": dataclasses.asdict(spec),
                "inputs": [index.manifest.content, source.content],
            },
            [],
            manifests.collect_parts(folder, [PART_NAME], [identity]),
            {},
        )

    return run_stage(
        StageTask(
            "evaluate", KIND, folder, identity, 1, "evaluation",
            lambda root: define_pipeline(root, graph), finish,
        ),
        session,
    )  # fmt: skip


def _check_belonging(
    index: Manifest, source: Manifest, join: JoinSpec, index_folder: str, neighbors_folder: str
) -> None:
    if source.properties["index"] != index.content:
        raise FingerprintError(
            f"{neighbors_folder} was joined over an index with content {source.properties['index']}, "
            f"but {index_folder} has {index.content}. Give the index that it was made from, or run "
            "the join again."
        )
    rules = dataclasses.asdict(join.rules)
    wanted = {"k": join.k, "rules": {name: list(value) for name, value in rules.items()}}
    found = {name: source.properties[name] for name in wanted}
    if found != wanted:
        raise FingerprintError(
            f"{neighbors_folder} was joined with {found}, the configuration says {wanted}. Run the "
            "join again, or use the configuration it was made with."
        )


def read_evaluation(dataset: Dataset) -> dict[str, Any]:
    """Returns the figures of an evaluation dataset."""
    value: dict[str, Any] = storage.read_json(storage.join(dataset.folder, FILE_NAME))
    return value


def check_recall(evaluation: dict[str, Any], minimum: float) -> None:
    """Raises GateError when the lower bound of recall is below the minimum."""
    recall = evaluation["recall"]
    if recall["lower_bound"] < minimum:
        raise GateError(
            f"Recall@{recall['k']} is {recall['estimate']:.4f} with a 95 % lower bound of "
            f"{recall['lower_bound']:.4f} ({recall['queries']} queries), evaluate.min_recall wants "
            f"{minimum}. Nothing was published. Raise index.nprobe, or enlarge evaluate.sample "
            "where the bound is far below the estimate."
        )
