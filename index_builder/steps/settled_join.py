"""What must be known of a join's rules before it starts: columns, excluded pairs, torn items."""

import dataclasses
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from index_builder.datasets import storage
from index_builder.datasets.embeddings import column_types
from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.rules.exclusions import (
    ExclusionFiles,
    ExclusionSpec,
    IdShards,
    exclusions_identity,
    find_exclusions,
    prepare_exclusions,
)
from index_builder.rules.rules import check_rules
from index_builder.search.items import check_items
from index_builder.search.join import JoinSpec
from index_builder.steps.queries import QueriesDataset


@dataclasses.dataclass(frozen=True)
class SettledJoin:
    """A join whose rules fit its datasets; `prepare` does what its tasks need beforehand.

    `prepare` checks the items and writes the excluded pairs, a part a query shard. It raises
    ConfigError or DatasetError, with nothing half-written.
    """

    spec: JoinSpec
    prepare: Callable[[], None]


def settle_join(
    index: IndexDataset,
    spec: JoinSpec,
    wanted: ExclusionSpec | None,
    folder_of: Callable[[str], str],
    asked: QueriesDataset | None = None,
) -> SettledJoin:
    """Returns a join with its exclusions as they were found; nothing is written yet.

    `folder_of` says where the prepared exclusions of a fingerprint go. Without `asked` the queries are
    the rows of the index. Raises ConfigError when a rule does not fit the columns of the two sides, or
    a file of exclusions those that were named.
    """
    candidates = column_types(index.schema)
    check_rules(
        spec.rules,
        candidates if asked is None else column_types(asked.manifest.schema),
        candidates,
    )
    if wanted is None:
        return SettledJoin(spec, lambda: check_items(index, spec.rules))
    files = find_exclusions(wanted)
    content = index.manifest.content
    asked_content = content if asked is None else asked.manifest.content
    identity = exclusions_identity(files.rule(), asked_content, content)
    folder = folder_of(identity)
    rules = dataclasses.replace(spec.rules, exclude=files.rule())

    def prepare() -> None:
        check_items(index, rules)
        _prepare_exclusions(files, folder, identity, index, asked)

    return SettledJoin(dataclasses.replace(spec, rules=rules, exclusions=folder), prepare)


def _prepare_exclusions(
    files: ExclusionFiles,
    folder: str,
    identity: str,
    index: IndexDataset,
    asked: QueriesDataset | None,
) -> None:
    by = files.spec.by

    def index_ids(number: int) -> pa.Array:
        return read_shard_table(index, number, (by,))[by].combine_chunks()

    def query_ids(number: int) -> pa.Array:
        assert asked is not None
        path = storage.join(asked.folder, asked.manifest.parts[number].file(".parquet").path)
        with storage.open_arrow(path) as file:
            return pq.read_table(file, columns=[by])[by].combine_chunks()

    corpus = IdShards(index.layout.shards, index_ids)
    if asked is None:
        prepare_exclusions(files, folder, identity, corpus)
    else:
        prepare_exclusions(files, folder, identity, IdShards(asked.shards, query_ids), corpus)
