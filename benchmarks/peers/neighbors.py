"""What the join's peers share: the vectors, the clock, recall, and the report. Needs numpy only."""

import argparse
import contextlib
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VECTORS_NAME = "vectors.npy"
TRUTH_NAME = "truth.npz"
# Neighbours whose scores differ by less are ties: float32 products tell them apart by chance.
TIE = 2e-6


class Clock:
    """Seconds of the stages of one measurement, in the order in which they began.

    It prints what it knows whenever a stage begins or ends, for whoever stops this process.
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.cpu_seconds = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, share: float = 1.0) -> Iterator[None]:
        """Times a block, which does `share` of a stage, and adds the whole to the stage."""
        self._tell(name)
        start, used = time.perf_counter(), time.process_time()
        yield
        seconds = (time.perf_counter() - start) / share
        self.stages[name] = self.stages.get(name, 0.0) + seconds
        self.cpu_seconds += (time.process_time() - used) / share
        self._tell(None)

    def _tell(self, running: str | None) -> None:
        known = {"stages": self.stages, "running": running, "at": time.time()}
        print(json.dumps({"clock": known}), flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that every peer is given."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--data", type=Path, required=True, help="a set of benchmarks.vectors")
    found.add_argument("--out", type=Path, required=True, help="an empty folder for an index")
    found.add_argument("--centroids", type=Path, help="float16 [nlist, d], for a search only")
    found.add_argument("--nlist", type=int, required=True)
    found.add_argument("--nprobe", type=int, required=True)
    found.add_argument("--k", type=int, required=True)
    found.add_argument("--target", type=float, default=0.0, help="recall to tune the search to")
    found.add_argument("--threads", type=int, required=True)
    found.add_argument(
        "--search-seconds", type=float, default=math.inf,
        help="a longer search is measured on a sample of the queries, and multiplied",
    )  # fmt: skip
    return found


def read_vectors(data: Path) -> NDArray[np.float32]:
    """Reads the vectors of a set, as peers take them."""
    vectors: NDArray[np.float32] = np.load(data / VECTORS_NAME).astype(np.float32)
    return vectors


def read_queries(data: Path) -> NDArray[np.int64]:
    """Returns the rows whose exact neighbours are known, ascending."""
    with np.load(data / TRUTH_NAME) as truth:
        queries: NDArray[np.int64] = truth["queries"]
    return queries


def recall(
    data: Path, found: NDArray[Any], k: int, rows: NDArray[np.int64] | None = None
) -> float | None:
    """Returns recall@k over the sampled rows: the share of the exact k best that were found.

    `found` holds row numbers, best first, [m, k or more], for `rows` [m] (default: all of the set,
    in order); a row's own number, repetitions and -1 do not count. A neighbour as good as the exact
    k-th is right. None where no row of the sample was searched for.
    """
    vectors = np.load(data / VECTORS_NAME, mmap_mode="r")
    with np.load(data / TRUTH_NAME) as truth:
        queries, scores = truth["queries"], truth["scores"]
    places = {int(row): i for i, row in enumerate(range(len(found)) if rows is None else rows)}
    shares = []
    for query, best in zip(queries, scores, strict=True):
        if int(query) not in places:
            continue
        ids = list(dict.fromkeys(found[places[int(query)]].tolist()))
        ids = [number for number in ids if number >= 0 and number != query][:k]
        wanted = best[:k][np.isfinite(best[:k])]
        mine, others = vectors[query].astype(np.float64), vectors[ids].astype(np.float64)
        norms = np.linalg.norm(mine) * np.linalg.norm(others, axis=1)
        right = int((others @ mine / norms >= wanted[-1] - TIE).sum())
        shares.append(min(right, len(wanted)) / len(wanted))
    return float(np.mean(shares)) if shares else None


def tune(
    data: Path,
    target: float,
    k: int,
    settings: list[Any],
    search: Callable[[NDArray[np.int64], Any], NDArray[Any]],
) -> Any:
    """Returns the first setting whose recall on the sampled rows reaches the target, else the last.

    `search` takes rows and a setting and returns row numbers [m, k or more]. Settings are ordered
    from fast to thorough. Tuning is not timed.
    """
    rows = read_queries(data)
    for setting in settings:
        reached = recall(data, search(rows, setting), k, rows)
        if reached is not None and reached >= target:
            return setting
    return settings[-1]


def timed_search(
    clock: Clock,
    data: Path,
    count: int,
    most_seconds: float,
    search: Callable[[Any], NDArray[Any]],
) -> tuple[NDArray[Any], NDArray[np.int64] | None, str]:
    """Searches for all `count` rows of a set, or for a sample where that would take too long.

    `search` takes a slice or row numbers. A first search, of the rows whose neighbours are known, is
    not timed and tells how long all would take; the time of a sample, which has those rows and random
    others, is multiplied. Returns what was found, the rows (None: all, in order), and a note.
    """
    pilot = read_queries(data)
    start = time.perf_counter()
    search(pilot)
    expected = (time.perf_counter() - start) * count / len(pilot)
    sample = max(len(pilot), int(count * most_seconds / expected)) if expected > most_seconds else count
    if sample >= count:
        with clock.stage("search"):
            return search(slice(None)), None, "all queries"
    others = np.setdiff1d(np.arange(count), pilot)
    drawn = np.random.default_rng(0).choice(others, sample - len(pilot), replace=False)
    rows = np.sort(np.concatenate([pilot, drawn]))
    with clock.stage("search", share=sample / count):
        found = search(rows)
    return found, rows, f"{sample:,} queries, multiplied"


def peak_bytes() -> int:
    """Returns the most memory that this process has held so far (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(stages: dict[str, float], **more: Any) -> None:
    """Prints what the benchmark reads: one JSON object on the last line."""
    print(json.dumps({"stages": stages, **more}), flush=True)
