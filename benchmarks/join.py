"""Times the join beside the limit of this machine's arithmetic and beside peers (`make bench-join`).

Everything is measured in one run, on the same vectors and cores, each measurement in a process of its
own; nothing is remembered from another machine, and no figure is a test. Every method finds the k
best of every vector, its own excluded; recall is measured against exact neighbours of 1,000 of them.

Search only: an index made beforehand, with the same centroids for Kith and FAISS, and every query's
lists assigned; from vectors: everything from reading the vectors to neighbours in memory, the index
written in between, each trained its own way.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.embed import Ratio
from benchmarks.figures import Figure, describe_machine, show_figures, show_machine, speed
from benchmarks.join_figures import (
    BATCH,
    COMMAND,
    IVF,
    KITH,
    KITH_HALF,
    LIBRARY,
    SEARCH,
    WHOLE,
    Product,
    Run,
    Summary,
    run_of,
)
from benchmarks.join_options import SAMPLE, parse
from benchmarks.join_runs import JOIN_PEERS, Catalogue, empty, lists_of, run_kith
from benchmarks.peer_runs import ROOT, Peer, SkippedError, make_environment, run_for_json
from benchmarks.products import LIBRARIES

MEMORY_SHARDS = 4
IDENTICAL_TURNS = 3
TINY_ROWS = 512
TIMEOUT_SEC = 3600
# Peers are tuned to this share of Kith's recall, as Kith is held to it against theirs.
RECALL_SHARE = 0.999
# The ways to run big_batch_search: one thread prepares nothing, one list, or lists ahead.
BATCH_WAYS = (0, 1, 2)


class Bench:
    """One run of all measurements; runs, products and what was skipped pile up in it."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.runs: list[Run] = []
        self.products: list[Product] = []
        self.extra: list[Ratio] = []
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._options = options
        self._console = console
        self._threads = len(os.sched_getaffinity(0))
        self._tiny: dict[int, str] = {}
        self._kept = Path()
        self._best_way: dict[str, int] = {}

    def run(self) -> None:
        """Measures everything that the options ask for, size by size and seed by seed."""
        self._options.folder.mkdir(parents=True, exist_ok=True)
        with self._scratch() as self._kept:
            self._run()

    def _run(self) -> None:
        options = self._options
        for size in (*options.sizes, *options.real):
            made = "x" in size and size not in options.real
            for number, seed in enumerate(options.seeds if made else options.seeds[:1]):
                with self._scratch() as scratch, self._skipping(f"{size}, seed {seed}"):
                    catalogue = self._prepare(self._vectors(size, seed), seed, scratch)
                    self._rounds(catalogue, scratch, first=number == 0)
                    if made and number == 0 and options.identical:
                        self._identical(catalogue, size, scratch)
        if options.memory:
            self._memory(options.memory)

    # Preparing

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="join-", dir=self._options.folder) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def _skipping(self, name: str) -> Iterator[None]:
        """Turns what cannot be measured into a line that says why."""
        try:
            yield
        except SkippedError as reason:
            self.skipped[name] = str(reason)
            text = f"{name}: skipped: {reason}"
            self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def _vectors(self, size: str, seed: int, identical: float = 0.0) -> dict[str, Any]:
        """Makes a set where it is not yet: of the recipe, of the sample, or of a dataset."""
        command = [sys.executable, "-m", "benchmarks.vectors", "--seed", str(seed)]
        command += ["--folder", str(self._options.folder)]
        if size in self._options.real:
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
        workspace = self._options.folder / "sample"
        catalog = os.path.join(ROOT, "samples", "catalog", "*.tfrecord")
        settings = {"images": {"sources": [{"format": "tfrecord", "paths": [catalog]}]}}
        found = run_kith("embed", [], settings, workspace)
        return str(found.result["embeddings"])

    def _prepare(
        self, about: dict[str, Any], seed: int, scratch: Path, shards: int | None = None
    ) -> Catalogue:
        """Builds Kith's index of a set by `kith build`."""
        nlist = lists_of(about["rows"])
        nprobe = min(self._options.nprobe, nlist)
        name = f"{about['rows']}-{about['identical']}"
        index = self._build(about, nlist, nprobe, seed, scratch / f"index-{name}", shards)
        centroids = str(scratch / f"centroids-{name}.npy")
        exported = self._part("export-centroids", "--index", index, "--out", centroids)
        # Training may have dropped centroids that were equal.
        nlist = int(exported["nlist"])
        tiny = self._tiny_index(about["dim"])
        return Catalogue(about, seed, nlist, min(nprobe, nlist), index, centroids, tiny)

    def _tiny_index(self, dim: int) -> str:
        """Builds an index of a few rows of a dim, once a run."""
        if dim not in self._tiny:
            about = self._vectors(f"{TINY_ROWS}x{dim}", 0)
            self._tiny[dim] = self._build(about, 4, 4, 0, self._kept / f"tiny-{dim}", None)
        return self._tiny[dim]

    def _build(
        self, about: dict[str, Any], nlist: int, nprobe: int, seed: int, workspace: Path,
        shards: int | None,
    ) -> str:  # fmt: skip
        settings = {"index": {"nlist": nlist, "nprobe": nprobe, "seed": seed}}
        if shards is not None:
            settings["index"]["shards"] = shards
        source = os.path.join(about["folder"], "embeddings")
        self._say(f"{about['name']}: kith build, {nlist} lists")
        found = run_kith("build", ["--embeddings", source], settings, workspace)
        return str(found.result["index"])

    # Measuring

    def _rounds(self, catalogue: Catalogue, scratch: Path, first: bool) -> None:
        """Lets all methods take turns; what takes long runs once a size."""
        name = catalogue.about["name"]
        for number in range(self._options.rounds):
            once = first and number == 0
            self._limits(catalogue, everything=once)
            self._kith(catalogue, scratch)
            self._faiss(catalogue, once)
            self._commands(catalogue, scratch)
            if once:
                recalls = [run.recall for run in self._of(name, SEARCH, KITH) if run.recall]
                target = RECALL_SHARE * (recalls[0] if recalls else 1.0)
                for peer in JOIN_PEERS:
                    if peer.name in self._options.peers:
                        with self._skipping(f"{peer.title}, {name}"):
                            self._peer(catalogue, peer, target)

    def _of(self, name: str, row: str, method: str) -> list[Run]:
        return [run for run in self.runs if (run.set, run.row, run.method) == (name, row, method)]

    def _add(self, catalogue: Catalogue, row: str, method: str, found: dict[str, Any]) -> Run:
        run = run_of(catalogue.about, catalogue.seed, row, method, found)
        self.runs.append(run)
        self.versions |= found.get("versions", {})
        reached = f", recall {run.recall:.4f}" if run.recall is not None else ""
        self._say(f"{run.set}, seed {run.seed}: {row}: {method}: {run.seconds:.2f} s{reached}")
        return run

    def _limits(self, catalogue: Catalogue, everything: bool) -> None:
        """Measures the matrix products: every library at first, then the fastest again."""
        name, dim = catalogue.about["name"], catalogue.about["dim"]
        known = [product for product in self.products if product.set == name]
        libraries: Sequence[str] = LIBRARIES
        if known and not everything:
            libraries = list(
                {max((p for p in known if p.precision == each), key=lambda p: p.rate).library
                 for each in {p.precision for p in known}}
            )  # fmt: skip
        for library in libraries:
            command = [sys.executable, "-m", "benchmarks.products", "--library", library]
            command += ["--dim", str(dim), "--threads", str(self._threads)]
            with self._skipping(f"product of {library}"):
                found = run_for_json(command, TIMEOUT_SEC)
                for precision, rate in found["rates"].items():
                    way = found["ways"][precision]
                    self.products.append(Product(name, precision, rate, library, way))
                    self._say(f"{library}, {way}, {precision}: {rate / 1e9:,.0f} GFLOP/s")

    def _part(self, part: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.join_parts", part, *arguments]
        command += ["--k", str(self._options.k), "--threads", str(self._threads)]
        return run_for_json(command, TIMEOUT_SEC)

    def _kith(self, catalogue: Catalogue, scratch: Path) -> None:
        """Measures Kith's library: the search alone, and everything from Parquet on."""
        name, data = catalogue.about["name"], catalogue.about["folder"]
        given = ["--data", data, "--index", catalogue.index, "--warm", catalogue.tiny]
        for precision, method in (("float32", KITH), ("bfloat16", KITH_HALF)):
            with self._skipping(f"{method}, {SEARCH}, {name}"):
                found = self._part("search", *given, "--precision", precision)
                self._add(catalogue, SEARCH, method, found)
        with self._skipping(f"Kith, {WHOLE}, {name}"), empty(scratch / "whole") as out:
            found = self._part(
                "whole", "--data", data, "--warm", catalogue.tiny, "--out", str(out),
                "--nlist", str(lists_of(catalogue.about["rows"])),
                "--nprobe", str(catalogue.nprobe), "--seed", str(catalogue.seed),
            )  # fmt: skip
            self._add(catalogue, WHOLE, KITH, found)

    def _commands(self, catalogue: Catalogue, scratch: Path) -> None:
        """Measures the bare library call and `kith join`, Parquet in and out, and its start."""
        name = catalogue.about["name"]
        settings = {"join": {"k": self._options.k}}
        with self._skipping(f"kith join, {name}"):
            with empty(scratch / "library") as out:
                found = self._part(
                    "library", "--index", catalogue.index, "--warm", catalogue.tiny, "--out", str(out)
                )
                self._add(catalogue, LIBRARY, KITH, found)
            with empty(scratch / "tiny-join") as workspace:
                start = run_kith("join", ["--index", catalogue.tiny], settings, workspace)
            with empty(scratch / "join") as workspace:
                whole = run_kith("join", ["--index", catalogue.index], settings, workspace)
            stages = {"start": start.seconds, "work": max(0.0, whole.seconds - start.seconds)}
            found = {"stages": stages, "peak_bytes": whole.peak_bytes}
            self._add(catalogue, COMMAND, KITH, found | {"note": "the process; start: a tiny index's"})

    def _faiss(self, catalogue: Catalogue, once: bool) -> None:
        """Measures FAISS: big_batch_search in its fastest way, IndexIVFFlat, and exact search."""
        peers, name = self._options.peers, catalogue.about["name"]
        if "batch" in peers:
            ways = BATCH_WAYS if once else (self._best_way.get(name, BATCH_WAYS[0]),)
            found = {}
            for way in ways:
                with self._skipping(f"{BATCH}, threaded {way}, {name}"):
                    found[way] = self._faiss_run(catalogue, "batch", "search", way)
            if found:
                best = min(found, key=lambda way: found[way]["stages"]["search"])
                self._best_way[name] = best
                self._add(catalogue, SEARCH, BATCH, found[best])
                with self._skipping(f"{BATCH}, {WHOLE}, {name}"):
                    whole = self._faiss_run(catalogue, "batch", "whole", best)
                    self._add(catalogue, WHOLE, BATCH, whole)
        if "ivf" in peers:
            with self._skipping(f"{IVF}, {name}"):
                self._add(catalogue, SEARCH, IVF, self._faiss_run(catalogue, "ivf", "search"))
                if once:
                    self._add(catalogue, WHOLE, IVF, self._faiss_run(catalogue, "ivf", "whole"))
        if "knn" in peers and once:
            with self._skipping(f"faiss.knn, {name}"):
                exact = self._faiss_run(catalogue, "knn", "search")
                for row in (SEARCH, WHOLE):
                    self._add(catalogue, row, "faiss.knn", exact)

    def _faiss_run(self, catalogue: Catalogue, method: str, work: str, way: int = 0) -> dict[str, Any]:
        more = ["--method", method, "--work", work, "--threaded", str(way)]
        return self._peer_run(sys.executable, "faiss_join", catalogue, more)

    def _peer_run(
        self, python: str, module: str, catalogue: Catalogue, more: Sequence[str]
    ) -> dict[str, Any]:
        """Runs a module of `benchmarks.peers` in a process of its own."""
        with self._scratch() as out:
            command = [python, "-m", f"benchmarks.peers.{module}", "--out", str(out)]
            command += ["--data", catalogue.about["folder"], "--centroids", catalogue.centroids]
            command += ["--nlist", str(catalogue.nlist), "--nprobe", str(catalogue.nprobe)]
            command += ["--k", str(self._options.k), "--threads", str(self._threads), *more]
            return run_for_json(command, TIMEOUT_SEC)

    def _peer(self, catalogue: Catalogue, peer: Peer, target: float) -> None:
        """Runs a peer that has an environment of its own; one process gives both rows."""
        self._say(f"{peer.title}: its environment, from the cache or made now")
        python = make_environment(self._options.folder, peer)
        found = self._peer_run(python, peer.module, catalogue, ["--target", str(target)])
        for row in (SEARCH, WHOLE):
            self._add(catalogue, row, peer.title, found)

    def _identical(self, plain: Catalogue, size: str, scratch: Path) -> None:
        """Measures the search over a corpus of which a share is one picture, beside one without."""
        about = self._vectors(size, plain.seed, self._options.identical)
        catalogue = self._prepare(about, plain.seed, scratch)
        seconds: dict[str, list[float]] = {"plain": [], "identical": []}
        for _ in range(IDENTICAL_TURNS):
            for key, each in (("plain", plain), ("identical", catalogue)):
                with self._skipping(f"identical vectors, {size}"):
                    found = self._part(
                        "search", "--data", each.about["folder"], "--index", each.index,
                        "--warm", each.tiny,
                    )  # fmt: skip
                    seconds[key].append(found["stages"]["search"])
        if seconds["plain"] and seconds["identical"]:
            ratio = min(seconds["identical"]) / min(seconds["plain"])
            name = f"{about['name']} / without, Kith, {SEARCH}"
            self.extra.append(Ratio(name, ratio, "the fastest of each"))

    def _memory(self, sizes: Sequence[str]) -> None:
        """Measures the memory of one join task over sets of several sizes; a shard's rows stay."""
        peaks: list[tuple[str, int]] = []
        least = min(int(size.split("x")[0]) for size in sizes)
        for size in sizes:
            with self._scratch() as scratch, self._skipping(f"memory, {size}"):
                about = self._vectors(size, self._options.seeds[0])
                shards = round(MEMORY_SHARDS * about["rows"] / least)
                catalogue = self._prepare(about, self._options.seeds[0], scratch, shards)
                found = self._part("task", "--index", catalogue.index, "--warm", catalogue.tiny)
                peaks.append((about["name"], found["peak_bytes"]))
                note = (
                    f"one of {found['shards']} tasks, {found['queries']:,} queries; "
                    f"{found['base_bytes'] / 2**20:,.0f} MiB before it"
                )
                self.extra.append(
                    Ratio(f"peak memory of a join task, MiB, {size}", found["peak_bytes"] / 2**20, note)
                )
        for name, peak in peaks[1:]:
            text = f"peak memory of a join task, {name} / {peaks[0][0]}"
            self.extra.append(Ratio(text, peak / peaks[0][1]))


def show(
    machine: dict[str, Any], figures: list[Figure], ratios: list[Ratio], skipped: dict[str, str],
    console: Console,
) -> None:  # fmt: skip
    """Prints the figures, then the ratios, then what was skipped."""
    show_machine(machine, console)
    show_figures(figures, console)
    table = Table("ratio", "value", "note")
    for ratio in ratios:
        value = f"{ratio.value:.3f}" if ratio.value < 10 else speed(ratio.value)
        table.add_row(ratio.name, value, ratio.note)
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"skipped: {name}: {reason}", markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    bench = Bench(options, Console(stderr=True))
    bench.run()
    summary = Summary(bench.runs, bench.products)
    machine = describe_machine()
    machine["versions"] |= bench.versions
    figures, ratios = summary.figures(), [*summary.ratios(), *bench.extra]
    if options.json:
        found = {
            "machine": machine,
            "figures": [figure.to_json() for figure in figures],
            "ratios": [dataclasses.asdict(ratio) for ratio in ratios],
            "runs": [dataclasses.asdict(run) for run in bench.runs],
            "products": [dataclasses.asdict(product) for product in bench.products],
            "skipped": bench.skipped,
        }
        print(json.dumps(found))
    else:
        show(machine, figures, ratios, bench.skipped, Console(width=150, soft_wrap=True))


if __name__ == "__main__":
    main()
