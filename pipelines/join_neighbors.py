"""The join stage: an index to the neighbours of every item."""

import dataclasses

import apache_beam as beam

from index_builder.datasets.manifests import Part, require_files
from index_builder.datasets.suspects import drop_suspects
from index_builder.errors import ConfigError, DatasetError
from index_builder.index.shards import IndexDataset, open_index
from index_builder.search import neighbors
from index_builder.search.join import JoinSpec
from index_builder.steps import joining, plan
from index_builder.steps.host_speed import measure_join
from index_builder.steps.joining import JoinTask, neighbors_manifest
from pipelines.build_index import shard_order
from pipelines.config import Config
from pipelines.find_groups import add_groups
from pipelines.forecast import Forecast
from pipelines.join_exclusions import settle_join
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.neighbors import JoinNeighbors


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """The graph's configuration: query shards in the order of hand-out, and what each task does."""

    shards: tuple[int, ...]
    task: JoinTask


def define_pipeline(root: beam.Pipeline, config: JoinConfig) -> beam.PCollection[Part]:
    """Defines the join pipeline: numbers of query shards in, descriptors of parts out."""
    return (
        root
        | "ListShards" >> beam.Create(config.shards)
        | "SpreadShards" >> beam.Reshuffle()
        | "JoinNeighbors" >> JoinNeighbors(config.task)
    )


def join_neighbors(config: Config, session: Session, index_folder: str) -> Dataset:
    """Runs the join stage on an index.

    Raises ConfigError when a rule or export column is not in the index, or a rule does not fit it;
    DatasetError for excluded pairs with unknown ids.
    """
    index, spec = add_groups(config, open_index(index_folder), config.join_spec())
    check_columns(index, spec)
    settled = settle_join(config, index, spec)
    spec = settled.spec
    require_files(index_folder, index.manifest)
    identity = joining.neighbors_identity(index.manifest, spec)
    folder = dataset_folder(config.workspace, neighbors.KIND, identity)
    graph = JoinConfig(tuple(shard_order(index.layout)), JoinTask(index_folder, spec, folder, identity))

    def prepare() -> None:
        drop_suspects(folder, identity)
        settled.prepare()

    return run_stage(
        StageTask(
            "join", neighbors.KIND, folder, identity, index.layout.shards, "queries",
            lambda root: define_pipeline(root, graph),
            lambda: neighbors_manifest(graph.task, index),
            prepare,
            forecast=lambda: predict_join(index, spec.k, folder),
        ),
        session,
    )  # fmt: skip


def predict_join(index: IndexDataset, k: int, folder: str) -> Forecast | None:
    """Predicts a join after a short look at this host, which writes a small file into `folder`.

    Returns None for an index whose probes cannot be read; the join itself says what is wrong.
    """
    speed = measure_join(index.layout.rows, index.trained.dim, k, folder)
    try:
        work = plan.count_join_work(index)
    except DatasetError:
        return None
    predicted = plan.plan_join(index, work, k, speed)
    return Forecast(predicted.memory_bytes, predicted.seconds)


def neighbors_identity(config: Config, index: IndexDataset) -> str:
    """Returns the fingerprint of the neighbours that a configuration makes of an index."""
    index, spec = add_groups(config, index, config.join_spec())
    return joining.neighbors_identity(index.manifest, settle_join(config, index, spec).spec)


def check_columns(index: IndexDataset, spec: JoinSpec) -> None:
    """Raises ConfigError when the index lacks a column that a join needs."""
    known = [field["name"] for field in index.schema]
    for name in (*spec.rules.columns, *spec.columns):
        if name not in known:
            raise ConfigError(
                f"The join needs the column {name!r} (join.rules, export.columns or evaluate), but "
                f"{index.folder} has only {', '.join(known)}. Add it to images.metadata and embed "
                "again, or correct the name."
            )
