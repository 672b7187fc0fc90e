"""The join stage: an index to the neighbours of every item."""

import dataclasses

import apache_beam as beam
import pyarrow.parquet as pq

from index_builder import embeddings, manifests, neighbors, storage
from index_builder.errors import ConfigError
from index_builder.fingerprints import fingerprint
from index_builder.join import JoinSpec, probed_shards
from index_builder.manifests import Manifest, Part
from index_builder.shards import IndexDataset, open_index, open_shard
from pipelines.build_index import shard_order
from pipelines.config import Config
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.neighbors import REVISION, JoinNeighbors, part_name


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """The graph's configuration: query shards in the order of hand-out, and where they go."""

    index_folder: str
    shards: tuple[int, ...]
    spec: JoinSpec
    neighbors_folder: str
    key: str


def define_pipeline(root: beam.Pipeline, config: JoinConfig) -> beam.PCollection[Part]:
    """Defines the join pipeline: numbers of query shards in, descriptors of parts out."""
    return (
        root
        | "ListShards" >> beam.Create(config.shards)
        | "SpreadShards" >> beam.Reshuffle()
        | "JoinNeighbors"
        >> JoinNeighbors(config.index_folder, config.spec, config.neighbors_folder, config.key)
    )


def join_neighbors(config: Config, session: Session, index_folder: str) -> Dataset:
    """Runs the join stage on an index.

    Raises ConfigError when a rule or export column is not in the index.
    """
    index = open_index(index_folder)
    spec = config.join_spec()
    check_columns(index, spec)
    identity = neighbors_identity(config, index)
    folder = dataset_folder(config.workspace, neighbors.KIND, identity)
    graph = JoinConfig(index_folder, tuple(shard_order(index.layout)), spec, folder, identity)
    return run_stage(
        StageTask(
            "join", neighbors.KIND, folder, identity, index.layout.shards, "queries",
            lambda root: define_pipeline(root, graph),
            lambda: _manifest(folder, identity, index, spec),
        ),
        session,
    )  # fmt: skip


def neighbors_identity(config: Config, index: IndexDataset) -> str:
    """Returns the fingerprint of the neighbours that a configuration makes of an index."""
    return fingerprint(
        {
            "kind": neighbors.KIND,
            "revision": REVISION,
            "index": index.manifest.content,
            "spec": _decisive(config.join_spec()),
        }
    )


def _decisive(spec: JoinSpec) -> dict[str, object]:
    """Returns what decides the bytes of the neighbours: everything but the threads."""
    value = dataclasses.asdict(spec)
    del value["threads"]
    return value


def check_columns(index: IndexDataset, spec: JoinSpec) -> None:
    """Raises ConfigError when the index lacks a column that a join needs."""
    known = [field["name"] for field in index.manifest.schema]
    for name in (*spec.rules.columns, *spec.columns):
        if name not in known:
            raise ConfigError(
                f"The join needs the column {name!r} (join.rules, export.columns or evaluate), but "
                f"{index.folder} has only {', '.join(known)}. Add it to images.metadata and embed "
                "again, or correct the name."
            )


def fan_out(index: IndexDataset) -> float:
    """Returns how many corpus shards a query shard probes, on average."""
    touched = []
    for number in range(index.layout.shards):
        with open_shard(index, number, ("probes",)) as shard:
            touched.append(len(probed_shards(index, shard.probes(), number)))
    return sum(touched) / len(touched)


def _manifest(folder: str, identity: str, index: IndexDataset, spec: JoinSpec) -> Manifest:
    names = [part_name(number) for number in range(index.layout.shards)]
    parts = manifests.collect_parts(folder, names, [identity] * len(names))
    with storage.open_binary(storage.join(folder, parts[0].file(".parquet").path)) as file:
        schema = embeddings.describe_schema(pq.read_schema(file))
    totals = {
        name: sum(part.properties[name] for part in parts)
        for name in ("pairs", neighbors.FILLED, neighbors.EXHAUSTED, neighbors.CAPPED)
    }
    properties = {
        **totals,
        **_decisive(spec),
        "metric": index.manifest.properties["metric"],
        "nprobe": index.nprobe,
        "index": index.manifest.content,
        "fan_out": fan_out(index),
    }
    return Manifest(
        neighbors.KIND,
        identity,
        {
            "code": {"join": REVISION},
            "config": _decisive(spec),
            "inputs": index.manifest.content,
        },
        schema,
        parts,
        properties,
    )
