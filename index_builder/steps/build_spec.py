"""What is built, and the fingerprint of the index that comes of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.table_files import MetadataTable
from index_builder.index import shards
from index_builder.index.goals import Goal
from index_builder.index.sharding import IndexLayout
from index_builder.index.spec import IndexSpec, ResolvedSpec
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.query_sample import QuerySample
from index_builder.rules.rules import JoinRules, check_rules
from index_builder.search.corpus import Corpus
from index_builder.search.groups import COLUMNS, SCHEMA

# Of the near-duplicate groups that may be found beside the finished index.
_GROUP_COLUMNS = {name: SCHEMA.field(name).type for name in COLUMNS}
# Raised when the same embeddings and configuration give other bytes than before.
REVISION = 5

# What a step tells of its work: a counter's name and by how much it grew.
Tally = Callable[[str, int], None]


def no_tally(name: str, amount: int) -> None:
    """Forgets what a step tells of its work."""


def check_rule_columns(rules: JoinRules, columns: Mapping[str, pa.DataType]) -> None:
    """Raises ConfigError when rules need a column of candidates that such an index will not have.

    What `rules.queries` names may be of other queries than the rows of the index.
    """
    known = {**columns, **_GROUP_COLUMNS}
    check_rules(dataclasses.replace(rules, queries=()), known, known)


@dataclasses.dataclass(frozen=True)
class Retry:
    """An index made again with more lists a query, since the recall of attempt - 1 was too low.

    What was trained is taken from the index in `folder`; `calibration` is what that one was chosen by.
    `refine` is raised, too, where codes propose.
    """

    attempt: int
    nprobe: int
    folder: str
    calibration: dict[str, Any] | None = None
    refine: int | None = None

    def fingerprint_value(self) -> dict[str, int | None]:
        """Returns what decides the bytes of the index, and what its joins find."""
        return {"attempt": self.attempt, "nprobe": self.nprobe, "refine": self.refine}


@dataclasses.dataclass(frozen=True)
class BuildSpec:
    """What is indexed, how, and where the index goes; travels to the workers.

    `key` is the fingerprint of the index that is being made; `metadata` the table whose columns it
    gets beside those of the images. With `calibration` nprobe is chosen on a sample of queries, with
    `retry` it is given.
    """

    embeddings_folder: str
    embeddings_parts: tuple[Part, ...]
    index: ResolvedSpec
    index_folder: str
    key: str
    metadata: MetadataTable | None = None
    calibration: CalibrationSpec | None = None
    retry: Retry | None = None

    @property
    def corpus(self) -> Corpus:
        """The embeddings with the columns of the table."""
        return Corpus(self.embeddings_folder, self.embeddings_parts, self.metadata)

    @property
    def calibration_sample(self) -> QuerySample:
        """The sample of queries that nprobe is chosen on."""
        assert self.calibration is not None, "asked for only where nprobe is calibrated"
        return self.calibration.sample(self.index.rows, self.index.request.seed)

    def work_path(self, name: str) -> str:
        """Returns the path of a scratch file."""
        return storage.join(self.index_folder, manifests.WORK_FOLDER, name)

    def assigned_path(self, number: int) -> str:
        """Returns the path of the scratch file of one part of the embeddings."""
        return self.work_path(f"assigned-{number:05d}-{self.key[:16]}.parquet")

    @property
    def trained_path(self) -> str:
        """The path of the trained transform and quantizer."""
        return storage.join(self.index_folder, shards.TRAINED_NAME)

    @property
    def layout_path(self) -> str:
        """The path of the layout of the rows."""
        return storage.join(self.index_folder, shards.LAYOUT_NAME)


def index_identity(
    source: Manifest,
    request: IndexSpec,
    table: MetadataTable | None,
    goal: Goal | None = None,
    calibration_spec: CalibrationSpec | None = None,
    retry: Retry | None = None,
) -> str:
    """Returns the fingerprint of the index that a request makes of an embeddings dataset.

    What the request leaves open is resolved first, so a goal counts by the choices that it leads to.
    Where calibration may choose an nprobe that needs more shards, the memory limit counts itself.
    """
    spec = request.resolve(source.rows, embeddings.load_dim(source), goal)
    value = {
        "kind": shards.KIND,
        "revision": REVISION,
        "embeddings": source.content,
        "spec": request.fingerprint_value(),
        "choices": spec.choices(),
    }
    if calibration_spec is not None:
        value["calibration"] = calibration_spec.fingerprint_value()
        most = spec.settled(spec.nlist, request.refine if spec.may_have_codes else None)
        if retry is None and most.shards > spec.shards:
            value["memory_limit_bytes"] = spec.goal.memory_limit_bytes
    if retry is not None:
        again = spec.settled(retry.nprobe, retry.refine)
        value["retry"] = retry.fingerprint_value() | {"shards": again.shards}
    return fingerprint(value | metadata_ingredient(table))


def metadata_ingredient(table: MetadataTable | None) -> dict[str, object]:
    """Returns what a table adds to the fingerprint; an index without one keeps the one it had."""
    return {} if table is None else {"metadata": table.fingerprint_value()}


def shard_key(identity: str, layout: IndexLayout, shard: int) -> str:
    """Returns the fingerprint of a shard's part: of the index, and of the rows that it has."""
    return fingerprint({"index": identity, "rows": layout.shard_rows(shard)})
