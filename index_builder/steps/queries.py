"""Queries that are not the rows of the index: a dataset of their own, in the order of its lists.

An embeddings dataset (another night, another catalogue, a list of new items) goes through the index's
stored transform, is assigned to its lists, sorted by list and cut into query shards as the corpus was.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.metadata_table import look_up
from index_builder.datasets.table_files import MetadataTable
from index_builder.errors import ConfigError, FingerprintError
from index_builder.index import assigned_parts
from index_builder.index.sharding import IndexLayout, load_layout, plan_layout, save_layout
from index_builder.index.shards import IndexDataset
from index_builder.rules.exclusions import read_exclusions
from index_builder.rules.rules import check_rules
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.vectors import squared_norms
from index_builder.search.join import JoinSpec, StoredQueries, probed_shards
from index_builder.steps.build_spec import Tally, no_tally

KIND = "queries"
# Raised when the same embeddings and index give other bytes than before.
REVISION = 1
_ROW_GROUP_ROWS = 4096
_MOST_LISTED = 5


@dataclasses.dataclass(frozen=True)
class QueriesSpec:
    """Which embeddings are made queries of which index, and where they go; travels to the workers.

    `limit` says that only the images listed in `limit_path` are taken; `metadata` is the table whose
    columns the queries get, as the index did. `key` is the fingerprint of the dataset.
    """

    embeddings_folder: str
    embeddings_parts: tuple[Part, ...]
    index_folder: str
    shards: int
    queries_folder: str
    key: str
    limit: bool = False
    metadata: MetadataTable | None = None

    def work_path(self, name: str) -> str:
        """Returns the path of a scratch file."""
        return storage.join(self.queries_folder, manifests.WORK_FOLDER, name)

    def assigned_path(self, number: int) -> str:
        """Returns the path of the scratch file of one part of the embeddings."""
        return self.work_path(f"assigned-{number:05d}-{self.key[:16]}.parquet")

    @property
    def limit_path(self) -> str:
        """The path of the scratch file with the image ids that are taken."""
        return self.work_path(f"limit-{self.key[:16]}.parquet")

    @property
    def layout_path(self) -> str:
        """The path of the scratch file with the layout of the queries."""
        return self.work_path(f"layout-{self.key[:16]}.npz")


def check_comparable(index: IndexDataset, source: Manifest, folder: str) -> None:
    """Raises FingerprintError when embeddings cannot be compared with the rows of an index."""
    wanted, found = index.manifest.properties.get("encoder", {}), source.properties.get("encoder", {})
    differing = [
        f"{key}: the queries have {found.get(key)!r}, the index {wanted.get(key)!r}"
        for key in sorted({*wanted, *found})
        if found.get(key) != wanted.get(key)
    ]
    dims = embeddings.load_dim(source), index.manifest.properties["encoder_dim"]
    if dims[0] != dims[1]:
        differing.append(f"dim: the queries have {dims[0]}, the index {dims[1]}")
    if differing:
        raise FingerprintError(
            f"The queries {folder} were not made by the encoder of the index {index.folder}, so their "
            f"vectors cannot be compared ({'; '.join(differing)}). Embed the queries with the "
            "configuration of that index, or build an index with the encoder of the queries."
        )


def check_columns(
    index: IndexDataset,
    source: Manifest,
    folder: str,
    spec: JoinSpec,
    metadata: MetadataTable | None = None,
) -> None:
    """Raises ConfigError when the index or the queries lack a column that a join needs.

    Rules need their columns on the sides that they look at. A column that is only carried along may
    be missing among the queries; it is null there.
    """
    known, asked = embeddings.column_types(index.schema), embeddings.column_types(source.schema)
    if metadata is not None:
        asked |= {name: embeddings.METADATA_TYPES[kind] for name, kind in metadata.spec.columns}
    beside = () if index.beside is None else index.beside.columns
    for name in spec.rules.query_columns:
        if name in beside and name not in asked:
            raise ConfigError(
                f"join.rules: same, different or queries name {name!r}, a column of the near-duplicate "
                f"groups, which the queries {folder} do not have: they are not rows of the index. Use "
                "it in candidates or max_per, or join the index with itself."
            )
    check_rules(spec.rules, asked, known)
    for name in spec.columns:
        if name not in known:
            raise ConfigError(
                f"The join is to carry the column {name!r}, but the index {index.folder} has only "
                f"{', '.join(known)}. Build the index with it, or correct the name."
            )
        if asked.get(name, known[name]) != known[name]:
            raise ConfigError(
                f"The column {name!r} is {asked[name]} in the queries {folder}, but {known[name]} in "
                f"the index {index.folder}. Make the queries with {name} as {known[name]}."
            )


def query_shards(index: IndexDataset, rows: int) -> int:
    """Returns into how many shards queries are cut: about as many rows each as a shard of the index."""
    return max(1, -(-rows * index.layout.shards // index.layout.rows))


def queries_identity(
    index: Manifest,
    source: Manifest,
    shards: int,
    limit: pa.Array | None = None,
    metadata: MetadataTable | None = None,
) -> str:
    """Returns the fingerprint of the queries that an index makes of an embeddings dataset.

    `limit` holds the image ids that are taken, ascending; None takes all.
    """
    return fingerprint(
        {
            "kind": KIND,
            "revision": REVISION,
            "index": index.content,
            "embeddings": source.content,
            "shards": shards,
            "limit": None if limit is None else fingerprint(limit.to_pylist()),
            "metadata": None if metadata is None else metadata.fingerprint_value(),
        }
    )


def read_limit(path: str) -> pa.Array:
    """Reads a list of image ids: strings, ascending, each once.

    A Parquet file with the column `image_id` or with one column alone, or UTF-8 text with an id a
    line. Raises ConfigError for a file that is missing, empty or neither of the two.
    """
    try:
        if path.endswith(".parquet"):
            ids = _parquet_ids(path)
        else:
            lines = storage.read_bytes(path).decode().replace("\r\n", "\n").split("\n")
            ids = pa.array([line for line in lines if line], pa.string())
    except FileNotFoundError as error:
        raise ConfigError(f"--limit-ids: {path} does not exist. Correct the path.") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--limit-ids: {path} cannot be read: {error}. Wanted text in UTF-8 with one image id a "
            "line, or a Parquet file (.parquet) with the column image_id."
        ) from error
    ids = pc.unique(ids.drop_null())
    if not len(ids):
        raise ConfigError(f"--limit-ids: {path} names no image id, wanted at least one. Add some.")
    return ids.take(pc.sort_indices(ids))


def _parquet_ids(path: str) -> pa.Array:
    with storage.open_arrow(path) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        name = "image_id" if "image_id" in names or len(names) != 1 else names[0]
        if name not in names:
            raise ConfigError(
                f"--limit-ids: {path} has the columns {', '.join(names)}, wanted image_id. Name the "
                "column of the ids image_id."
            )
        return parquet.read([name])[name].cast(pa.string()).combine_chunks()


def write_limit(spec: QueriesSpec, ids: pa.Array) -> None:
    """Writes the ids that are taken where the workers find them, once all were found.

    Raises ConfigError when some are not in the embeddings.
    """
    found = np.zeros(len(ids), dtype=bool)
    for part in spec.embeddings_parts:
        for block in embeddings.read_part(spec.embeddings_folder, part, ["image_id"], verify=False):
            places = pc.index_in(block["image_id"].combine_chunks(), value_set=ids).drop_null()
            found[places.to_numpy()] = True
    unknown = ids.filter(pa.array(~found))
    if len(unknown):
        listed = ", ".join(repr(name) for name in unknown[:_MOST_LISTED].to_pylist())
        raise ConfigError(
            f"--limit-ids: {len(unknown)} of {len(ids)} image ids are not in "
            f"{spec.embeddings_folder} (first: {listed}). Remove them, or name the embeddings that "
            "have them."
        )
    with storage.atomic_path(spec.limit_path) as temporary:
        pq.write_table(pa.table({"image_id": ids}), temporary)


def assign(
    spec: QueriesSpec, number: int, index: IndexDataset, tally: Tally = no_tally
) -> NDArray[np.int64]:
    """Assigns one part of the embeddings to the index's lists; returns their sizes, int64 [nlist]."""
    part, path = spec.embeddings_parts[number], spec.assigned_path(number)
    if not storage.exists(path):
        assigned_parts.assign_part(_taken(spec, part), index.trained, index.nprobe, path)
        tally("vectors_in", part.rows)
    return assigned_parts.assigned_list_sizes(path, index.trained.nlist)


