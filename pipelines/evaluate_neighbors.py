"""The evaluate stage: what a join is worth, measured."""

import dataclasses
import json
from typing import Any

import apache_beam as beam

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.sampling import evaluation_rows
from index_builder.errors import ConfigError, FingerprintError, GateError
from index_builder.index.shards import open_index
from index_builder.recall.recall import least_sample
from index_builder.search import neighbors
from index_builder.search.corpus import Corpus
from index_builder.search.join import JoinSpec
from pipelines.build_index import open_metadata
from pipelines.config import Config
from pipelines.find_groups import add_groups
from pipelines.join_exclusions import settle_join
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.evaluate import (
    FILE_NAME,
    KIND,
    PART_NAME,
    REVISION,
    EvaluateNeighbors,
    EvaluateSpec,
)


def define_pipeline(root: beam.Pipeline, config: EvaluateNeighbors) -> beam.PCollection[Part]:
    """Defines the evaluate pipeline: recall on a sample, statistics over all neighbours."""
    return root | "EvaluateNeighbors" >> config


def evaluate_neighbors(
    config: Config,
    session: Session,
    index_folder: str,
    neighbors_folder: str,
    embeddings_folder: str | None = None,
) -> Dataset:
    """Runs the evaluate stage on a neighbours dataset and the index that it came from.

    With the embeddings that the index was made of, recall is also measured in the encoder's own space.

    Raises FingerprintError when the two do not belong together, or when the join had other rules
    or another k than the configuration.
    """
    index, join = add_groups(config, open_index(index_folder), config.join_spec())
    settled = settle_join(config, index, join)
    join = settled.spec
    source = manifests.load(neighbors_folder, neighbors.KIND)
    _check_belonging(index.manifest, source, join, index_folder, neighbors_folder)
    spec = _settle_spec(config, index.manifest)
    corpus = None
    if embeddings_folder is not None:
        corpus = _find_corpus(config, index.manifest, embeddings_folder)
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
            "encoder_space": corpus is not None,
        }
    )
    folder = dataset_folder(config.workspace, KIND, identity)
    graph = EvaluateNeighbors(
        index_folder, neighbors_folder, source.parts, join, spec, folder, identity, corpus
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
            {"certificate": storage.read_json(storage.join(folder, FILE_NAME))["recall"]},
        )

    return run_stage(
        StageTask(
            "evaluate", KIND, folder, identity, 1, "evaluation",
            lambda root: define_pipeline(root, graph), finish, settled.prepare,
        ),
        session,
    )  # fmt: skip


def _settle_spec(config: Config, index: Manifest) -> EvaluateSpec:
    """Returns what is measured of this index: the promise for the attempt that the index is."""
    spec = config.evaluate_spec()
    promise, properties = spec.promise, index.properties
    if properties["calibration"] is None:
        # A given nprobe is not raised, nor is that of all lists.
        promise = dataclasses.replace(promise, attempts=1)
    attempt = min(int(properties["attempt"]), promise.attempts)
    return dataclasses.replace(spec, promise=promise, attempt=attempt, metric=properties["metric"])


def _find_corpus(config: Config, index: Manifest, folder: str) -> Corpus | None:
    """Returns the embeddings of an index, with the metadata table it was made with.

    None where the table is another by now. Raises FingerprintError for other embeddings.
    """
    source = manifests.load(folder, embeddings.KIND)
    if source.content != index.properties["embeddings"]:
        raise FingerprintError(
            f"The index was made of embeddings with content {index.properties['embeddings']}, but "
            f"{folder} has {source.content}. Give the embeddings that it was made of."
        )
    table = open_metadata(config)
    made_with = index.fingerprints.get("metadata")
    if made_with != (None if table is None else json.loads(json.dumps(table.fingerprint_value()))):
        return None
    # A part without rows has nothing to search in.
    return Corpus(folder, tuple(part for part in source.parts if part.rows), table)


def _check_belonging(
    index: Manifest, source: Manifest, join: JoinSpec, index_folder: str, neighbors_folder: str
) -> None:
    if "queries" in source.properties:
        raise FingerprintError(
            f"{neighbors_folder} holds the neighbours of queries that are not in the index, and recall "
            "is measured on the index's own rows. Give neighbours of a join without --queries."
        )
    if source.properties["index"] != index.content:
        raise FingerprintError(
            f"{neighbors_folder} was joined over an index with content {source.properties['index']}, "
            f"but {index_folder} has {index.content}. Give the index that it was made from, or run "
            "the join again."
        )
    # As JSON holds them: tuples are lists there.
    wanted = {"k": join.k, "rules": json.loads(json.dumps(dataclasses.asdict(join.rules)))}
    found = {name: source.properties[name] for name in wanted}
    wanted["groups"] = None if join.groups is None else join.groups.content
    found["groups"] = source.properties.get("groups")
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
            f"Recall@{recall['k']} is {recall['estimate']:.4f} with a {recall['confidence']:.2%} lower "
            f"bound of {recall['lower_bound']:.4f} ({recall['queries']} queries, nprobe "
            f"{recall['nprobe']} of {recall['nlist']} lists), evaluate.min_recall wants {minimum}. "
            f"Nothing was published. {_advice(recall, minimum)}"
        )


def _advice(recall: dict[str, Any], minimum: float) -> str:
    """Returns what helps a certificate that is below its target."""
    if recall["estimate"] >= minimum and recall["queries"] < recall["rows"]:
        enough = f"measure every row, evaluate.sample: {recall['rows']}"
        least = least_sample(minimum, 1 - recall["confidence"]) if minimum < 1 else recall["rows"]
        most = evaluation_rows(recall["rows"]) // 2
        if least <= most and recall["queries"] < 0.9 * most:
            enough = f"enlarge evaluate.sample ({least} without a miss would prove it)"
        other = "" if recall["nprobe"] == recall["nlist"] else " Or raise index.nprobe."
        return f"The estimate is above it, so more queries may prove it: {enough}.{other}"
    if recall["nprobe"] == recall["nlist"]:
        return (
            "Every list was searched, so the neighbours are not those of this index and these rules: "
            "run the join again, and build the index again if that does not help."
        )
    return (
        "Raise index.nprobe, or leave it `auto` and raise evaluate.max_attempts; where lists no "
        "longer fit the catalogue, build with another index.seed or index.nlist."
    )
