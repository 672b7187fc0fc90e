"""The export stage: neighbours to the files that a recommender loads."""

import dataclasses

import apache_beam as beam
import pyarrow as pa

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import ConfigError
from index_builder.search import neighbors
from pipelines.config import Config
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.exports import (
    KIND,
    REVISION,
    ExportNeighbors,
    ExportSpec,
    carried_columns,
    export_schema,
    item_columns,
)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The graph's configuration."""

    neighbors_folder: str
    parts: tuple[Part, ...]
    spec: ExportSpec
    export_folder: str
    key: str


def define_pipeline(root: beam.Pipeline, config: ExportConfig) -> beam.PCollection[Part]:
    """Defines the export pipeline: descriptors of neighbours parts in, of exported parts out."""
    return (
        root
        | "ListParts" >> beam.Create(config.parts)
        | "SpreadParts" >> beam.Reshuffle()
        | "ExportNeighbors"
        >> ExportNeighbors(
            config.neighbors_folder,
            config.spec,
            config.export_folder,
            config.key,
            tuple(part.name for part in config.parts),
        )
    )


def export_neighbors(config: Config, session: Session, neighbors_folder: str) -> Dataset:
    """Runs the export stage on a neighbours dataset.

    Raises ConfigError when the neighbours do not carry a column that export.columns names.
    """
    source = manifests.load(neighbors_folder, neighbors.KIND)
    spec = config.export_spec()
    carried = {field["name"].removeprefix("query_") for field in source.schema}
    for name in carried_columns(spec):
        if name not in carried:
            raise ConfigError(
                f"export.columns: got {name!r}, wanted a column that {neighbors_folder} carries. "
                "Run kith join with this configuration, or correct the name."
            )
    identity = fingerprint(
        {
            "kind": KIND,
            "revision": REVISION,
            "neighbors": source.content,
            "spec": dataclasses.asdict(spec),
        }
    )
    folder = dataset_folder(config.workspace, KIND, identity)
    graph = ExportConfig(neighbors_folder, source.parts, spec, folder, identity)
    return run_stage(
        StageTask(
            "export", KIND, folder, identity, len(source.parts), "queries",
            lambda root: define_pipeline(root, graph),
            lambda: _manifest(folder, identity, source, spec),
        ),
        session,
    )  # fmt: skip


def _manifest(folder: str, identity: str, source: Manifest, spec: ExportSpec) -> Manifest:
    names = [part.name for part in source.parts]
    parts = manifests.collect_parts(folder, names, [identity] * len(names))
    types = {field["name"]: field["type"] for field in source.schema}
    types["query_image_id"] = "string"
    shown = spec.columns if spec.items is None else item_columns(spec)
    kinds = tuple((name, pa.type_for_alias(types[f"query_{name}"])) for name in shown)
    return Manifest(
        KIND,
        identity,
        {
            "code": {"export": REVISION},
            "config": dataclasses.asdict(spec),
            "inputs": source.content,
        },
        embeddings.describe_schema(export_schema(kinds)),
        parts,
        {
            "pairs": sum(part.properties["pairs"] for part in parts),
            "neighbors": source.content,
            **dataclasses.asdict(spec),
        },
    )
