"""The build stage: an embeddings dataset to an index."""

import dataclasses

import apache_beam as beam
import pyarrow.parquet as pq

from index_builder import embeddings, manifests, shards, storage
from index_builder.errors import DatasetError, KithError
from index_builder.fingerprints import fingerprint
from index_builder.manifests import Manifest, Part
from index_builder.sharding import IndexLayout, load_layout
from index_builder.spec import ResolvedSpec, check_training_memory
from index_builder.table_files import MetadataTable, check_collisions, open_table
from pipelines.config import Config
from pipelines.runners import run_pipeline
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms import failures
from transforms.duplicates import MOST_LISTED, FindDuplicateIds, IdPart
from transforms.index import REVISION, BuildIndex, BuildSpec


def define_pipeline(root: beam.Pipeline, config: BuildSpec) -> beam.PCollection[Part]:
    """Defines the build pipeline: train, assign every part, write every shard."""
    return root | "BuildIndex" >> BuildIndex(config)


@dataclasses.dataclass(frozen=True)
class IdCheck:
    """The id check's configuration: the parts whose ids must differ, and where findings go."""

    parts: tuple[IdPart, ...]
    folder: str


def define_id_check(root: beam.Pipeline, config: IdCheck) -> beam.PCollection[str]:
    """Defines the pipeline that finds image ids which occur more than once."""
    return (
        root
        | "ListParts" >> beam.Create(config.parts)
        | "SpreadParts" >> beam.Reshuffle()
        | "FindDuplicateIds" >> FindDuplicateIds(config.folder)
    )


def build_index(
    config: Config, session: Session, embeddings_folder: str, failures_folder: str | None = None
) -> Dataset:
    """Runs the build stage on an embeddings dataset.

    Ids are checked over the embeddings and, where given, the failures. Raises KithError for
    duplicates, naming both locations, and ConfigError for an index that cannot be built or a metadata
    table that does not fit.
    """
    source = manifests.load(embeddings_folder, embeddings.KIND)
    if not source.rows:
        raise DatasetError(
            f"{embeddings_folder} holds 0 embeddings, wanted at least one. Embed images first."
        )
    spec = config.index_spec().resolve(source.rows, embeddings.load_dim(source))
    check_training_memory(spec, int(config.index.memory_limit_gib * 2**30))
    table = open_metadata(config)
    if table is not None:
        check_collisions(table.spec, [field["name"] for field in source.schema])
    identity = _identity(config, source, table)
    folder = dataset_folder(config.workspace, shards.KIND, identity)
    graph = BuildSpec(embeddings_folder, source.parts, spec, folder, identity, table)

    def prepare() -> None:
        check_ids(session, folder, embeddings_folder, failures_folder)

    return run_stage(
        StageTask(
            "build", shards.KIND, folder, identity, spec.shards, "vectors",
            lambda root: define_pipeline(root, graph),
            lambda: _manifest(folder, identity, spec, source, table),
            prepare,
        ),
        session,
    )  # fmt: skip


def index_identity(config: Config, source: Manifest) -> str:
    """Returns the fingerprint of the index that a configuration makes of an embeddings dataset.

    Raises ConfigError or DatasetError for a metadata table that cannot be found or read.
    """
    return _identity(config, source, open_metadata(config))


def open_metadata(config: Config) -> MetadataTable | None:
    """Finds the metadata table of a configuration, or returns None where it names none."""
    spec = config.table_spec()
    return None if spec is None else open_table(spec)


def _identity(config: Config, source: Manifest, table: MetadataTable | None) -> str:
    value = {
        "kind": shards.KIND,
        "revision": REVISION,
        "embeddings": source.content,
        "spec": config.index_spec().fingerprint_value(),
    }
    return fingerprint(value | _metadata_ingredient(table))


def _metadata_ingredient(table: MetadataTable | None) -> dict[str, object]:
    """Returns what a table adds to the fingerprint; an index without one keeps the one it had."""
    return {} if table is None else {"metadata": table.fingerprint_value()}


def check_ids(
    session: Session, folder: str, embeddings_folder: str, failures_folder: str | None
) -> None:
    """Raises KithError when an image id occurs more than once, with the locations."""
    findings = storage.join(folder, manifests.WORK_FOLDER, "duplicates")
    storage.remove(findings)
    folders = [(embeddings_folder, embeddings.KIND)]
    if failures_folder is not None:
        folders.append((failures_folder, failures.KIND))
    parts = tuple(
        IdPart(place, part)
        for place, kind in folders
        for part in manifests.load(place, kind).parts
        if part.rows
    )
    run_pipeline(lambda root: define_id_check(root, IdCheck(parts, findings)), session.runner)
    found: dict[str, list[str]] = {}
    total = 0
    for path in storage.glob(storage.join(findings, "bucket-*.json")):
        bucket = storage.read_json(path)
        total += bucket["count"]
        found |= bucket["ids"]
    if total:
        listed = [f"  {name}: {', '.join(found[name])}" for name in sorted(found)[:MOST_LISTED]]
        raise KithError(
            f"{total} image ids occur more than once, wanted each id once. Give every image its own "
            "id, or remove one of them:\n" + "\n".join(listed)
        )


def _manifest(
    folder: str, identity: str, spec: ResolvedSpec, source: Manifest, table: MetadataTable | None
) -> Manifest:
    shared = manifests.collect_parts(folder, [shards.SHARED_PART], [identity])[0]
    layout = load_layout(storage.join(folder, shards.LAYOUT_NAME))
    numbers = range(layout.shards)
    names = [f"shard-{number:05d}" for number in numbers]
    keys = [fingerprint({"index": identity, "rows": layout.shard_rows(n)}) for n in numbers]
    parts = manifests.collect_parts(folder, names, keys)
    path = storage.join(folder, parts[0].file(".parquet").path)
    with storage.open_binary(path) as file:
        schema = embeddings.describe_schema(pq.read_schema(file))
    properties = {
        **shared.properties,
        "metric": spec.request.metric.value,
        "encoder_dim": spec.encoder_dim,
        "encoder": source.properties.get("encoder", {}),
        "training_rows": spec.sample,
        "seed": spec.request.seed,
        "embeddings": source.content,
    }
    return Manifest(
        shards.KIND,
        identity,
        {
            "code": {"build": REVISION},
            "config": spec.request.fingerprint_value(),
            "inputs": source.content,
            **_metadata_ingredient(table),
        },
        schema,
        (shared, *parts),
        properties,
    )


def shard_order(layout: IndexLayout) -> list[int]:
    """Returns the shards largest first: the order in which tasks are handed out."""
    sizes = [stop - start for start, stop in map(layout.shard_rows, range(layout.shards))]
    return sorted(range(layout.shards), key=lambda shard: (-sizes[shard], shard))
