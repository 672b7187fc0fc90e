"""The steps of a join: one task a query shard, and the neighbours dataset that they make together.

A Beam pipeline runs the tasks on many workers, `index_builder.library` in a plain loop; the bytes are
the same. The queries are the rows of the index, shard by shard, or a queries dataset.
"""

import dataclasses
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.suspects import suspecting
from index_builder.index.shards import IndexDataset, open_shard
from index_builder.search import neighbors
from index_builder.search.join import (
    JoinSpec,
    StoredQueries,
    join_queries,
    open_joined,
    probed_shards,
    read_index_queries,
)
from index_builder.search.neighbors import CAPPED, STATUSES
from index_builder.search.short_rows import search_again
from index_builder.steps import queries
from index_builder.steps.build_spec import Tally, no_tally
from index_builder.steps.queries import QueriesDataset

# Raised when the same index and configuration give other bytes than before.
REVISION = 4
_ROW_GROUP_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class JoinTask:
    """What a join task reads, finds and writes; travels to the workers.

    `key` is the fingerprint of the neighbours dataset; without `queries_folder` the queries are the
    rows of the index.
    """

    index_folder: str
    spec: JoinSpec
    neighbors_folder: str
    key: str
    queries_folder: str | None = None


def part_name(shard: int) -> str:
    """Returns the name of the neighbours part of a query shard."""
    return f"part-{shard:05d}"


def join_part(
    task: JoinTask, shard: int, counts: pa.Table | None = None, tally: Tally = no_tally
) -> Part:
    """Returns the part of a query shard, finding its neighbours unless an earlier attempt did.

    `counts` is what `short_rows.count_all` returns for the index and the rules. Raises DatasetError
    when a file does not match its manifest.
    """
    return finish_part(task, first_pass(task, shard, tally), counts, tally)


def first_pass(task: JoinTask, shard: int, tally: Tally = no_tally) -> int:
    """Searches the probed lists for a query shard; returns the shard's number.

    A part that has all it can have is finished; one with rows that are still to be settled is left
    for `finish_part` in a scratch file. After an interrupted run either is found and kept.
    """
    scratch = _scratch_path(task, shard)
    if _finished(task, shard) is not None or storage.exists(scratch):
        return shard
    with suspecting(task.neighbors_folder, task.key):
        index = open_joined(task.index_folder, task.spec)
        stored = _read_stored(task, index, shard)
        table = join_queries(index, stored, task.spec)
    if pc.any(pc.equal(table["status"], CAPPED)).as_py():
        _write_table(scratch, table)
    else:
        _write_part(task, shard, table, len(stored.table) - len(table), 0, tally)
    return shard


def finish_part(
    task: JoinTask, shard: int, counts: pa.Table | None = None, tally: Tally = no_tally
) -> Part:
    """Returns the part of a query shard, searching its short rows again unless it is finished."""
    part = _finished(task, shard)
    if part is not None:
        return part
    with storage.open_arrow(_scratch_path(task, shard)) as file:
        table = pq.read_table(file)
    with suspecting(task.neighbors_folder, task.key):
        index = open_joined(task.index_folder, task.spec)
        stored = _read_stored(task, index, shard)
        table, widened = search_again(index, stored, task.spec, table, counts)
    return _write_part(task, shard, table, len(stored.table) - len(table), widened, tally)


def _finished(task: JoinTask, shard: int) -> Part | None:
    return manifests.finished_part(task.neighbors_folder, part_name(shard), task.key)


def _scratch_path(task: JoinTask, shard: int) -> str:
    name = f"first-{part_name(shard)}-{task.key[:16]}.parquet"
    return storage.join(task.neighbors_folder, manifests.WORK_FOLDER, name)


def _write_table(path: str, table: pa.Table) -> None:
    # Scores and row numbers hardly repeat: a dictionary of them takes longer and more bytes.
    strings = [name for field in table.schema for name in _string_columns(field)]
    with storage.atomic_path(path) as temporary:
        pq.write_table(
            table.combine_chunks(),
            temporary,
            row_group_size=_ROW_GROUP_ROWS,
            compression="ZSTD",
            use_dictionary=strings,
        )


def _string_columns(field: pa.Field) -> list[str]:
    """Returns the name that Parquet gives to a column of strings or lists of them, or nothing."""
    if pa.types.is_list(field.type) and pa.types.is_string(field.type.value_type):
        return [f"{field.name}.list.element"]
    return [field.name] if pa.types.is_string(field.type) else []


