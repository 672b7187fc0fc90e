"""The whole of Kith's index and join in one process: import, build, join, measure; no Beam.

Every function makes one dataset in a folder, or finds it there, and returns its path or figures. The
work is that of the pipelines, step by step in a plain loop, and so are the bytes: a folder that was
made here can be read by the pipelines and the other way round.
"""

import numpy as np
import pyarrow as pa

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.in_order import cores, map_in_order
from index_builder.datasets.suspects import drop_suspects
from index_builder.datasets.unique_ids import check_unique_ids
from index_builder.errors import ConfigError, DatasetError, FingerprintError
from index_builder.index import shards
from index_builder.index.goals import Encoding, Goal, TransformSpec
from index_builder.index.shards import IndexDataset, open_index
from index_builder.index.spec import IndexSpec
from index_builder.index.training import load_trained
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.evaluation import measure_recall
from index_builder.recall.recall import Certificate, Promise
from index_builder.rules.conditions import Condition
from index_builder.rules.exclusions import ExclusionSpec, find_exclusions
from index_builder.rules.rules import JoinRules
from index_builder.scoring.metrics import Metric
from index_builder.search import neighbors
from index_builder.search.corpus import Corpus
from index_builder.search.join import JoinSpec, open_joined
from index_builder.search.short_rows import count_all
from index_builder.steps import (
    build_spec,
    building,
    index_manifest,
    joining,
    nprobe_choice,
    plan,
    queries,
)
from index_builder.steps.build_spec import BuildSpec
from index_builder.steps.importing import import_arrays, import_vectors, refuse_other
from index_builder.steps.joining import JoinTask
from index_builder.steps.queries import QueriesSpec
from index_builder.steps.settled_join import SettledJoin, settle_join

__all__ = [
    "Certificate",
    "Condition",
    "Encoding",
    "ExclusionSpec",
    "Goal",
    "IndexSpec",
    "JoinRules",
    "JoinSpec",
    "Metric",
    "Promise",
    "TransformSpec",
    "build",
    "evaluate",
    "import_arrays",
    "import_vectors",
    "join",
    "make_queries",
    "read_neighbors",
]


