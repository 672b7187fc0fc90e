"""The embed stage: image shards to the embeddings and failures datasets."""

import dataclasses
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest
from pipelines.config import Config
from pipelines.embed_books import Books, add_up, check_failed_fractions, refuse_emptiness
from pipelines.embed_plan import EmbedConfig, EmbedPlan, newest_version, plan_embedding
from pipelines.engine_choice import settle_engine
from pipelines.reuse import (
    Earlier,
    carry_over_for_replay,
    carry_over_unchanged,
    index_vectors,
    open_for_replay,
    open_published,
)
from pipelines.stage import UNCHANGED, Dataset, Session, StageTask, run_stage
from transforms import failures
from transforms.embed import REVISION, EmbedImages, release_encoder
from transforms.reuse import ReuseSpec


def define_pipeline(
    root: beam.Pipeline, config: EmbedConfig, reuse: ReuseSpec | None = None
) -> beam.PCollection[manifests.Part]:
    """Defines the embed pipeline: descriptors of shards in, descriptors of parts out."""
    embed = EmbedImages(config.spec, config.embeddings_folder, config.failures_folder, reuse)
    if config.resource_hints:
        embed = embed.with_resource_hints(**dict(config.resource_hints))
    return (
        root
        | "ListShards" >> beam.Create(config.tasks)
        | "SpreadShards" >> beam.Reshuffle()
        | "EmbedImages" >> embed
    )


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The two datasets of the embed stage and their books."""

    embeddings: Dataset
    failures: Dataset
    books: Books

    def datasets(self) -> dict[str, Dataset]:
        """Returns the datasets by kind."""
        return {"embeddings": self.embeddings, "failures": self.failures}


def embed_images(config: Config, session: Session, replay: str | None = None) -> Embedded:
    """Runs the embed stage for a configuration, and its gates.

    With `replay`, the folder of an earlier embeddings dataset, only what failed there is tried
    again; everything else is taken over, in a new version of the dataset.

    Raises KithError as `make_embeddings` and `check_embedded` do.
    """
    embedded = make_embeddings(config, session, replay)
    check_embedded(config, embedded)
    return embedded


def check_embedded(config: Config, embedded: Embedded) -> None:
    """Raises GateError for books that do not balance, or more failures than are allowed.

    Raises KithError for a catalogue without images, or without a single good one.
    """
    books, failures_folder = embedded.books, embedded.failures.folder
    books.check()
    refuse_emptiness(books, failures_folder)
    section = config.embeddings
    check_failed_fractions(
        books,
        embedded.embeddings.manifest,
        section.max_failed_fraction,
        section.max_failed_fraction_per_shard,
        failures_folder,
    )


def make_embeddings(config: Config, session: Session, replay: str | None = None) -> Embedded:
    """Runs the embed stage and adds up its books, but asks no gate. Raises KithError."""
    plan = plan_embedding(config, settle_engine(config, session))
    earlier: Earlier | None
    if replay is None:
        earlier = open_published(config.workspace) if config.embeddings.reuse else None
    else:
        earlier = open_for_replay(config.workspace, replay, plan)
        plan = _next_version(config.workspace, plan)
    graph, identity = plan.graph, plan.identity
    folder, failures_folder = graph.embeddings_folder, graph.failures_folder
    carried_over: set[str] = set()
    reuse: ReuseSpec | None = None

    def prepare() -> None:
        nonlocal reuse
        if earlier is None or earlier.folder == folder:
            return
        carry_over = carry_over_unchanged if replay is None else carry_over_for_replay
        carried_over.update(carry_over(earlier, graph))
        if len(carried_over) < len(graph.tasks):
            reuse = index_vectors(earlier, plan)

    def finish() -> Manifest:
        if manifests.load_if_usable(failures_folder, failures.KIND, identity) is None:
            manifests.commit(failures_folder, _manifest(plan, failures.KIND, failures_folder))
        manifests.clear_work(failures_folder)
        return _manifest(plan, embeddings.KIND, folder)

    if manifests.load_if_usable(failures_folder, failures.KIND, identity) is None:
        # Both datasets come from one pass, so neither is complete without the other.
        storage.remove(manifests.manifest_path(folder))
    try:
        made = run_stage(
            StageTask(
                "embed", embeddings.KIND, folder, identity, len(graph.tasks), "images",
                lambda root: define_pipeline(root, graph, reuse), finish, prepare,
            ),
            session,
        )  # fmt: skip
    finally:
        release_encoder()
    failed = manifests.load(failures_folder, failures.KIND)
    books = add_up(made.manifest, failed, None if made.state == UNCHANGED else carried_over)
    return Embedded(made, dataclasses.replace(made, folder=failures_folder, manifest=failed), books)


def _next_version(workspace: str, plan: EmbedPlan) -> EmbedPlan:
    """Returns the plan of a new version, where the plan's dataset is there already."""
    if not manifests.is_complete(plan.graph.embeddings_folder):
        return plan
    return plan.at_version(workspace, newest_version(workspace, plan.identity) + 1)


def _manifest(plan: EmbedPlan, kind: str, folder: str) -> Manifest:
    tasks, encoder = plan.graph.tasks, plan.encoder
    parts = manifests.collect_parts(folder, [task.part for task in tasks], [task.key for task in tasks])
    policy = plan.graph.spec.preparation.policy
    properties: dict[str, Any] = {"encoder": encoder, "admission": policy.admission()}
    schema = failures.SCHEMA
    if kind == embeddings.KIND:
        properties["dim"] = parts[0].properties["dim"]
        schema = _schema_of(folder, parts[0])
    return Manifest(
        kind,
        plan.identity,
        {
            "code": {"embed": REVISION},
            "config": fingerprint(encoder),
            "inputs": fingerprint([[task.shard.name, task.shard.token] for task in tasks]),
        },
        embeddings.describe_schema(schema),
        parts,
        properties,
    )


def _schema_of(folder: str, part: manifests.Part) -> pa.Schema:
    with storage.open_arrow(storage.join(folder, part.file(".parquet").path)) as file:
        return pq.read_schema(file)