def _write_part(
    task: JoinTask, shard: int, table: pa.Table, filtered: int, widened: int, tally: Tally
) -> Part:
    folder, name = task.neighbors_folder, part_name(shard)
    _write_table(storage.join(folder, f"{name}.parquet"), table)
    status = table["status"].value_counts().to_pylist()
    counts = {entry["values"]: entry["counts"] for entry in status}
    properties = {
        "pairs": pc.sum(pc.list_value_length(table["neighbor_ids"])).as_py() or 0,
        **{name: counts.get(name, 0) for name in STATUSES},
        "filtered": filtered,
        "widened": widened,
    }
    file = manifests.describe_file(folder, f"{name}.parquet")
    part = Part(name, task.key, len(table), (file,), properties)
    manifests.mark_part(folder, part)
    tally("queries", part.rows)
    tally("pairs_out", part.properties["pairs"])
    tally("widened", widened)
    tally("bytes_out", file.bytes)
    return part


def _read_stored(task: JoinTask, index: IndexDataset, shard: int) -> StoredQueries:
    if task.queries_folder is None:
        return read_index_queries(index, shard, task.spec)
    found = queries.open_queries(task.queries_folder)
    found.verify_share(index, shard)
    return found.read(shard, index, task.spec)


def neighbors_identity(index: Manifest, spec: JoinSpec, asked: Manifest | None = None) -> str:
    """Returns the fingerprint of a join's neighbours; `asked` is the manifest of the queries."""
    value = {
        "kind": neighbors.KIND,
        "revision": REVISION,
        "index": index.content,
        "spec": decisive(spec),
    }
    if index.properties.get("refine") is not None:
        # It is decided with the index, but no file of the index tells of it.
        value["refine"] = index.properties["refine"]
    return fingerprint(value | _queries_ingredient(asked))


def _queries_ingredient(asked: Manifest | None) -> dict[str, str]:
    """Returns what the queries add to a fingerprint; a join of the index with itself has no more."""
    return {} if asked is None else {"queries": asked.content}


def decisive(spec: JoinSpec) -> dict[str, Any]:
    """Returns what decides the bytes of the neighbours: everything but threads, product and places."""
    value = dataclasses.asdict(dataclasses.replace(spec, product=None))
    del value["threads"], value["exclusions"], value["product"]
    # Where they are is of no account, and a join without groups keeps the fingerprint it had.
    if value.pop("groups") is not None:
        assert spec.groups is not None
        value["groups"] = spec.groups.content
    return value


def fan_out(index: IndexDataset) -> float:
    """Returns how many corpus shards a shard of the index probes, on average."""
    touched = []
    for number in range(index.layout.shards):
        with open_shard(index, number, ("probes",)) as shard:
            touched.append(len(probed_shards(index, shard.probes(), number)))
    return sum(touched) / len(touched)


def neighbors_manifest(
    task: JoinTask, index: IndexDataset, asked: QueriesDataset | None = None
) -> Manifest:
    """Returns the manifest of a finished join. Raises DatasetError where a part is missing."""
    folder = task.neighbors_folder
    shards = index.layout.shards if asked is None else asked.shards
    names = [part_name(number) for number in range(shards)]
    parts = manifests.collect_parts(folder, names, [task.key] * len(names))
    with storage.open_arrow(storage.join(folder, parts[0].file(".parquet").path)) as file:
        schema = embeddings.describe_schema(pq.read_schema(file))
    totals = {
        name: sum(part.properties[name] for part in parts)
        for name in ("pairs", *STATUSES, "filtered", "widened")
    }
    ingredient = _queries_ingredient(None if asked is None else asked.manifest)
    properties = {
        **totals,
        **decisive(task.spec),
        "metric": index.manifest.properties["metric"],
        "nprobe": index.nprobe,
        "refine": index.refine,
        "index": index.manifest.content,
        "fan_out": fan_out(index) if asked is None else asked.fan_out(),
        **ingredient,
    }
    return Manifest(
        neighbors.KIND,
        task.key,
        {
            "code": {"join": REVISION},
            "config": decisive(task.spec),
            "inputs": index.manifest.content,
            **ingredient,
        },
        schema,
        parts,
        properties,
    )