def _taken(spec: QueriesSpec, part: Part) -> Iterator[pa.Table]:
    """Yields the blocks of a part, without the rows that the limit leaves out."""
    if not spec.limit:
        yield from embeddings.read_part(spec.embeddings_folder, part)
        return
    with storage.open_arrow(spec.limit_path) as file:
        ids = pq.read_table(file)["image_id"].combine_chunks()
    first = True
    for block in embeddings.read_part(spec.embeddings_folder, part):
        kept = block.filter(pc.is_in(block["image_id"], value_set=ids))
        # An empty block says which columns there are; one is enough.
        if len(kept) or first:
            yield kept
        first = False


def plan(spec: QueriesSpec, list_sizes: NDArray[np.int64]) -> IndexLayout:
    """Cuts the queries, in the order of their lists, into shards; writes the layout and returns it."""
    layout = plan_layout(list_sizes, spec.shards)
    save_layout(spec.layout_path, layout)
    return layout


def part_name(shard: int) -> str:
    """Returns the name of the part of a query shard."""
    return f"part-{shard:05d}"


def build(spec: QueriesSpec, shard: int, index: IndexDataset, tally: Tally = no_tally) -> Part:
    """Returns a query shard's part, writing its file unless an earlier attempt did.

    Memory: the rows of the lists that the shard has a part of.
    """
    layout = load_layout(spec.layout_path)
    folder, name = spec.queries_folder, part_name(shard)
    part = manifests.finished_part(folder, name, spec.key)
    if part is not None:
        return part
    paths = [spec.assigned_path(i) for i in range(len(spec.embeddings_parts))]
    codes, table = assigned_parts.gather_rows(shard, layout, paths)
    if spec.metadata is not None:
        ids = table[spec.metadata.spec.key].combine_chunks()
        found = look_up(spec.metadata, ids).columns
        for field in found.schema:
            table = table.append_column(field, found[field.name])
    table = table.append_column("code", embeddings.list_array(codes))
    table = table.append_column("squared_norm", pa.array(squared_norms(codes)))
    with (
        storage.atomic_path(storage.join(folder, f"{name}.parquet")) as temporary,
        embeddings.parquet_writer(temporary, table.schema) as writer,
    ):
        writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
    file = manifests.describe_file(folder, f"{name}.parquet")
    probes = embeddings.list_matrix(table["probes"])
    properties = {
        "first_row": layout.shard_rows(shard)[0],
        "shards_probed": sorted(probed_shards(index, probes)),
    }
    part = Part(name, spec.key, len(table), (file,), properties)
    manifests.mark_part(folder, part)
    tally("queries", part.rows)
    tally("bytes_out", file.bytes)
    return part