def build(
    embeddings_folder: str,
    index_folder: str,
    spec: IndexSpec = IndexSpec(),  # noqa: B008 (frozen)
    goal: Goal = Goal(),  # noqa: B008 (frozen)
    *,
    promise: Promise | None = None,
    rules: JoinRules = JoinRules(),  # noqa: B008 (frozen)
    exclusions: ExclusionSpec | None = None,
) -> str:
    """Trains and shards the index of an embeddings dataset; returns its folder.

    `goal` is what the choices aim at that `spec` leaves open: k, recall, memory. Where it states a
    recall, nprobe is chosen on a sample of queries under the rules and without the excluded pairs, by
    `promise` (default: of that recall).

    Raises ConfigError for an index that cannot be built, for rules on columns that neither the
    embeddings nor near-duplicate groups have, and for excluded pairs that are not there,
    DatasetError for embeddings that cannot be indexed; before any work where that can be known.
    """
    source = _load_embeddings(embeddings_folder)
    resolved = spec.resolve(source.rows, embeddings.load_dim(source), goal)
    described = plan.describe_source(embeddings_folder, source)
    build_spec.check_rule_columns(rules, embeddings.column_types(source.schema))
    calibration = None
    if goal.min_recall and spec.nprobe is None and resolved.nprobe < resolved.nlist:
        files = None if exclusions is None else find_exclusions(exclusions)
        calibration = CalibrationSpec(promise or Promise(goal.min_recall), goal.k, rules, files)
    calibrated_on = 0 if calibration is None else calibration.most_queries(source.rows)
    plan.check_memory(resolved, described, calibrated_on=calibrated_on)
    identity = build_spec.index_identity(source, spec, None, goal, calibration)
    if _is_there(index_folder, shards.KIND, identity):
        return index_folder
    check_unique_ids(embeddings_folder, source.parts)
    graph = BuildSpec(
        embeddings_folder, source.parts, resolved, index_folder, identity, calibration=calibration
    )
    trained = load_trained(building.train(graph))
    nprobe_choice.calibrate(graph, trained)
    nprobe_choice.check_memory(graph, trained.nlist)
    resolved = nprobe_choice.settled_spec(graph, trained.nlist)
    # Memory stays within the limit: every thread takes what one task of a pipeline would.
    memory, limit = plan.build_memory(resolved, described), resolved.goal.memory_limit_bytes
    numbers = range(len(source.parts))
    threads = min(cores(), limit // memory["assign"])
    sizes = map_in_order(lambda number: building.assign(graph, number, trained), numbers, threads)
    list_sizes = np.sum(list(sizes), axis=0, dtype=np.int64)
    layout = building.plan(graph, list_sizes)
    threads = min(cores(), limit // memory["build shards"])
    built = list(
        map_in_order(lambda shard: building.build(graph, shard, trained), range(layout.shards), threads)
    )
    index_manifest.describe_shared(list_sizes, graph, built)
    manifests.commit(index_folder, index_manifest.index_manifest(graph, source))
    return index_folder


def make_queries(
    embeddings_folder: str,
    index_folder: str,
    queries_folder: str,
    *,
    image_ids: list[str] | None = None,
) -> str:
    """Makes queries for an index of an embeddings dataset, or of some of its images.

    Returns the folder. Raises FingerprintError when the embeddings were not made by the encoder of
    the index's, ConfigError for image ids that are not there.
    """
    index, source = open_index(index_folder), _load_embeddings(embeddings_folder)
    queries.check_comparable(index, source, embeddings_folder)
    manifests.require_files(index_folder, index.manifest)
    limit = None
    if image_ids is not None:
        if not image_ids:
            raise ConfigError("image_ids: got none, wanted at least one. Add some, or leave it out.")
        limit = pa.array(sorted(set(image_ids)), pa.string())
    count = queries.query_shards(index, source.rows if limit is None else len(limit))
    identity = queries.queries_identity(index.manifest, source, count, limit)
    if _is_there(queries_folder, queries.KIND, identity):
        return queries_folder
    check_unique_ids(embeddings_folder, source.parts)
    graph = QueriesSpec(
        embeddings_folder, source.parts, index_folder, count, queries_folder, identity,
        limit is not None,
    )  # fmt: skip
    if limit is not None:
        queries.write_limit(graph, limit)
    sizes = [queries.assign(graph, number, index) for number in range(len(source.parts))]
    layout = queries.plan(graph, np.sum(sizes, axis=0, dtype=np.int64))
    for shard in range(layout.shards):
        queries.build(graph, shard, index)
    manifests.commit(queries_folder, queries.queries_manifest(graph, source, index))
    return queries_folder


def join(
    index_folder: str,
    neighbors_folder: str,
    spec: JoinSpec,
    *,
    queries_folder: str | None = None,
    exclusions: ExclusionSpec | None = None,
) -> str:
    """Finds the neighbours of every row of an index, or of queries made for it; returns the folder.

    Excluded pairs are prepared in a folder of their own beside it, `-exclusions` at its end. Raises
    ConfigError for a column that is not there or a rule that does not fit, DatasetError for damaged
    files and unknown ids of excluded pairs.
    """
    index = open_joined(index_folder, spec)
    manifests.require_files(index_folder, index.manifest)
    asked = None if queries_folder is None else queries.open_queries(queries_folder)
    if asked is None:
        queries.check_columns(index, index.manifest, index_folder, spec)
    else:
        asked.check(index, spec)
        manifests.require_files(asked.folder, asked.manifest)
    manifest = None if asked is None else asked.manifest
    settled = _settle(index, neighbors_folder, spec, exclusions, asked)
    spec = settled.spec
    identity = joining.neighbors_identity(index.manifest, spec, manifest)
    if _is_there(neighbors_folder, neighbors.KIND, identity):
        return neighbors_folder
    settled.prepare()
    task = JoinTask(index_folder, spec, neighbors_folder, identity, queries_folder)
    drop_suspects(neighbors_folder, identity)
    counts = count_all(index, spec.rules)
    for shard in range(index.layout.shards if asked is None else asked.shards):
        joining.join_part(task, shard, counts)
    manifests.commit(neighbors_folder, joining.neighbors_manifest(task, index, asked))
    return neighbors_folder


def evaluate(
    index_folder: str,
    neighbors_folder: str,
    spec: JoinSpec,
    promise: Promise = Promise(),  # noqa: B008 (frozen)
    exclusions: ExclusionSpec | None = None,
    *,
    by: str | None = None,
    embeddings_folder: str | None = None,
) -> Certificate:
    """Certifies the recall of a join of an index with itself, on a seeded sample of its queries.

    `spec` and `exclusions` are those of the join; with a column `by` recall is also listed by its
    values, with the embeddings of the index also measured in the encoder's own space. Raises
    FingerprintError when the join, the index and the embeddings do not belong together. Whether the
    bound reaches the promised target is the caller's to judge.
    """
    index = open_joined(index_folder, spec)
    source = manifests.load(neighbors_folder, neighbors.KIND)
    settled = _settle(index, neighbors_folder, spec, exclusions)
    spec = settled.spec
    if source.fingerprint != joining.neighbors_identity(index.manifest, spec):
        raise FingerprintError(
            f"{neighbors_folder} is not the join of {index_folder} with itself under this spec. Give "
            "the index and the spec that it was made with."
        )
    columns = embeddings.column_types(index.schema)
    if by is not None and by not in columns:
        raise ConfigError(
            f"by: got {by!r}, wanted a column of {index_folder}: {', '.join(columns)}. "
            "Correct the name."
        )
    corpus = None
    if embeddings_folder is not None:
        asked = _load_embeddings(embeddings_folder)
        if asked.content != index.manifest.properties["embeddings"]:
            raise FingerprintError(
                f"{embeddings_folder} has content {asked.content}, but {index_folder} was made of "
                f"{index.manifest.properties['embeddings']}. Give the embeddings that it was made of."
            )
        corpus = Corpus(embeddings_folder, asked.parts)
    settled.prepare()
    return measure_recall(index, neighbors_folder, source.parts, spec, promise, by=by, corpus=corpus)


def _settle(
    index: IndexDataset,
    neighbors_folder: str,
    spec: JoinSpec,
    exclusions: ExclusionSpec | None,
    asked: queries.QueriesDataset | None = None,
) -> SettledJoin:
    folder = f"{neighbors_folder.rstrip('/')}-exclusions"
    return settle_join(index, spec, exclusions, lambda _: folder, asked)


def read_neighbors(neighbors_folder: str) -> pa.Table:
    """Returns a whole neighbours dataset as one table, after checking every file's checksum."""
    source = manifests.load(neighbors_folder, neighbors.KIND)
    blocks = (embeddings.read_part(neighbors_folder, part) for part in source.parts)
    return pa.concat_tables([block for part in blocks for block in part])


def _load_embeddings(folder: str) -> manifests.Manifest:
    source = manifests.load(folder, embeddings.KIND)
    if not source.rows:
        raise DatasetError(f"{folder} holds 0 embeddings, wanted at least one. Import vectors first.")
    manifests.require_files(folder, source)
    return source


def _is_there(folder: str, kind: str, identity: str) -> bool:
    """Tells whether a folder holds the dataset that is wanted; refuses one that holds another."""
    if manifests.load_if_usable(folder, kind, identity) is not None:
        manifests.clear_work(folder)
        return True
    refuse_other(folder)
    return False
