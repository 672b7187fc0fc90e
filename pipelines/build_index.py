"""The build stage: an embeddings dataset to an index."""

import dataclasses
import functools

import apache_beam as beam

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.table_files import MetadataTable, check_collisions, open_table
from index_builder.errors import DatasetError, KithError
from index_builder.index import shards
from index_builder.index.sharding import IndexLayout
from index_builder.index.spec import ResolvedSpec
from index_builder.index.training import load_trained
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.recall import raised_nprobe
from index_builder.rules.exclusions import find_exclusions
from index_builder.steps import build_spec, index_manifest, plan
from index_builder.steps.build_spec import Retry
from index_builder.steps.host_speed import HostSpeed, measure_host
from index_builder.steps.merging import merge_shards
from index_builder.steps.nprobe_choice import settled_spec
from pipelines.config import Config
from pipelines.forecast import Forecast
from pipelines.runners import run_pipeline
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms import failures
from transforms.duplicates import MOST_LISTED, FindDuplicateIds, IdPart
from transforms.index import BuildIndex, BuildSpec


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
    config: Config,
    session: Session,
    embeddings_folder: str,
    failures_folder: str | None = None,
    retry: Retry | None = None,
) -> Dataset:
    """Runs the build stage on an embeddings dataset.

    Ids are checked over the embeddings and, where given, the failures. With `retry` the index is made
    again with more lists a query, from what an earlier attempt was trained to. Raises KithError for
    duplicates, naming both locations, and ConfigError for an index that cannot be built or a metadata
    table that does not fit.
    """
    source = manifests.load(embeddings_folder, embeddings.KIND)
    if not source.rows:
        raise DatasetError(
            f"{embeddings_folder} holds 0 embeddings, wanted at least one. Embed images first."
        )
    spec = config.index_spec().resolve(source.rows, embeddings.load_dim(source), config.goal())
    described = plan.describe_source(embeddings_folder, source)
    searched = spec if retry is None else spec.settled(retry.nprobe, retry.refine)
    chosen = "" if retry is None else f" of attempt {retry.attempt}"
    table = open_metadata(config)
    if table is not None:
        check_collisions(table.spec, [field["name"] for field in source.schema])
    known = embeddings.column_types(source.schema)
    if table is not None:
        known |= {name: embeddings.METADATA_TYPES[kind] for name, kind in table.spec.columns}
    build_spec.check_rule_columns(config.join_spec().rules, known)
    identity = _identity(config, source, table, retry)
    folder = dataset_folder(config.workspace, shards.KIND, identity)
    calibration = calibration_of(config, spec)
    # A retry takes over what was chosen before.
    queries = 0 if calibration is None or retry is not None else calibration.most_queries(source.rows)
    plan.check_memory(searched, described, chosen, queries)
    graph = BuildSpec(
        embeddings_folder, source.parts, spec, folder, identity, table, calibration, retry
    )

    @functools.cache
    def speed() -> HostSpeed:
        return measure_host(spec.rows, spec.dim, spec.nlist, spec.nprobe, spec.goal.k, folder)

    def settled_forecast(_: Forecast) -> Forecast:
        settled = settled_spec(graph, load_trained(graph.trained_path).nlist)
        return predict_build(settled, described, speed(), queries)

    def prepare() -> None:
        check_ids(session, folder, embeddings_folder, failures_folder)

    return run_stage(
        StageTask(
            "build", shards.KIND, folder, identity, searched.shards, "vectors",
            lambda root: define_pipeline(root, graph),
            lambda: index_manifest.index_manifest(graph, source),
            prepare,
            lambda: predict_build(searched, described, speed(), queries),
            settled_forecast,
        ),
        session,
    )  # fmt: skip


def merge_index(session: Session, index_folder: str, path: str) -> dict[str, object]:
    """Writes one FAISS file of all shards of an index; returns its figures and paths."""
    merged = merge_shards(shards.open_index(index_folder), path)
    session.console.print(f"build: merged {merged.rows:,} vectors into {merged.faiss_path}")
    return dataclasses.asdict(merged)


def predict_build(
    spec: ResolvedSpec, source: plan.Source, speed: HostSpeed, calibrated_on: int = 0
) -> Forecast:
    """Predicts a build on a host of such a speed.

    Where nprobe is chosen first, it is on `calibrated_on` queries.
    """
    predicted = plan.plan_build(spec, source, speed, calibrated_on)
    return Forecast(predicted.memory_bytes, predicted.seconds)


def index_identity(config: Config, source: Manifest, retry: Retry | None = None) -> str:
    """Returns the fingerprint of the index that a configuration makes of an embeddings dataset.

    Raises ConfigError or DatasetError for a metadata table that cannot be found or read.
    """
    return _identity(config, source, open_metadata(config), retry)


def calibration_of(config: Config, spec: ResolvedSpec) -> CalibrationSpec | None:
    """Returns what nprobe is chosen for; None where all lists are searched, or it is given.

    Raises ConfigError or DatasetError for files of excluded pairs that are not there or cannot be read.
    """
    calibration = None if spec.nprobe >= spec.nlist else config.calibration_spec()
    excluded = config.join.rules.exclude.spec()
    if calibration is None or excluded is None:
        return calibration
    return dataclasses.replace(calibration, exclusions=find_exclusions(excluded))


def next_attempt(config: Config, folder: str, index: Manifest) -> Retry | None:
    """Returns how to make an index again whose recall is below the target; None where it cannot be.

    That is where nprobe is given, where all lists are searched (by vectors), and after
    `evaluate.max_attempts`.
    """
    properties = index.properties
    attempt, nprobe, nlist = (int(properties[name]) for name in ("attempt", "nprobe", "nlist"))
    if properties["calibration"] is None or attempt >= config.promise().attempts:
        return None
    refine = properties.get("refine")
    if nprobe >= nlist and refine is None:
        return None
    # Which of the two missed the neighbours, lists or codes, is not known: both are raised.
    refine = None if refine is None else 2 * int(refine)
    raised = raised_nprobe(nprobe, nlist)
    return Retry(attempt + 1, raised, folder, properties["calibration"], refine)


def open_metadata(config: Config) -> MetadataTable | None:
    """Finds the metadata table of a configuration, or returns None where it names none."""
    spec = config.table_spec()
    return None if spec is None else open_table(spec)


def _identity(
    config: Config, source: Manifest, table: MetadataTable | None, retry: Retry | None = None
) -> str:
    request, goal = config.index_spec(), config.goal()
    spec = request.resolve(source.rows, embeddings.load_dim(source), goal)
    calibration = calibration_of(config, spec)
    return build_spec.index_identity(source, request, table, goal, calibration, retry)


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


def shard_order(layout: IndexLayout) -> list[int]:
    """Returns the shards largest first: the order in which tasks are handed out."""
    sizes = [stop - start for start, stop in map(layout.shard_rows, range(layout.shards))]
    return sorted(range(layout.shards), key=lambda shard: (-sizes[shard], shard))
