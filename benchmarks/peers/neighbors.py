"""What the join's peers share: the vectors, the clock, recall, and the report. Needs numpy only."""

import argparse
import contextlib
import json
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
    """Seconds of the stages of one measurement, in the order in which they began."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a block and adds it to a stage."""
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


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


def peak_bytes() -> int:
    """Returns the most memory that this process has held so far (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(stages: dict[str, float], **more: Any) -> None:
    """Prints what the benchmark reads: one JSON object on the last line."""
    print(json.dumps({"stages": stages, **more}), flush=True)
