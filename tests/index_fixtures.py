"""Small indexes built from arrays without any pipeline, and the brute force they are held against."""

import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builder.datasets import embeddings, manifests, sampling
from index_builder.datasets.embeddings import EmbeddingSchema
from index_builder.datasets.manifests import Manifest, Part
from index_builder.datasets.table_files import MetadataTable
from index_builder.index import assigned_parts, sharding, shards, training
from index_builder.index.shards import IndexDataset
from index_builder.index.spec import IndexSpec
from index_builder.rules.rules import JoinRules
from index_builder.scoring.vectors import unit_float16
from index_builder.search.join import JoinSpec, join_shard


@dataclasses.dataclass(frozen=True, eq=False)
class Catalogue:
    """Vectors of any length [n, d] with their ids; item ids default to image ids, brands to none."""

    vectors: NDArray[Any]
    image_ids: list[str]
    item_ids: list[str] | None = None
    brands: list[str | None] | None = None
    sizes: list[int | None] | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def columns(self) -> dict[str, list[Any]]:
        """Returns the columns that rules may name, and the ids."""
        n = len(self)
        return {
            "image_id": self.image_ids,
            "item_id": self.item_ids or self.image_ids,
            "brand": self.brands or [None] * n,
            "size": self.sizes or [None] * n,
        }


def scattered_ids(n: int) -> list[str]:
    """Returns n different ids whose order is not that of the rows."""
    return [f"i{row * 7919 % 100_003}" for row in range(n)]


