"""Index shards: building them from embeddings, and opening them again.

A shard is a FAISS file and a Parquet file. The FAISS file (`IndexIVFScalarQuantizer`, float16 codes,
not by residual, a quantizer with all centroids, foreign lists empty) is the only copy of the indexed
vectors; its ids are row numbers in the whole index. The Parquet file holds, in the same order, ids,
origin, metadata, squared norms and the nearest lists of each row.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.manifests import Manifest, Part, PartFile
from index_builder.datasets.metadata_table import look_up
from index_builder.datasets.table_files import MetadataTable
from index_builder.errors import DatasetError
from index_builder.index.assigned_parts import gather_rows, list_bounds
from index_builder.index.faiss_file import write_lists
from index_builder.index.product_quantizer import Codebooks, code_bytes
from index_builder.index.sharding import IndexLayout, load_layout
from index_builder.index.training import TrainedIndex, load_trained
from index_builder.scoring.blocks import IdColumn
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.vectors import squared_norms

KIND = "index"
TRAINED_NAME = "trained.npz"
LAYOUT_NAME = "layout.npz"
SHARED_PART = "shared"
CODES_SUFFIX = ".codes.npy"

_ROW_GROUP_ROWS = 4096
# Rows whose norms are computed at once.
_BLOCK_ROWS = 512
_HALF_BYTES = 2


def build_shard(
    folder: str,
    shard: int,
    layout: IndexLayout,
    trained: TrainedIndex,
    assigned_paths: list[str],
    key: str,
    metadata: MetadataTable | None = None,
    *,
    with_codes: bool = False,
) -> Part:
    """Writes one index shard from the assigned parts and returns its manifest entry.

    With a metadata table its columns come after those of the images, and the part's properties get
    `metadata_matched` and `metadata_unmatched`, in rows. Raises DatasetError as `look_up` does.

    Memory: the codes of the shard's rows once, their other columns twice, one row group of an
    assigned part, and 12 bytes for every row of the lists that the shard owns or shares.
    """
    start, stop = layout.shard_rows(shard)
    codes, table = gather_rows(shard, layout, assigned_paths)
    name = f"shard-{shard:05d}"
    properties: dict[str, int] = {}
    if metadata is not None:
        table, properties = _add_metadata(table, metadata, table_rows_path(folder, name, key))
    _write_faiss(storage.join(folder, f"{name}.faiss"), trained, codes, layout, shard)
    table = table.append_column("squared_norm", pa.array(_blockwise_norms(codes)))
    with (
        storage.atomic_path(storage.join(folder, f"{name}.parquet")) as temporary,
        embeddings.parquet_writer(temporary, table.schema) as writer,
    ):
        writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
    suffixes = [".faiss", ".parquet"]
    if with_codes:
        assert trained.codebooks is not None, "codebooks are trained where rows may have codes"
        write_codes(storage.join(folder, f"{name}{CODES_SUFFIX}"), trained.codebooks, codes)
        suffixes.append(CODES_SUFFIX)
    files = tuple(manifests.describe_file(folder, name + suffix) for suffix in suffixes)
    first_list, last_list = layout.shard_lists(shard)
    own = pc.sum(pc.equal(table["image_id"], table["item_id"])).as_py() or 0
    properties |= {
        "own_items": int(own),
        "max_id_bytes": IdColumn.from_arrow(table["image_id"]).max_bytes,
        "lists": last_list - first_list,
    }
    return Part(name, key, stop - start, files, properties)


def write_codes(path: str, codebooks: Codebooks, vectors: NDArray[np.float16]) -> None:
    """Writes the codes of vectors, uint8 [rows, code_bytes], as one `.npy` file."""
    with storage.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, codebooks.encode(vectors))


def _blockwise_norms(codes: NDArray[np.float16]) -> NDArray[np.float64]:
    blocks = [
        squared_norms(codes[start : start + _BLOCK_ROWS]) for start in range(0, len(codes), _BLOCK_ROWS)
    ]
    return np.concatenate(blocks)


def table_rows_path(folder: str, name: str, key: str) -> str:
    """Returns the path of the scratch file with the rows of the metadata table that a shard took.

    It holds int64 `used` (their numbers, ascending) and `table_rows` (how many the table has).
    """
    return storage.join(folder, manifests.WORK_FOLDER, f"used-{name}-{key[:16]}.npz")


def _add_metadata(
    table: pa.Table, metadata: MetadataTable, used_path: str
) -> tuple[pa.Table, dict[str, int]]:
    """Adds the columns of a metadata table before `probes`; returns the figures beside it."""
    found = look_up(metadata, table[metadata.spec.key].combine_chunks())
    for name in found.columns.column_names:
        field, place = found.columns.schema.field(name), table.column_names.index("probes")
        table = table.add_column(place, field, found.columns[name])
    with storage.atomic_path(used_path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, used=found.used, table_rows=found.table_rows)
    return table, {
        "metadata_matched": found.matched,
        "metadata_unmatched": len(table) - found.matched,
    }


def empty_faiss_index(trained: TrainedIndex) -> faiss.IndexIVFScalarQuantizer:
    """Returns the FAISS index of a trained index, with all centroids and no rows."""
    euclidean = trained.transform.metric is Metric.EUCLIDEAN
    quantizer = faiss.IndexFlatL2(trained.dim) if euclidean else faiss.IndexFlatIP(trained.dim)
    quantizer.add(trained.centroids.astype(np.float32))
    index = faiss.IndexIVFScalarQuantizer(
        quantizer,
        trained.dim,
        trained.nlist,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_L2 if euclidean else faiss.METRIC_INNER_PRODUCT,
        False,  # by_residual: codes must be the vectors themselves
    )
    index.is_trained = True
    return index


def _write_faiss(
    path: str, trained: TrainedIndex, codes: NDArray[np.float16], layout: IndexLayout, shard: int
) -> None:
    first_row = layout.shard_rows(shard)[0]
    bounds = list_bounds(layout, shard)
    sizes = np.zeros(trained.nlist, dtype=np.int64)
    for number, (start, stop) in bounds.items():
        sizes[number] = stop - start
    filled = (
        ([codes[start:stop]], np.arange(first_row + start, first_row + stop))
        for start, stop in bounds.values()
        if stop > start
    )
    with storage.atomic_path(path) as temporary:
        write_lists(temporary, empty_faiss_index(trained), sizes, filled)


@dataclasses.dataclass(frozen=True, eq=False)
class ColumnsBeside:
    """Columns of another dataset, with a part of the same rows in the same order for every shard.

    `schema` names them as a manifest does: {name, type}.
    """

    folder: str
    parts: tuple[Part, ...]
    schema: tuple[dict[str, str], ...]

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return [field["name"] for field in self.schema]


@dataclasses.dataclass(frozen=True, eq=False)
class IndexDataset:
    """An opened index: its manifest, what was trained, and where the rows live.

    The columns of `beside` are read as if they were the index's own.
    """

    folder: str
    manifest: Manifest
    trained: TrainedIndex
    layout: IndexLayout
    beside: ColumnsBeside | None = None

    @property
    def schema(self) -> list[dict[str, str]]:
        """The columns that a shard's table may have, {name, type}."""
        return [*self.manifest.schema, *(() if self.beside is None else self.beside.schema)]

    @property
    def parts(self) -> list[Part]:
        """The manifest entries of the shards, in shard order."""
        return [part for part in self.manifest.parts if part.name != SHARED_PART]

    @property
    def nprobe(self) -> int:
        """The number of lists searched for a query."""
        return int(self.manifest.properties["nprobe"])

    @property
    def refine(self) -> int | None:
        """How many proposals by codes are scored for each neighbour; None where all rows are."""
        refine = self.manifest.properties.get("refine")
        return None if refine is None else int(refine)

    @property
    def single_images(self) -> bool:
        """Whether every image is its own item, so that no item has two."""
        return all(part.properties.get("own_items") == part.rows for part in self.parts)

    @property
    def id_bytes(self) -> int:
        """The length of the longest image id."""
        return max(int(part.properties["max_id_bytes"]) for part in self.parts)


