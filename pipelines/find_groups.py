"""The groups stage: an index to its near-duplicate groups, and a join's way to their columns."""

import dataclasses

import apache_beam as beam

from index_builder.datasets import manifests
from index_builder.datasets.embeddings import describe_schema
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part, require_files
from index_builder.datasets.suspects import drop_suspects
from index_builder.errors import ConfigError, DatasetError
from index_builder.index.shards import IndexDataset, open_index
from index_builder.scoring.metrics import Metric
from index_builder.search import groups
from index_builder.search.groups import GroupsRef, with_groups
from index_builder.search.join import JoinSpec
from index_builder.steps.pairs import PairSpec
from pipelines.build_index import shard_order
from pipelines.config import Config
from pipelines.stage import Dataset, Session, StageTask, dataset_folder, run_stage
from transforms.groups import REVISION, FindGroups, part_name


@dataclasses.dataclass(frozen=True)
class GroupsConfig:
    """The graph's configuration: index shards in the order of hand-out, and where the groups go."""

    index_folder: str
    shards: tuple[int, ...]
    spec: PairSpec
    groups_folder: str
    key: str


def define_pipeline(root: beam.Pipeline, config: GroupsConfig) -> beam.PCollection[Part]:
    """Defines the groups pipeline: numbers of index shards in, descriptors of parts out."""
    return (
        root
        | "ListShards" >> beam.Create(config.shards)
        | "SpreadShards" >> beam.Reshuffle()
        | "FindGroups" >> FindGroups(config.index_folder, config.spec, config.groups_folder, config.key)
    )


def find_groups(config: Config, session: Session, index_folder: str) -> Dataset:
    """Runs the groups stage on an index.

    Raises ConfigError without a threshold, or for one that the metric of the index cannot have.
    """
    index = open_index(index_folder)
    spec = _spec(config, index)
    require_files(index_folder, index.manifest)
    identity = _identity(index, spec)
    folder = dataset_folder(config.workspace, groups.KIND, identity)
    graph = GroupsConfig(index_folder, tuple(shard_order(index.layout)), spec, folder, identity)
    return run_stage(
        StageTask(
            "groups", groups.KIND, folder, identity, 2 * index.layout.shards, "images",
            lambda root: define_pipeline(root, graph),
            lambda: _manifest(folder, identity, index, spec),
            lambda: drop_suspects(folder, identity),
        ),
        session,
    )  # fmt: skip


def add_groups(config: Config, index: IndexDataset, spec: JoinSpec) -> tuple[IndexDataset, JoinSpec]:
    """Returns the index and the join with the groups whose columns rules or exports name.

    Both stay as they are where none are named or `duplicates.threshold` is not set: the index may
    have columns of these names then. Raises DatasetError where the groups have not been found yet.
    """
    named = {*spec.rules.columns, *spec.columns} & set(groups.COLUMNS)
    if config.duplicates.threshold is None or not named:
        return index, spec
    pairs = _spec(config, index)
    folder = dataset_folder(config.workspace, groups.KIND, _identity(index, pairs))
    if not manifests.is_complete(folder):
        raise DatasetError(
            f"The column {min(named)!r} is of the near-duplicate groups (duplicates.threshold), but "
            f"there are none for this index and configuration ({folder}). Run kith groups with the "
            "same configuration first."
        )
    ref = GroupsRef(folder, manifests.load(folder, groups.KIND).content)
    return with_groups(index, ref), dataclasses.replace(spec, groups=ref)


def _spec(config: Config, index: IndexDataset) -> PairSpec:
    spec = config.pair_spec()
    if spec is None:
        raise ConfigError(
            "duplicates.threshold: not set, wanted the score from which two images are "
            "near-duplicates. Set it, to 0.95 for instance."
        )
    return spec.resolve(Metric(index.manifest.properties["metric"]), index.nprobe)


def _decisive(spec: PairSpec) -> dict[str, object]:
    """Returns what decides the bytes of the groups: everything but the threads."""
    return {"threshold": spec.threshold, "nprobe": spec.nprobe}


def _identity(index: IndexDataset, spec: PairSpec) -> str:
    return fingerprint(
        {
            "kind": groups.KIND,
            "revision": REVISION,
            "index": index.manifest.content,
            "spec": _decisive(spec),
        }
    )


def _manifest(folder: str, identity: str, index: IndexDataset, spec: PairSpec) -> Manifest:
    names = [part_name(number) for number in range(index.layout.shards)]
    parts = manifests.collect_parts(folder, names, [identity] * len(names))
    return Manifest(
        groups.KIND,
        identity,
        {
            "code": {"groups": REVISION},
            "config": _decisive(spec),
            "inputs": index.manifest.content,
        },
        describe_schema(groups.SCHEMA),
        parts,
        {
            **_decisive(spec),
            "groups": sum(part.properties["groups"] for part in parts),
            "grouped": sum(part.properties["grouped"] for part in parts),
            "largest": max(part.properties["largest"] for part in parts),
            "metric": index.manifest.properties["metric"],
            "index": index.manifest.content,
        },
    )
