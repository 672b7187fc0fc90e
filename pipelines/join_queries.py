"""The join of queries that are not in the index: another night, another catalogue, new items."""

import dataclasses

import apache_beam as beam
import pyarrow as pa

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.suspects import drop_suspects
from index_builder.datasets.table_files import check_collisions
from index_builder.errors import DatasetError
from index_builder.index.shards import IndexDataset, open_index
from index_builder.rules.exclusions import list_exclusion_files
from index_builder.search import neighbors
from index_builder.search.join import JoinSpec
from index_builder.steps import joining, queries
from index_builder.steps.joining import JoinTask
from index_builder.steps.queries import QueriesSpec, open_queries
from pipelines import join_neighbors
from pipelines.build_index import check_ids, open_metadata
from pipelines.config import Config
from pipelines.find_groups import add_groups
from pipelines.join_exclusions import settle_join
from pipelines.join_neighbors import JoinConfig
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.queries import MakeQueries


def define_pipeline(root: beam.Pipeline, config: QueriesSpec) -> beam.PCollection[Part]:
    """Defines the pipeline of the queries: parts of embeddings in, query shards out."""
    return root | "MakeQueries" >> MakeQueries(config)


@dataclasses.dataclass(frozen=True)
class QueriesJoin:
    """What a join of queries leaves: the query shards and their neighbours."""

    queries: Dataset
    neighbors: Dataset


def join_queries(
    config: Config,
    session: Session,
    index_folder: str,
    embeddings_folder: str,
    limit_path: str | None = None,
) -> QueriesJoin:
    """Joins an embeddings dataset, or the images that a list names, with an index.

    Raises FingerprintError when the embeddings were not made by the index's encoder, ConfigError for
    a missing column or an id that is not there, DatasetError for damaged files; all before any work.
    """
    index, spec = add_groups(config, open_index(index_folder), config.join_spec())
    source = manifests.load(embeddings_folder, embeddings.KIND)
    if not source.rows:
        raise DatasetError(
            f"{embeddings_folder} holds 0 embeddings, wanted at least one query. Embed images first."
        )
    table = open_metadata(config)
    queries.check_comparable(index, source, embeddings_folder)
    if table is not None:
        check_collisions(table.spec, [field["name"] for field in source.schema])
    queries.check_columns(index, source, embeddings_folder, spec, table)
    excluded = config.join.rules.exclude.spec()
    if excluded is not None:
        list_exclusion_files(excluded)
    manifests.require_files(index_folder, index.manifest)
    manifests.require_files(embeddings_folder, source)
    limit = None if limit_path is None else queries.read_limit(limit_path)
    rows = source.rows if limit is None else len(limit)
    shards = queries.query_shards(index, rows)
    identity = queries.queries_identity(index.manifest, source, shards, limit, table)
    folder = dataset_folder(config.workspace, queries.KIND, identity)
    graph = QueriesSpec(
        embeddings_folder, source.parts, index_folder, shards, folder, identity,
        limit is not None, table,
    )  # fmt: skip
    made = _make_queries(session, index, source, graph, limit)
    return QueriesJoin(made, _join(config, session, index, spec, made))


def _make_queries(
    session: Session,
    index: IndexDataset,
    source: Manifest,
    graph: QueriesSpec,
    limit: pa.Array | None,
) -> Dataset:
    def prepare() -> None:
        if limit is not None:
            queries.write_limit(graph, limit)
        check_ids(session, graph.queries_folder, graph.embeddings_folder, None)

    return run_stage(
        StageTask(
            "queries", queries.KIND, graph.queries_folder, graph.key, graph.shards, "queries",
            lambda root: define_pipeline(root, graph),
            lambda: queries.queries_manifest(graph, source, index),
            prepare,
        ),
        session,
    )  # fmt: skip


def _join(
    config: Config, session: Session, index: IndexDataset, spec: JoinSpec, made: Dataset
) -> Dataset:
    asked = open_queries(made.folder)
    settled = settle_join(config, index, spec, asked)
    identity = joining.neighbors_identity(index.manifest, settled.spec, asked.manifest)
    folder = dataset_folder(config.workspace, neighbors.KIND, identity)
    task = JoinTask(index.folder, settled.spec, folder, identity, made.folder)
    graph = JoinConfig(tuple(asked.by_size), task)

    def prepare() -> None:
        drop_suspects(folder, identity)
        settled.prepare()

    return run_stage(
        StageTask(
            "join", neighbors.KIND, folder, identity, asked.shards, "queries",
            lambda root: join_neighbors.define_pipeline(root, graph),
            lambda: joining.neighbors_manifest(task, index, asked),
            prepare,
        ),
        session,
    )  # fmt: skip