def open_index(folder: str) -> IndexDataset:
    """Opens a complete index. Raises DatasetError where there is none or its files were changed."""
    manifest = manifests.load(folder, KIND)
    shared = [part for part in manifest.parts if part.name == SHARED_PART]
    if len(shared) != 1:
        raise DatasetError(f"{folder} names no trained quantizer. Build the index again.")
    for file in shared[0].files:
        manifests.verify_file(folder, file)
    trained = load_trained(storage.join(folder, TRAINED_NAME))
    layout = load_layout(storage.join(folder, LAYOUT_NAME))
    index = IndexDataset(folder, manifest, trained, layout)
    if index.refine is not None and trained.codebooks is None:
        raise DatasetError(
            f"{folder} is searched by codes, but {TRAINED_NAME} has no codebooks: another version of "
            "Kith wrote it. Build the index again."
        )
    return index


class _MappedHalves:
    """The mapped memory of an index as NumPy's array interface tells of it.

    Arrays of it keep this object, and it the index, so that they cannot outlive the mapping.
    """

    def __init__(self, index: faiss.IndexIVF, address: int, count: int) -> None:
        self._index = index
        shape, typestr = (count,), np.dtype(np.uint16).str
        self.__array_interface__ = {
            "data": (address, True), "shape": shape, "typestr": typestr, "version": 3
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class IndexShard:
    """One opened shard: codes are read where FAISS keeps them, mapped from the file."""

    number: int
    layout: IndexLayout
    faiss_index: faiss.IndexIVF
    table: pa.Table

    @property
    def first_row(self) -> int:
        """The shard's first row in the whole index."""
        return self.layout.shard_rows(self.number)[0]

    @property
    def lists(self) -> range:
        """The lists of which the shard owns at least one row."""
        return range(*self.layout.shard_lists(self.number))

    def list_codes(self, list_number: int) -> NDArray[np.float16]:
        """Returns a list's vectors, float16 [rows, dim]: a view that lives as long as the shard."""
        inverted = self.faiss_index.invlists
        size = inverted.list_size(list_number)
        dim = self.faiss_index.d
        if size == 0:
            return np.empty((0, dim), dtype=np.float16)
        codes = faiss.rev_swig_ptr(inverted.get_codes(list_number), size * inverted.code_size)
        matrix: NDArray[np.float16] = codes.view(np.float16).reshape(size, dim)
        return matrix

    def vectors(self) -> VectorRows:
        """Returns all vectors of the shard in row order, where they are mapped.

        They stay mapped as long as there are rows of them, longer than the shard is open.
        """
        inverted, dim, lists = self.faiss_index.invlists, self.faiss_index.d, self.lists
        sizes = np.asarray([inverted.list_size(number) for number in lists], dtype=np.int64)
        filled = np.flatnonzero(sizes)
        if not len(filled):
            return VectorRows.of(np.empty((0, dim), dtype=np.float16))
        # Behind the vectors of each list are its ids, so only within a list is a row after the other.
        addresses = np.asarray([int(inverted.get_codes(lists[place])) for place in filled])
        base, counts = int(addresses.min()), sizes[filled]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat((addresses - base) // _HALF_BYTES, counts) + within * dim
        mapped = _MappedHalves(self.faiss_index, base, int(starts.max()) + dim)
        return VectorRows.at(np.asarray(mapped), starts, dim)

    def ids(self) -> IdColumn:
        """Returns the image ids of the shard's rows."""
        return IdColumn.from_arrow(self.table["image_id"])

    def squared_norms(self) -> NDArray[np.float64]:
        """Returns the exact squared norms of the shard's vectors, float64 [rows]."""
        norms: NDArray[np.float64] = self.table["squared_norm"].to_numpy()
        return norms

    def probes(self) -> NDArray[np.int32]:
        """Returns the nearest lists of each row, nearest first, int32 [rows, nprobe]."""
        return embeddings.list_matrix(self.table["probes"])


def read_shard_table(index: IndexDataset, number: int, columns: tuple[str, ...]) -> pa.Table:
    """Reads some Parquet columns of a shard, in row order, without touching its vectors."""
    names, beside = list(dict.fromkeys(columns)), index.beside
    others = [] if beside is None else [name for name in names if name in beside.columns]
    path = storage.join(index.folder, index.parts[number].file(".parquet").path)
    table = _read_columns(path, [name for name in names if name not in others])
    if beside is None or not others:
        return table
    path = storage.join(beside.folder, beside.parts[number].file(".parquet").path)
    more = _read_columns(path, others)
    return pa.table({name: (more if name in others else table)[name] for name in names})


def _read_columns(path: str, columns: list[str]) -> pa.Table:
    """Reads columns of a Parquet file. Raises DatasetError where it is damaged."""
    with storage.open_arrow(path) as file:
        try:
            return pq.read_table(file, columns=columns)
        # Damaged pages come as an OSError.
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(
                f"{path} cannot be read as Parquet: {error}. The file was changed or damaged: make the "
                "dataset again."
            ) from error


@contextlib.contextmanager
def open_shard(
    index: IndexDataset, number: int, columns: tuple[str, ...], *, verify: bool = False
) -> Iterator[IndexShard]:
    """Opens a shard with some of its Parquet columns, and closes it at the end of the block.

    With `verify` both files are first checked against the manifest (DatasetError). A task verifies
    the shard it owns, so over a whole join every shard is verified once.
    """
    part = index.parts[number]
    if verify:
        for file in part.files:
            manifests.verify_file(index.folder, file)
        if index.beside is not None:
            for file in index.beside.parts[number].files:
                manifests.verify_file(index.beside.folder, file)
    for file in part.files:
        _check_size(index.folder, file)
    table = read_shard_table(index, number, columns)
    with storage.local_copy(storage.join(index.folder, part.file(".faiss").path)) as path:
        yield IndexShard(number, index.layout, _map_faiss(index, number, path), table)


@contextlib.contextmanager
def open_codes(index: IndexDataset, number: int) -> Iterator[NDArray[np.uint8]]:
    """Maps the codes of a shard's rows, uint8 [rows, code_bytes], until the end of the block.

    Raises DatasetError for a file that is missing, cut off, or of another index.
    """
    file = index.parts[number].file(CODES_SUFFIX)
    _check_size(index.folder, file)
    name = storage.join(index.folder, file.path)
    start, stop = index.layout.shard_rows(number)
    wanted = (stop - start, code_bytes(index.trained.dim))
    with storage.local_copy(name) as path:
        try:
            codes = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DatasetError(
                f"{name} cannot be read as codes: {error}. The file was changed or damaged: copy it "
                "again, or build the index again."
            ) from error
        if codes.shape != wanted or codes.dtype != np.uint8:
            raise _foreign(name, f"{codes.dtype} {codes.shape}", f"uint8 {wanted}")
        yield codes


def _check_size(folder: str, file: PartFile) -> None:
    path = storage.join(folder, file.path)
    found = storage.size(path)
    if found != file.bytes:
        state = "is missing" if found < 0 else f"has {found} bytes"
        raise DatasetError(
            f"{path} {state}, but {manifests.manifest_path(folder)} lists it with {file.bytes} bytes: "
            "the file was cut off, deleted or replaced. Copy it again, or build the index again."
        )


def _map_faiss(index: IndexDataset, number: int, path: str) -> faiss.IndexIVF:
    """Maps a shard's FAISS file and checks that it belongs to the index.

    Raises DatasetError; where the manifest's checksum tells of a change, its message says that.
    """
    file = index.parts[number].file(".faiss")
    name = storage.join(index.folder, file.path)
    try:
        faiss_index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        manifests.verify_file(index.folder, file)
        raise DatasetError(
            f"{name} cannot be read as a FAISS index: {error}. Build the index again."
        ) from error
    start, stop = index.layout.shard_rows(number)
    centroids = index.trained.centroids
    found = (type(faiss_index).__name__, faiss_index.ntotal, faiss_index.d)
    wanted = ("IndexIVFScalarQuantizer", stop - start, centroids.shape[1])
    if found != wanted or faiss_index.nlist != len(centroids):
        manifests.verify_file(index.folder, file)
        raise _foreign(
            name,
            f"{found} with {getattr(faiss_index, 'nlist', 0)} lists",
            f"{wanted} with {len(centroids)} lists",
        )
    stored = faiss_index.quantizer.reconstruct_n(0, len(centroids))
    if not np.array_equal(stored, centroids.astype(np.float32)):
        manifests.verify_file(index.folder, file)
        raise _foreign(name, "other centroids", "those of trained.npz")
    return faiss_index


def _foreign(name: str, found: str, wanted: str) -> DatasetError:
    return DatasetError(
        f"{name} is a shard of another index: got {found}, wanted {wanted}. Copy the right file, or "
        "build the index again."
    )
