"""The graph stage: neighbours to their mutual and reverse sides."""

import dataclasses
from typing import Any

import apache_beam as beam

from index_builder.datasets import manifests
from index_builder.datasets.embeddings import describe_schema
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part, require_files
from index_builder.datasets.suspects import drop_suspects
from index_builder.errors import FingerprintError
from index_builder.index.shards import open_index
from index_builder.search import neighbors
from index_builder.steps import graph
from index_builder.steps.graph import GraphSpec
from pipelines.config import Config
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.graph import REVISION, BuildGraph, part_name


def define_pipeline(root: beam.Pipeline, config: BuildGraph) -> beam.PCollection[Part]:
    """Defines the graph pipeline: numbers of neighbours parts in, descriptors of parts out."""
    return (
        root
        | "ListParts" >> beam.Create(range(len(config.parts)))
        | "SpreadParts" >> beam.Reshuffle()
        | "BuildGraph" >> config
    )


def neighbor_graph(
    config: Config, session: Session, index_folder: str, neighbors_folder: str
) -> Dataset:
    """Runs the graph stage on a neighbours dataset and the index that it came from.

    Raises FingerprintError when the two do not belong together, or when the queries of the join were
    not the rows of the index.
    """
    index = open_index(index_folder)
    source = manifests.load(neighbors_folder, neighbors.KIND)
    if "queries" in source.properties:
        raise FingerprintError(
            f"{neighbors_folder} holds the neighbours of queries that are not in the index, so none of "
            "them can be mutual. Give neighbours that kith join made without --queries."
        )
    if source.properties["index"] != index.manifest.content:
        raise FingerprintError(
            f"{neighbors_folder} was joined over an index with content {source.properties['index']}, "
            f"but {index_folder} has {index.manifest.content}. Give the index that it was made from, "
            "or run the join again."
        )
    require_files(neighbors_folder, source)
    spec = config.graph_spec()
    identity = fingerprint(
        {
            "kind": graph.KIND,
            "revision": REVISION,
            "index": index.manifest.content,
            "neighbors": source.content,
            "spec": dataclasses.asdict(spec),
        }
    )
    folder = dataset_folder(config.workspace, graph.KIND, identity)
    plan = BuildGraph(index_folder, neighbors_folder, source.parts, spec, folder, identity)
    return run_stage(
        StageTask(
            "graph", graph.KIND, folder, identity, 3 * len(source.parts), "queries",
            lambda root: define_pipeline(root, plan),
            lambda: _manifest(folder, identity, source, spec, index.layout.rows),
            lambda: drop_suspects(folder, identity),
        ),
        session,
    )  # fmt: skip


def _manifest(folder: str, identity: str, source: Manifest, spec: GraphSpec, rows: int) -> Manifest:
    names = [part_name(number) for number in range(len(source.parts))]
    parts = manifests.collect_parts(folder, names, [identity] * len(names))
    properties: dict[str, Any] = {
        **graph.graph_figures([part.properties for part in parts], rows),
        **dataclasses.asdict(spec),
        "items": rows,
        "reverse_schema": describe_schema(graph.REVERSE_SCHEMA),
        "mutual_schema": describe_schema(graph.MUTUAL_SCHEMA),
        "neighbors": source.content,
    }
    return Manifest(
        graph.KIND,
        identity,
        {
            "code": {"graph": REVISION},
            "config": dataclasses.asdict(spec),
            "inputs": source.content,
        },
        describe_schema(graph.EVIDENCE_SCHEMA),
        parts,
        properties,
    )
