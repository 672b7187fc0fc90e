"""The embed stage: image shards to the embeddings and failures datasets."""

import dataclasses
from collections import Counter
from typing import Any

import apache_beam as beam

from index_builder import embeddings, manifests, storage
from index_builder.errors import GateError, KithError
from index_builder.fingerprints import fingerprint
from index_builder.manifests import Manifest
from pipelines.config import Config
from pipelines.publish import published_folder
from pipelines.stage import UNCHANGED, Dataset, Session, StageTask, dataset_folder, run_stage
from transforms import failures
from transforms.embed import REVISION, EmbedImages, EmbedSpec, EmbedTask, release_encoder
from transforms.sources.base import ImageShard


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """The graph's configuration: what to embed, in which tasks, and where to."""

    spec: EmbedSpec
    tasks: tuple[EmbedTask, ...]
    embeddings_folder: str
    failures_folder: str


def define_pipeline(root: beam.Pipeline, config: EmbedConfig) -> beam.PCollection[manifests.Part]:
    """Defines the embed pipeline: descriptors of shards in, descriptors of parts out."""
    return (
        root
        | "ListShards" >> beam.Create(config.tasks)
        | "SpreadShards" >> beam.Reshuffle()
        | "EmbedImages" >> EmbedImages(config.spec, config.embeddings_folder, config.failures_folder)
    )


@dataclasses.dataclass(frozen=True)
class Books:
    """Where every image went: read = embedded + reused + failed, exactly.

    `embedded` were encoded for this dataset by this run or the one it resumed; `reused` were taken
    over from an earlier one.
    """

    read: int
    embedded: int
    reused: int
    failed: int
    failed_by_reason: dict[str, int]
    unreadable_regions: int

    def check(self) -> None:
        """Raises GateError when the books do not balance."""
        if self.read != self.embedded + self.reused + self.failed:
            raise GateError(
                f"The books do not balance: {self.read} images read, {self.embedded} embedded, "
                f"{self.reused} reused, {self.failed} failed. Nothing was published; this is a "
                "defect of Kith."
            )


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The two datasets of the embed stage and their books."""

    embeddings: Dataset
    failures: Dataset
    books: Books


@dataclasses.dataclass(frozen=True)
class EmbedPlan:
    """The embed stage of a configuration and catalogue: its graph and its identity."""

    graph: EmbedConfig
    encoder: dict[str, object]
    identity: str


def plan_embedding(config: Config) -> EmbedPlan:
    """Lists the catalogue's shards and derives what the stage would make, without making it."""
    spec = config.embed_spec()
    encoder = spec.encoder_fingerprint()
    tasks = tuple(
        EmbedTask(shard, f"part-{number:05d}", spec.part_key(shard, encoder))
        for number, shard in enumerate(list_shards(config))
    )
    identity = fingerprint({"kind": embeddings.KIND, "parts": [task.key for task in tasks]})
    folder = dataset_folder(config.workspace, embeddings.KIND, identity)
    failures_folder = dataset_folder(config.workspace, failures.KIND, identity)
    return EmbedPlan(EmbedConfig(spec, tasks, folder, failures_folder), encoder, identity)


def embed_images(config: Config, session: Session) -> Embedded:
    """Runs the embed stage for a configuration.

    Raises KithError for an empty catalogue, one in which every image fails, and books that do not
    balance.
    """
    plan = plan_embedding(config)
    graph, identity = plan.graph, plan.identity
    folder, failures_folder = graph.embeddings_folder, graph.failures_folder
    reused: set[str] = set()

    def prepare() -> None:
        if config.embeddings.reuse:
            reused.update(_reuse_parts(config.workspace, graph))

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
                lambda root: define_pipeline(root, graph), finish, prepare,
            ),
            session,
        )  # fmt: skip
    finally:
        release_encoder()
    failed = manifests.load(failures_folder, failures.KIND)
    books = _books(made.manifest, failed, made.state == UNCHANGED, reused)
    books.check()
    _refuse_emptiness(books, failures_folder)
    return Embedded(made, dataclasses.replace(made, folder=failures_folder, manifest=failed), books)


def list_shards(config: Config) -> list[ImageShard]:
    """Lists the shards of all sources, in order."""
    scratch = storage.join(config.workspace, "listings")
    return [
        shard
        for number, source in enumerate(config.images.sources)
        for shard in source.list_shards(number, scratch)
    ]


def _reuse_parts(workspace: str, graph: EmbedConfig) -> list[str]:
    """Marks parts of the published snapshot with an equal key as finished; returns their names."""
    folder, failures_folder = graph.embeddings_folder, graph.failures_folder
    old_embeddings = published_folder(workspace, embeddings.KIND)
    old_failures = published_folder(workspace, failures.KIND)
    if old_embeddings is None or old_failures is None:
        return []
    by_key = {p.key: p for p in manifests.load(old_embeddings, embeddings.KIND).parts}
    failed_by_key = {p.key: p for p in manifests.load(old_failures, failures.KIND).parts}
    names = []
    for task in graph.tasks:
        part, failed = by_key.get(task.key), failed_by_key.get(task.key)
        if part is None or failed is None or old_embeddings == folder:
            continue
        if not (
            manifests.is_intact(old_embeddings, part) and manifests.is_intact(old_failures, failed)
        ):
            continue  # fmt: skip
        for old, target, found in (
            (old_failures, failures_folder, failed),
            (old_embeddings, folder, part),
        ):
            moved = manifests.relocate(found, old, target)
            manifests.mark_part(target, dataclasses.replace(moved, name=task.part))
        names.append(task.part)
    return names


def _manifest(plan: EmbedPlan, kind: str, folder: str) -> Manifest:
    tasks, encoder = plan.graph.tasks, plan.encoder
    parts = manifests.collect_parts(folder, [task.part for task in tasks], [task.key for task in tasks])
    properties: dict[str, Any] = {"encoder": encoder}
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


def _schema_of(folder: str, part: manifests.Part) -> Any:
    import pyarrow.parquet as pq

    with storage.open_binary(storage.join(folder, part.file(".parquet").path)) as file:
        return pq.read_schema(file)


def _books(made: Manifest, failed: Manifest, unchanged: bool, reused: set[str]) -> Books:
    """Adds up the books of all parts; what was counted is held against the rows on disk."""
    reasons: Counter[str] = Counter()
    read = embedded = taken = 0
    for part in made.parts:
        read += part.properties["images_read"]
        reasons.update(part.properties["images_failed"])
        if unchanged or part.name in reused:
            taken += part.rows
        else:
            embedded += part.rows
    regions = sum(part.properties["unreadable_regions"] for part in made.parts)
    return Books(read, embedded, taken, failed.rows - regions, dict(sorted(reasons.items())), regions)


def _refuse_emptiness(books: Books, failures_folder: str) -> None:
    if books.read == 0:
        regions = f" ({books.unreadable_regions} unreadable regions)" * bool(books.unreadable_regions)
        raise KithError(
            f"The catalogue is empty: no image was found in its files{regions}. Check images.sources; "
            f"what could not be read is listed in {failures_folder}."
        )
    if books.failed == books.read:
        reasons = ", ".join(f"{reason} {n}" for reason, n in books.failed_by_reason.items())
        raise KithError(
            f"Every one of the {books.read} images failed ({reasons}), wanted at least one embedding. "
            f"Look at {failures_folder}; the reasons are explained in docs/images.md."
        )