def queries_manifest(spec: QueriesSpec, source: Manifest, index: IndexDataset) -> Manifest:
    """Returns the manifest of finished queries. Raises DatasetError where a part is missing."""
    folder = spec.queries_folder
    layout = load_layout(spec.layout_path)
    names = [part_name(number) for number in range(layout.shards)]
    parts = manifests.collect_parts(folder, names, [spec.key] * len(names))
    with storage.open_arrow(storage.join(folder, parts[0].file(".parquet").path)) as file:
        schema = embeddings.describe_schema(pq.read_schema(file))
    inputs = {"index": index.manifest.content, "embeddings": source.content}
    properties: dict[str, Any] = {
        **inputs,
        "shards": len(parts),
        "limited": spec.limit,
        "nprobe": index.nprobe,
        "dim": index.trained.dim,
        "encoder": source.properties.get("encoder", {}),
    }
    code = {"queries": REVISION}
    table = None if spec.metadata is None else spec.metadata.fingerprint_value()
    ingredients = {"code": code, "config": {"metadata": table}, "inputs": inputs}
    return Manifest(KIND, spec.key, ingredients, schema, parts, properties)


@dataclasses.dataclass(frozen=True, eq=False)
class QueriesDataset:
    """Opened queries: the numbers of their rows go through all shards."""

    folder: str
    manifest: Manifest

    @property
    def shards(self) -> int:
        """The number of query shards."""
        return len(self.manifest.parts)

    @property
    def by_size(self) -> list[int]:
        """The shards largest first: the order in which tasks are handed out."""
        sizes = [part.rows for part in self.manifest.parts]
        return sorted(range(self.shards), key=lambda shard: (-sizes[shard], shard))

    def fan_out(self) -> float:
        """Returns how many corpus shards a query shard probes, on average."""
        touched = [len(part.properties["shards_probed"]) for part in self.manifest.parts]
        return sum(touched) / len(touched)

    def check(self, index: IndexDataset, spec: JoinSpec) -> None:
        """Raises FingerprintError for queries of another index, ConfigError as `check_columns` does."""
        made_for = self.manifest.properties["index"]
        if made_for != index.manifest.content:
            raise FingerprintError(
                f"The queries {self.folder} were made for the index with content {made_for}, but "
                f"{index.folder} has {index.manifest.content}. Make the queries again for this one."
            )
        check_columns(index, self.manifest, self.folder, spec)

    def read(self, shard: int, index: IndexDataset, spec: JoinSpec) -> StoredQueries:
        """Reads a query shard with the columns that a join needs, after checking its checksum.

        A carried column that the queries do not have is null, in the type that it has in the index.
        """
        part = self.manifest.parts[shard]
        path = manifests.verify_file(self.folder, part.file(".parquet"))
        there = {field["name"] for field in self.manifest.schema}
        needed = dict.fromkeys(("image_id", *spec.rules.query_columns, *spec.columns))
        names = [name for name in needed if name in there]
        with storage.open_arrow(path) as file:
            table = pq.read_table(file, columns=[*names, "code", "probes", "squared_norm"])
        for name in needed:
            if name not in there:
                kind = embeddings.column_types(index.schema)[name]
                table = table.append_column(name, pa.nulls(len(table), kind))
        return StoredQueries(
            VectorRows.of(embeddings.list_matrix(table["code"])),
            table["squared_norm"].to_numpy(),
            embeddings.list_matrix(table["probes"]),
            table.drop_columns(["code", "probes", "squared_norm"]),
            int(part.properties["first_row"]),
            exclusions=None if spec.exclusions is None else read_exclusions(spec.exclusions, shard),
        )

    def verify_share(self, index: IndexDataset, shard: int) -> None:
        """Checks the index shards that this query shard is the first to probe (DatasetError).

        So over a whole join every index shard that is probed is checked once, as when each is a
        task's own, and a few queries do not cost the checksums of a large index.
        """
        probed = [part.properties["shards_probed"] for part in self.manifest.parts[: shard + 1]]
        for number in set(probed[shard]).difference(*probed[:shard]):
            for file in index.parts[number].files:
                manifests.verify_file(index.folder, file)
            if index.beside is not None:
                for file in index.beside.parts[number].files:
                    manifests.verify_file(index.beside.folder, file)


def open_queries(folder: str) -> QueriesDataset:
    """Opens complete queries. Raises DatasetError where there are none."""
    return QueriesDataset(folder, manifests.load(folder, KIND))
