"""What the parts of `benchmarks.join` share: options, log, sets, and the processes that need Kith."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.join_figures import KITH, KITH_BYTE, KITH_HALF, SEARCH, Run, run_of
from benchmarks.join_log import Log
from benchmarks.join_options import LARGE_ROWS
from benchmarks.join_runs import Catalogue
from benchmarks.join_sets import TIMEOUT_SEC, Sets
from benchmarks.peer_runs import SkippedError, run_for_json

# How often a short measurement that is compared with another takes its turn.
SHORT_TURNS = 3


class Session:
    """One run of the benchmark; what its parts find goes to the log."""

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.options = options
        self.log = log
        self.sets = Sets(options.folder, options.nprobe, options.real, log.say)
        self.threads = len(os.sched_getaffinity(0))

    def seeds(self, size: str) -> tuple[int, ...]:
        """Returns the seeds of a set: all where it is made and not large, else the first."""
        seeds: tuple[int, ...] = self.options.seeds
        return seeds if self.sets.is_made(size) and rows_of(size) <= LARGE_ROWS else seeds[:1]

    def catalogue(self, size: str, seed: int, identical: float = 0.0) -> Catalogue:
        """Makes a set and its index ready, where they are not yet."""
        return self.sets.catalogue(self.sets.vectors(size, seed, identical), seed)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Makes a folder for the length of a block."""
        with tempfile.TemporaryDirectory(prefix="join-", dir=self.options.folder) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def skipping(self, name: str) -> Iterator[None]:
        """Turns what cannot be measured into a line that says why."""
        try:
            yield
        except SkippedError as reason:
            self.log.skip(name, str(reason))

    def part(self, part: str, *arguments: str) -> dict[str, Any]:
        """Runs a part of `benchmarks.join_parts` in a process of its own; returns what it printed."""
        command = [sys.executable, "-m", "benchmarks.join_parts", part, *arguments]
        command += ["--k", str(self.options.k), "--threads", str(self.threads)]
        return run_for_json(command, TIMEOUT_SEC)

    def add(
        self, about: dict[str, Any], seed: int, row: str, method: str, found: dict[str, Any]
    ) -> Run:
        """Keeps what was found of a set in a row by a method."""
        run = run_of(about, seed, row, method, found)
        self.log.add_run(run, found.get("versions", {}))
        return run

    def search(
        self,
        catalogue: Catalogue,
        methods: Sequence[str] = (KITH, KITH_HALF, KITH_BYTE),
        row: str = SEARCH,
    ) -> None:
        """Measures the search of Kith's library alone."""
        given = ["--data", catalogue.about["folder"], "--index", catalogue.index]
        given += ["--warm", catalogue.tiny]
        for precision, method in (
            ("float32", KITH),
            ("bfloat16", KITH_HALF),
            ("int8", KITH_BYTE),
        ):
            if method in methods:
                with self.skipping(f"{method}, {row}, {catalogue.about['name']}"):
                    found = self.part("search", *given, "--precision", precision)
                    self.add(catalogue.about, catalogue.seed, row, method, found)


def rows_of(size: str) -> int:
    """Returns the rows of a size such as 200000x256."""
    return int(size.partition("x")[0])
