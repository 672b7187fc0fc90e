"""The sets of vectors of `benchmarks.join` and Kith's indexes of them, made once and kept.

Both live in the benchmarks' folder. `kith build` itself finds that an index is there, by its
fingerprint, so one that other code would build differently is built again.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.join_options import SAMPLE
from benchmarks.join_runs import Catalogue, lists_of, run_kith
from benchmarks.peer_runs import ROOT, run_for_json

TINY_ROWS = 512
TIMEOUT_SEC = 3600


class Sets:
    """Makes sets and catalogues below a folder; `say` takes lines for people."""

    def __init__(
        self, folder: Path, nprobe: int, real: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._nprobe = nprobe
        self._real = real
        self._say = say

    def is_made(self, size: str) -> bool:
        """Tells whether a set is made by the recipe: it is neither real nor of the sample."""
        return size != SAMPLE and size not in self._real

    def vectors(self, size: str, seed: int, identical: float = 0.0) -> dict[str, Any]:
        """Makes a set where it is not yet: of the recipe, of the sample, or of a dataset."""
        command = [sys.executable, "-m", "benchmarks.vectors", "--seed", str(seed)]
        command += ["--folder", str(self._folder)]
        if size in self._real:
            command += ["--source", size]
        elif size == SAMPLE:
            command += ["--source", self._embed_sample()]
        else:
            rows, dim = size.split("x")
            command += ["--rows", rows, "--dim", dim, "--identical", str(identical)]
        self._say(f"{size}, seed {seed}: vectors, from the cache or made now")
        return run_for_json(command, TIMEOUT_SEC)

    def _embed_sample(self) -> str:
        """Embeds the repository's sample with the default encoder, once; returns the dataset."""
        catalog = os.path.join(ROOT, "samples", "catalog", "*.tfrecord")
        settings = {"images": {"sources": [{"format": "tfrecord", "paths": [catalog]}]}}
        found = run_kith("embed", [], settings, self._folder / "sample")
        return str(found.result["embeddings"])

    def catalogue(self, about: dict[str, Any], seed: int, shards: int | None = None) -> Catalogue:
        """Builds Kith's index of a set by `kith build`, and one of a few rows of the same dim.

        `about` is what `vectors` returned.
        """
        nlist = lists_of(about["rows"])
        index = self._build(about, nlist, min(self._nprobe, nlist), seed, shards)
        centroids = str(self._folder / "indexes" / f"{Path(index).name}.npy")
        command = [sys.executable, "-m", "benchmarks.join_parts", "export-centroids"]
        exported = run_for_json([*command, "--index", index, "--out", centroids], TIMEOUT_SEC)
        # Training may have dropped centroids that were equal.
        nlist = int(exported["nlist"])
        tiny = self._build(self.vectors(f"{TINY_ROWS}x{about['dim']}", 0), 4, 4, 0, None)
        return Catalogue(about, seed, nlist, min(self._nprobe, nlist), index, centroids, tiny)

    def _build(
        self, about: dict[str, Any], nlist: int, nprobe: int, seed: int, shards: int | None
    ) -> str:
        settings = {"index": {"nlist": nlist, "nprobe": nprobe, "seed": seed}}
        if shards is not None:
            settings["index"]["shards"] = shards
        source = os.path.join(about["folder"], "embeddings")
        self._say(f"{about['name']}, seed {seed}: kith build, {nlist} lists, kept or made now")
        found = run_kith("build", ["--embeddings", source], settings, self._folder / "indexes")
        return str(found.result["index"])