def gaussian_catalogue(n: int, dim: int, seed: int = 0, duplicates: float = 0.0) -> Catalogue:
    """Random directions; a share of the rows are copies of the first one. Brands a, b and null."""
    vectors = np.random.default_rng(seed).normal(size=(n, dim))
    vectors[n // 2 : n // 2 + int(n * duplicates)] = vectors[0]
    brands = [("a", "b", None)[row * 5 % 7 % 3] for row in range(n)]
    sizes = [(1, 2, None, 3)[row // 2 % 4] for row in range(n)]
    return Catalogue(vectors, scattered_ids(n), brands=brands, sizes=sizes)


def clustered_catalogue(n: int, dim: int, centres: int, seed: int = 0) -> Catalogue:
    """Directions around a few centres, as a trained index expects them."""
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(centres, dim))
    vectors = middle[rng.integers(centres, size=n)] + 0.5 * rng.normal(size=(n, dim))
    return Catalogue(vectors, scattered_ids(n))


def write_embeddings(
    folder: Path, catalogue: Catalogue, parts: int = 3, normalize: bool = True
) -> list[Part]:
    """Writes an embeddings dataset with a few row groups a part, without a manifest."""
    vectors, valid = unit_float16(catalogue.vectors)
    assert valid.all() or not normalize
    vectors = vectors if normalize else catalogue.vectors.astype(np.float32)
    columns_beside = (("brand", "string"), ("size", "int64"))
    schema = EmbeddingSchema(vectors.shape[1], columns_beside, normalize)
    origin = {
        "content_sha256": b"0" * 32,
        "source_shard": "source",
        "row": 0,
        "width": 1,
        "height": 1,
        "format": "png",
    }
    cuts = np.linspace(0, len(catalogue), parts + 1).astype(int)
    folder.mkdir(parents=True)
    written = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        columns = {name: values[start:stop] for name, values in catalogue.columns().items()}
        columns |= {name: [value] * (stop - start) for name, value in origin.items()}
        table = schema.table(vectors[start:stop], columns)
        name = f"part-{number:05d}"
        with embeddings.parquet_writer(str(folder / f"{name}.parquet"), table.schema) as writer:
            if len(table):
                writer.write_table(table, row_group_size=97)
        file = manifests.describe_file(str(folder), f"{name}.parquet")
        written.append(Part(name, "key", int(stop - start), (file,)))
    return written


def build_index(
    folder: Path,
    catalogue: Catalogue,
    request: IndexSpec = IndexSpec(),  # noqa: B008 (frozen)
    parts: int = 3,
    metadata: MetadataTable | None = None,
    normalize: bool = True,
) -> IndexDataset:
    """Builds `folder`/embeddings and `folder`/index, step by step as the pipeline does."""
    source, target = folder / "embeddings", folder / "index"
    written = write_embeddings(source, catalogue, parts, normalize)
    spec = request.resolve(len(catalogue), catalogue.vectors.shape[1])
    sample = sampling.read_sample(str(source), written, spec.sample, request.seed)
    trained = training.train_index(spec, sample)
    nprobe = min(spec.nprobe, trained.nlist)
    assigned = []
    for part in written:
        path = str(target / "_work" / f"assigned-{part.name}.parquet")
        assigned_parts.assign_part(embeddings.read_part(str(source), part), trained, nprobe, path)
        assigned.append(path)
    list_sizes = [assigned_parts.assigned_list_sizes(path, trained.nlist) for path in assigned]
    sizes = np.sum(list_sizes, axis=0)
    layout = sharding.plan_layout(sizes, spec.shards)
    training.save_trained(str(target / shards.TRAINED_NAME), trained)
    sharding.save_layout(str(target / shards.LAYOUT_NAME), layout)
    files = [
        manifests.describe_file(str(target), name) for name in (shards.TRAINED_NAME, shards.LAYOUT_NAME)
    ]
    built = [Part(shards.SHARED_PART, "key", 0, tuple(files))]
    built += [
        shards.build_shard(
            str(target), number, layout, trained, assigned, "key", metadata, with_codes=spec.has_codes
        )
        for number in range(layout.shards)
    ]
    properties = {
        "nprobe": nprobe, "nlist": trained.nlist, "seed": request.seed, "refine": spec.refine,
    }  # fmt: skip
    manifest = Manifest(shards.KIND, "fingerprint", {}, [], tuple(built), properties)
    manifests.commit(str(target), manifest)
    return shards.open_index(str(target))


def join_all(index: IndexDataset, spec: JoinSpec) -> pa.Table:
    """Runs every join task and returns the rows of all parts, in order, in one chunk a column."""
    tables = [join_shard(index, number, spec) for number in range(index.layout.shards)]
    return pa.concat_tables(tables).combine_chunks()


def write_neighbors(folder: Path, tables: list[pa.Table]) -> list[Part]:
    """Writes neighbours parts, one table each."""
    folder.mkdir(parents=True)
    parts = []
    for number, table in enumerate(tables):
        name = f"part-{number:05d}"
        pq.write_table(table, folder / f"{name}.parquet")
        file = manifests.describe_file(str(folder), f"{name}.parquet")
        parts.append(Part(name, "key", len(table), (file,)))
    return parts


def parquet_bytes(table: pa.Table) -> bytes:
    """Returns the bytes of a table as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class BruteForce:
    """The right answer, computed from the catalogue in float64 without the join's own code.

    `scores` float32 [n, n] of every pair of rows of the catalogue, `allowed` bool [n, n]; of the
    candidates that share a value of `item_ids`, a query keeps the best.
    """

    image_ids: list[str]
    scores: NDArray[np.float32]
    allowed: NDArray[np.bool_]
    item_ids: list[str]

    def neighbors(self, k: int) -> dict[str, tuple[list[str], list[float]]]:
        """Returns the k best ids and scores by query id: score descending, then id bytes."""
        encoded = [image_id.encode() for image_id in self.image_ids]
        rank = np.empty(len(encoded), dtype=np.int64)
        rank[sorted(range(len(encoded)), key=encoded.__getitem__)] = np.arange(len(encoded))
        found = {}
        for row, image_id in enumerate(self.image_ids):
            candidates = np.flatnonzero(self.allowed[row])
            order = np.lexsort((rank[candidates], -self.scores[row, candidates]))
            ranked = candidates[order]
            items = [self.item_ids[other] for other in ranked]
            first = [place for place, item in enumerate(items) if item not in items[:place]]
            best = ranked[first[:k]]
            found[image_id] = (
                [self.image_ids[other] for other in best],
                self.scores[row, best].tolist(),
            )
        return found


def brute_force(
    index: IndexDataset,
    catalogue: Catalogue,
    rules: JoinRules = JoinRules(),  # noqa: B008 (frozen)
    nprobe: int | None = None,
) -> BruteForce:
    """Scores every pair of a catalogue; with `nprobe`, only pairs in the lists a query probes."""
    unit, _ = unit_float16(catalogue.vectors)
    codes = index.trained.transform.apply(unit).astype(np.float64)
    norms = (codes * codes).sum(axis=1)
    scores = (codes @ codes.T / np.sqrt(norms[:, None] * norms[None, :])).astype(np.float32)
    columns = catalogue.columns()
    items = np.asarray(columns["item_id"], dtype=object)
    allowed = items[:, None] != items[None, :]
    for name in rules.same:
        value = np.asarray(columns[name], dtype=object)
        known = np.asarray([v is not None for v in value])
        allowed &= (value[:, None] == value[None, :]) & known[:, None] & known[None, :]
    for name in rules.different:
        value = np.asarray(columns[name], dtype=object)
        known = np.asarray([v is not None for v in value])
        allowed &= ~((value[:, None] == value[None, :]) & known[:, None] & known[None, :])
    if nprobe is not None:
        affinity = codes @ index.trained.centroids.astype(np.float64).T
        # Scores are kept as float32; lists tie in that precision and go by number.
        nearest = np.argsort(-affinity.astype(np.float32), axis=1, kind="stable")
        probed = np.zeros(affinity.shape, dtype=bool)
        np.put_along_axis(probed, nearest[:, :nprobe], True, axis=1)
        allowed &= probed[:, nearest[:, 0]]
    return BruteForce(catalogue.image_ids, scores, allowed, items.tolist())


def found_neighbors(table: pa.Table) -> dict[str, tuple[list[str], list[float]]]:
    """Returns the neighbours of a join as `BruteForce.neighbors` does."""
    rows = zip(
        table["query_id"].to_pylist(),
        table["neighbor_ids"].to_pylist(),
        table["scores"].to_pylist(),
        strict=True,
    )
    return {query: (ids, scores) for query, ids, scores in rows}
