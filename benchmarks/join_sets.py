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

    def catalogue(
        self, about: dict[str, Any], seed: int, shards: int | None = None, nlist: int | None = None
    ) -> Catalogue:
        """Builds Kith's index of a set by `kith build`, and one of a few rows of the same dim.

        `about` is what `vectors` returned; `nlist` is `lists_of` its rows unless it is given.
        """
        nlist = lists_of(about["rows"]) if nlist is None else nlist
        settings = {"nlist": nlist, "nprobe": min(self._nprobe, nlist), "seed": seed}
        if shards is not None:
            settings["shards"] = shards
        index = self.build(about, settings)
        centroids = str(self._folder / "indexes" / f"{Path(index).name}.npy")
        command = [sys.executable, "-m", "benchmarks.join_parts", "export-centroids"]
        exported = run_for_json([*command, "--index", index, "--out", centroids], TIMEOUT_SEC)
        # Training may have dropped centroids that were equal.
        nlist = int(exported["nlist"])
        tiny = self.tiny(about["dim"])
        return Catalogue(about, seed, nlist, min(self._nprobe, nlist), index, centroids, tiny)

    def tiny(self, dim: int, **settings: Any) -> str:
        """Builds an index of a few rows, which loads what a search needs; `settings` of `index`."""
        about = self.vectors(f"{TINY_ROWS}x{dim}", 0)
        return self.build(about, {"nlist": 4, "nprobe": 4, "seed": 0, **settings})

    def build(
        self, about: dict[str, Any], settings: dict[str, Any], k: int = 20, min_recall: float = 0.0
    ) -> str:
        """Builds an index by `kith build` with `settings` of `index`; returns its folder.

        What they leave open Kith chooses for `k` neighbours and that recall (0: none is promised).
        """
        source = os.path.join(about["folder"], "embeddings")
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        told += f", recall {min_recall:g}" * bool(min_recall)
        self._say(f"{about['name']}: kith build, {told}: kept or made now")
        config = {"index": settings, "join": {"k": k}, "evaluate": {"min_recall": min_recall}}
        found = run_kith("build", ["--embeddings", source], config, self._folder / "indexes")
        return str(found.result["index"])
