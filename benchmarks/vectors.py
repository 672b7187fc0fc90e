"""Makes the vectors of the join's benchmark: embedding-like, seeded, once, into a cache folder.

The recipe, a mixture of many small clusters (REVISION and the constants below decide it):

1. Axis i of d has standard deviation i^-0.5 (variance falls as 1 / i, as networks' features have it).
2. One cluster for every 100 rows, of very different sizes (log-normal weights, sigma 1); 20 clusters
   are a family: a centre is its family's point (half of the variance) plus one of its own.
3. A row is its cluster's centre plus noise along the same axes, times the cluster's spread
   (log-normal around SPREAD).
4. A random rotation, unit length, float16 as Kith stores embeddings.

With `identical`, that share of the rows, at random places, becomes copies of row 0 (one placeholder
picture in many items). A set is a folder: `vectors.npy` float16 [n, d], `embeddings` (the same rows as
a Kith dataset), and `truth.npz`, the exact neighbours of a random sample of the rows.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.neighbors import TRUTH_NAME, VECTORS_NAME
from benchmarks.photographs import default_folder

DECAY = 0.5
CLUSTER_ROWS = 100
FAMILY_CLUSTERS = 20
SPREAD, SPREAD_SIGMA = 0.9, 0.25
# Raised when the same set gets other numbers than before.
REVISION = 1

TRUTH_QUERIES = 1000
TRUTH_DEPTH = 64
# The fast product proposes so many for the exact scores to choose from.
_TRUTH_CANDIDATES = 160
_BLOCK_ROWS = 16_384
_PART_ROWS = 65_536
EMBEDDINGS_FOLDER = "embeddings"


@dataclasses.dataclass(frozen=True)
class VectorSet:
    """A set of vectors: made by the recipe, or, with `content`, those of an embeddings dataset.

    `content` is the digest of that dataset.
    """

    rows: int
    dim: int
    seed: int = 0
    identical: float = 0.0
    content: str = ""

    @property
    def name(self) -> str:
        """What people call it."""
        text = f"{self.rows:,} x {self.dim}"
        if self.content:
            return text + ", real"
        return text + (f", {self.identical:.0%} identical" if self.identical else "")

    @property
    def folder_name(self) -> str:
        """The name of its folder: it changes with everything that decides the numbers."""
        decisive = [REVISION, DECAY, CLUSTER_ROWS, FAMILY_CLUSTERS, SPREAD, SPREAD_SIGMA]
        text = json.dumps([dataclasses.asdict(self), *decisive])
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"vectors-{self.rows}x{self.dim}-{self.seed}-{digest}"


class Mixture:
    """What all blocks of a set share: axes, clusters and the rotation."""

    def __init__(self, vectors: VectorSet) -> None:
        self._key = [REVISION, vectors.seed, vectors.dim]
        random = np.random.default_rng(self._key)
        deviations = np.arange(1, vectors.dim + 1) ** -DECAY
        self._deviations = (deviations / np.linalg.norm(deviations)).astype(np.float32)
        clusters = max(1, vectors.rows // CLUSTER_ROWS)
        families = max(1, clusters // FAMILY_CLUSTERS)
        points = random.normal(size=(families, vectors.dim))[random.integers(families, size=clusters)]
        centres = (points + random.normal(size=(clusters, vectors.dim))) * 0.5**0.5
        self._centres = (centres * self._deviations).astype(np.float32)
        self._spreads = (SPREAD * random.lognormal(0, SPREAD_SIGMA, clusters)).astype(np.float32)
        weights = random.lognormal(0, 1, clusters)
        self._shares = np.cumsum(weights / weights.sum())
        square = random.normal(size=(vectors.dim, vectors.dim))
        self._rotation = np.linalg.qr(square)[0].astype(np.float32)

    def block(self, number: int, rows: int) -> NDArray[np.float16]:
        """Returns a block of unit vectors, float16 [rows, d]; it depends on its number alone."""
        from index_builder.scoring.vectors import unit_float16

        random = np.random.default_rng([*self._key, number])
        drawn = np.searchsorted(self._shares, random.random(rows))
        clusters = np.minimum(drawn, len(self._shares) - 1)
        noise = random.standard_normal((rows, len(self._deviations)), dtype=np.float32)
        noise *= self._deviations * self._spreads[clusters, None]
        noise += self._centres[clusters]
        return unit_float16(noise @ self._rotation)[0]


def make_set(cache: Path, vectors: VectorSet, source: str | None = None) -> Path:
    """Makes a set below `cache`, whole or not at all, unless it is there; returns its folder.

    `source` is the embeddings dataset of a set that is not made by the recipe.
    """
    place = cache / vectors.folder_name
    if (place / "about.json").is_file():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=".writing-", dir=cache))
    try:
        if source is None:
            matrix = _write_mixture(writing / VECTORS_NAME, vectors)
        else:
            matrix = read_embeddings(source)
            np.save(writing / VECTORS_NAME, matrix)
        _write_embeddings(writing / EMBEDDINGS_FOLDER, matrix)
        np.savez(writing / TRUTH_NAME, **exact_neighbors(matrix, vectors.seed))
        (writing / "about.json").write_text(json.dumps(dataclasses.asdict(vectors)) + "\n")
        try:
            writing.rename(place)
        except OSError:
            if not (place / "about.json").is_file():
                raise  # Otherwise another run was faster.
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return place


def _write_mixture(path: Path, vectors: VectorSet) -> NDArray[np.float16]:
    """Writes `vectors.npy` block by block, on all cores, and returns it mapped."""
    shape = (vectors.rows, vectors.dim)
    matrix: NDArray[np.float16] = np.lib.format.open_memmap(path, "w+", np.dtype(np.float16), shape)
    mixture = Mixture(vectors)

    def fill(start: int) -> None:
        stop = min(start + _BLOCK_ROWS, vectors.rows)
        matrix[start:stop] = mixture.block(start // _BLOCK_ROWS, stop - start)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(fill, range(0, vectors.rows, _BLOCK_ROWS)))
    copies = int(vectors.rows * vectors.identical)
    if copies:
        random = np.random.default_rng([REVISION, vectors.seed, copies])
        matrix[random.choice(np.arange(1, vectors.rows), copies, replace=False)] = matrix[0]
    return matrix


def describe_embeddings(folder: str) -> tuple[int, int, str]:
    """Returns the rows, the dim and the digest of an embeddings dataset."""
    from index_builder.datasets import embeddings, manifests

    source = manifests.load(folder, embeddings.KIND)
    return source.rows, embeddings.load_dim(source), source.content


def read_embeddings(folder: str) -> NDArray[np.float16]:
    """Returns the vectors of an embeddings dataset, float16 [n, d]."""
    from index_builder.datasets import embeddings, manifests

    source = manifests.load(folder, embeddings.KIND)
    blocks = [
        embeddings.list_matrix(block["vector"])
        for part in source.parts
        for block in embeddings.read_part(folder, part, ["vector"])
        if len(block)
    ]
    return np.concatenate(blocks)


def _write_embeddings(folder: Path, matrix: NDArray[np.float16]) -> None:
    """Writes the rows as an embeddings dataset; `row` is the row of the matrix."""
    from index_builder.datasets import embeddings, manifests
    from index_builder.datasets.embeddings import EmbeddingSchema
    from index_builder.datasets.manifests import Manifest, Part

    folder.mkdir()
    schema = EmbeddingSchema(matrix.shape[1])
    constant = {"content_sha256": b"0" * 32, "source_shard": "", "width": 1, "height": 1, "format": ""}
    parts = []
    for number, first in enumerate(range(0, len(matrix), _PART_ROWS)):
        name = f"part-{number:05d}"
        last = min(first + _PART_ROWS, len(matrix))
        with embeddings.parquet_writer(str(folder / f"{name}.parquet"), schema.arrow()) as writer:
            for start in range(first, last, embeddings.ROW_GROUP_ROWS):
                rows = range(start, min(start + embeddings.ROW_GROUP_ROWS, last))
                ids = [f"vector-{row:09d}" for row in rows]
                columns: dict[str, Sequence[Any]] = {"image_id": ids, "item_id": ids, "row": rows}
                columns |= {key: [value] * len(rows) for key, value in constant.items()}
                writer.write_table(schema.table(matrix[rows.start : rows.stop], columns))
        file = manifests.describe_file(str(folder), f"{name}.parquet")
        parts.append(Part(name, "benchmark", last - first, (file,)))
    described = embeddings.describe_schema(schema.arrow())
    properties = {"dim": int(matrix.shape[1])}
    manifest = Manifest(embeddings.KIND, "benchmark", {}, described, tuple(parts), properties)
    manifests.commit(str(folder), manifest)


def exact_neighbors(matrix: NDArray[np.float16], seed: int) -> dict[str, NDArray[Any]]:
    """Returns the exact neighbours of a random sample of the rows, each row's own excluded.

    `queries` int64 [m], ascending; `scores` float64 [m, depth], the best cosines, best first.
    """
    from index_builder.datasets.sampling import sample_rows

    queries = sample_rows(len(matrix), TRUTH_QUERIES, seed)
    wide = matrix[queries].astype(np.float32)
    best = np.full((len(queries), 0), -np.inf, np.float32)
    rows = np.zeros(best.shape, np.int64)
    for start in range(0, len(matrix), _BLOCK_ROWS):
        block = matrix[start : start + _BLOCK_ROWS].astype(np.float32)
        fast = wide @ block.T
        own = np.flatnonzero((queries >= start) & (queries < start + len(block)))
        fast[own, queries[own] - start] = -np.inf
        numbers = np.broadcast_to(np.arange(start, start + len(block)), fast.shape)
        best, rows = np.hstack([best, fast]), np.hstack([rows, numbers])
        if best.shape[1] > _TRUTH_CANDIDATES:
            kept = np.argpartition(-best, _TRUTH_CANDIDATES, axis=1)[:, :_TRUTH_CANDIDATES]
            best, rows = (np.take_along_axis(each, kept, axis=1) for each in (best, rows))
    scores = np.full(best.shape, -np.inf)
    norms = np.linalg.norm(matrix[queries].astype(np.float64), axis=1)
    for i, query in enumerate(queries):
        found = matrix[rows[i]].astype(np.float64)
        exact = found @ matrix[query].astype(np.float64)
        scores[i] = exact / (norms[i] * np.linalg.norm(found, axis=1))
        scores[i, rows[i] == query] = -np.inf
    return {"queries": queries, "scores": -np.sort(-scores, axis=1)[:, :TRUTH_DEPTH]}


def main(arguments: list[str] | None = None) -> None:
    """Makes a set and prints one JSON object: its folder, rows and dim."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vectors", description=__doc__)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--dim", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--identical", type=float, default=0.0)
    parser.add_argument("--source", help="an embeddings dataset, instead of the recipe")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where to keep it")
    options = parser.parse_args(arguments)
    content = ""
    if options.source is not None:
        options.rows, options.dim, content = describe_embeddings(options.source)
    if options.rows < 2 or options.dim < 2:
        parser.error(f"got {options.rows} x {options.dim}, wanted at least 2 x 2 (--rows, --dim)")
    made = VectorSet(options.rows, options.dim, options.seed, options.identical, content)
    print(f"{made.name}, seed {made.seed}: from the cache or made now", file=sys.stderr)
    folder = make_set(options.folder, made, options.source)
    print(json.dumps({"folder": str(folder), "name": made.name, **dataclasses.asdict(made)}))


if __name__ == "__main__":
    main()
