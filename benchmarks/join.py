"""Times the join beside the limit of this machine's arithmetic and beside peers (`make bench-join`).

Everything is measured on the same vectors and cores, each measurement in a process of its own; nothing
is remembered from another machine, and no figure is a test. Every method finds the k best of every
vector, its own excluded; recall is measured against exact neighbours of 1,000 of them.

Search only: an index made beforehand, with the same centroids for Kith and FAISS, and every query's
lists assigned; from vectors: everything from reading the vectors to neighbours in memory, the index
written in between, each trained its own way.

Every measurement is printed as it is made. With `--runs FILE` it is also written there at once: the
parts (`--only`) may then run apart, and a run that was stopped is not lost; `--only none --runs FILE`
prints the tables of all of it.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.figures import describe_machine
from benchmarks.join_figures import (
    BATCH,
    COMMAND,
    IVF,
    KITH,
    LIBRARY,
    SEARCH,
    WHOLE,
    Product,
    Run,
    Summary,
    show,
)
from benchmarks.join_kith import measure_growth, measure_identical, measure_memory
from benchmarks.join_log import Log
from benchmarks.join_methods import measure_methods
from benchmarks.join_options import LARGE_ROWS, parse
from benchmarks.join_runs import JOIN_PEERS, Catalogue, empty, lists_of, run_kith
from benchmarks.join_session import SHORT_TURNS, Session
from benchmarks.join_sets import TIMEOUT_SEC
from benchmarks.peer_runs import Peer, StoppedError, make_environment, run_for_json
from benchmarks.products import LIBRARIES

# Peers are tuned to this share of Kith's recall, as Kith is held to it against theirs.
RECALL_SHARE = 0.999
# The ways to run big_batch_search: one thread prepares nothing, one list, or lists ahead.
BATCH_WAYS = (0, 1, 2)


class Bench:
    """One run of the parts that the options name; what they find goes to a log."""

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self._options = options
        self._log = log
        self._session = Session(options, log)
        self._threads = self._session.threads
        self._best_way: dict[int, int] = {}

    def run(self) -> None:
        """Measures size by size and seed by seed; what takes long comes last."""
        options, parts = self._options, self._options.only
        options.folder.mkdir(parents=True, exist_ok=True)
        if {"search", "vectors", "beam"} & set(parts):
            for size in (*options.sizes, *options.real):
                for number, seed in enumerate(self._session.seeds(size)):
                    with self._session.skipping(f"{size}, seed {seed}"):
                        self._rounds(self._session.catalogue(size, seed), first=number == 0)
        if "growth" in parts:
            measure_growth(self._session)
        if "methods" in parts:
            measure_methods(self._session)
        if "identical" in parts and options.identical:
            measure_identical(self._session)
        if "memory" in parts:
            measure_memory(self._session)
        if "peers" in parts:
            for size in (*options.sizes, *options.real):
                with self._session.skipping(f"peers, {size}"):
                    self._peers(self._session.catalogue(size, options.seeds[0]))

    # A catalogue of the table

    def _rounds(self, catalogue: Catalogue, first: bool) -> None:
        """Lets all methods take turns; what takes long runs once a size."""
        parts = self._options.only
        for number in range(self._options.rounds):
            once = first and number == 0
            if "search" in parts:
                self._limits(catalogue)
                self._session.search(catalogue)
                self._faiss_searches(catalogue, once)
            if "vectors" in parts:
                self._whole(catalogue)
                self._faiss_wholes(catalogue, once)
            if "beam" in parts:
                self._commands(catalogue)

    def _add(self, catalogue: Catalogue, row: str, method: str, found: dict[str, Any]) -> Run:
        return self._session.add(catalogue.about, catalogue.seed, row, method, found)

    def _limits(self, catalogue: Catalogue) -> None:
        """Measures the matrix products: every library once a dim, then the fastest again."""
        name, dim = catalogue.about["name"], catalogue.about["dim"]
        known = [product for product in self._log.products if product.dim == dim]
        libraries: Sequence[str] = LIBRARIES
        if known:
            precisions = {product.precision for product in known}
            libraries = list(
                {max((p for p in known if p.precision == each), key=lambda p: p.rate).library
                 for each in precisions}
            )  # fmt: skip
        for library in libraries:
            command = [sys.executable, "-m", "benchmarks.products", "--library", library]
            command += ["--dim", str(dim), "--threads", str(self._threads)]
            with self._session.skipping(f"product of {library}"):
                found = run_for_json(command, TIMEOUT_SEC)
                for precision, rate in found["rates"].items():
                    way = found["ways"][precision]
                    self._log.add_product(Product(name, precision, rate, library, way, dim))

    def _whole(self, catalogue: Catalogue) -> None:
        """Measures Kith's library from Parquet to neighbours."""
        about = catalogue.about
        with self._session.skipping(f"Kith, {WHOLE}, {about['name']}"), self._session.scratch() as out:
            found = self._session.part(
                "whole", "--data", about["folder"], "--warm", catalogue.tiny, "--out", str(out),
                "--nlist", str(lists_of(about["rows"])), "--nprobe", str(catalogue.nprobe),
                "--seed", str(catalogue.seed),
            )  # fmt: skip
            self._add(catalogue, WHOLE, KITH, found)

    def _commands(self, catalogue: Catalogue) -> None:
        """Measures the bare library call and `kith join`, Parquet in and out, and its start.

        They take turns: a start that happens to be slow would be half of a short join.
        """
        name, settings = catalogue.about["name"], {"join": {"k": self._options.k}}
        turns = SHORT_TURNS if catalogue.about["rows"] <= LARGE_ROWS else 1
        for _ in range(turns):
            with self._session.skipping(f"kith join, {name}"), self._session.scratch() as scratch:
                with empty(scratch / "library") as out:
                    found = self._session.part(
                        "library", "--index", catalogue.index, "--warm", catalogue.tiny,
                        "--out", str(out),
                    )  # fmt: skip
                    self._add(catalogue, LIBRARY, KITH, found)
                with empty(scratch / "tiny-join") as workspace:
                    start = run_kith("join", ["--index", catalogue.tiny], settings, workspace)
                with empty(scratch / "join") as workspace:
                    whole = run_kith("join", ["--index", catalogue.index], settings, workspace)
                work = max(0.0, whole.seconds - start.seconds)
                found = {
                    "stages": {"start": start.seconds, "work": work},
                    "peak_bytes": whole.peak_bytes,
                    "cpu_seconds": whole.cpu_seconds - start.cpu_seconds,
                    "note": "the process; start: a tiny index's",
                }
                self._add(catalogue, COMMAND, KITH, found)

    # FAISS

    def _faiss_searches(self, catalogue: Catalogue, once: bool) -> None:
        peers, name = self._options.peers, catalogue.about["name"]
        if "batch" in peers:
            self._batch_search(catalogue, once)
        if "ivf" in peers:
            with self._session.skipping(f"{IVF}, {name}"):
                self._add(catalogue, SEARCH, IVF, self._faiss_run(catalogue, "ivf", "search"))
        if "knn" in peers and once:
            with self._session.skipping(f"faiss.knn, {name}"):
                exact = self._faiss_run(catalogue, "knn", "search")
                for row in (SEARCH, WHOLE):
                    self._add(catalogue, row, "faiss.knn", exact)

    def _batch_search(self, catalogue: Catalogue, once: bool) -> None:
        """Measures big_batch_search: in all its ways once, later and where it is long in the best."""
        name, dim = catalogue.about["name"], catalogue.about["dim"]
        known = self._best_way.get(dim)
        every = known is None or (once and catalogue.about["rows"] <= LARGE_ROWS)
        found = {}
        for way in BATCH_WAYS if every else (known or 0,):
            with self._session.skipping(f"{BATCH}, threaded {way}, {name}"):
                found[way] = self._faiss_run(catalogue, "batch", "search", way)
        if found:
            best = min(found, key=lambda way: found[way]["stages"]["search"])
            self._best_way[dim] = best
            self._add(catalogue, SEARCH, BATCH, found[best])

    def _faiss_wholes(self, catalogue: Catalogue, once: bool) -> None:
        peers, name = self._options.peers, catalogue.about["name"]
        if "batch" in peers:
            with self._session.skipping(f"{BATCH}, {WHOLE}, {name}"):
                way = self._best_way.get(catalogue.about["dim"], BATCH_WAYS[0])
                self._add(catalogue, WHOLE, BATCH, self._faiss_run(catalogue, "batch", "whole", way))
        if "ivf" in peers and once:
            with self._session.skipping(f"{IVF}, {WHOLE}, {name}"):
                self._add(catalogue, WHOLE, IVF, self._faiss_run(catalogue, "ivf", "whole"))

    def _faiss_run(self, catalogue: Catalogue, method: str, work: str, way: int = 0) -> dict[str, Any]:
        more = ["--method", method, "--work", work, "--threaded", str(way)]
        return self._peer_run(sys.executable, "faiss_join", catalogue, more, TIMEOUT_SEC)

    def _peer_run(
        self, python: str, module: str, catalogue: Catalogue, more: Sequence[str], timeout_sec: float
    ) -> dict[str, Any]:
        """Runs a module of `benchmarks.peers` in a process of its own."""
        with self._session.scratch() as out:
            command = [python, "-m", f"benchmarks.peers.{module}", "--out", str(out)]
            command += ["--data", catalogue.about["folder"], "--centroids", catalogue.centroids]
            command += ["--nlist", str(catalogue.nlist), "--nprobe", str(catalogue.nprobe)]
            command += ["--search-seconds", str(self._options.search_seconds)]
            command += ["--k", str(self._options.k), "--threads", str(self._threads), *more]
            return run_for_json(command, timeout_sec)

    # Peers that have an environment of their own

    def _peers(self, catalogue: Catalogue) -> None:
        if not self._log.of(catalogue.about["name"], SEARCH, KITH):
            self._session.search(catalogue, (KITH,))  # Its recall is what they are tuned to.
        target = RECALL_SHARE * self._log.recall(catalogue.about["name"])
        for peer in JOIN_PEERS:
            if peer.name in self._options.peers:
                with self._session.skipping(f"{peer.title}, {catalogue.about['name']}"):
                    self._peer(catalogue, peer, target)

    def _peer(self, catalogue: Catalogue, peer: Peer, target: float) -> None:
        """Runs a peer; one process gives both rows. One that is stopped has taken so long at least."""
        self._log.say(f"{peer.title}: its environment, from the cache or made now")
        python = make_environment(self._options.folder, peer)
        try:
            found = self._peer_run(
                python, peer.module, catalogue, ["--target", str(target)], self._options.peer_seconds
            )
        except StoppedError as stopped:
            stages = stopped.stages()
            if not stages:
                raise
            note = f"at least: stopped after {self._options.peer_seconds:g} s"
            found = {"stages": stages, "note": note, "at_least": True}
            self._add(catalogue, WHOLE, peer.title, found)
            return
        for row in (SEARCH, WHOLE):
            self._add(catalogue, row, peer.title, found)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark; what was measured before it was interrupted is shown, too."""
    options = parse(arguments)
    machine = describe_machine()
    try:
        log = Log(options.runs, machine, Console(stderr=True))
    except ValueError as error:
        sys.exit(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        Bench(options, log).run()
    except KeyboardInterrupt:
        interrupted = True
        log.say("interrupted: what was measured until then follows", "yellow")
    summary = Summary(log.runs, log.products)
    machine["versions"] |= log.versions
    figures, ratios = summary.figures(), [*summary.ratios(), *log.ratios]
    if options.json:
        found = {
            "machine": machine,
            "figures": [figure.to_json() for figure in figures],
            "ratios": [dataclasses.asdict(ratio) for ratio in ratios],
            "runs": [dataclasses.asdict(run) for run in log.runs],
            "products": [dataclasses.asdict(product) for product in log.products],
            "skipped": log.skipped,
        }
        print(json.dumps(found))
    else:
        show(machine, figures, ratios, log.skipped, Console(width=150, soft_wrap=True))
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
