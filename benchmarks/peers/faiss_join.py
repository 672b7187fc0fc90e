"""FAISS: every vector's neighbours by `IndexIVFFlat`, by `big_batch_search`, or by `faiss.knn`.

`--work search`: the lists are filled with given centroids and every query's lists are assigned before
the clock starts. `--work whole`: train (FAISS's own defaults), add, write the index file, search.
An item's own row is among its results: they ask for k + 1.
"""

from pathlib import Path

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search
from faiss.contrib.ivf_tools import search_preassigned
from numpy.typing import NDArray

from benchmarks.peers.neighbors import (
    Clock,
    parser,
    peak_bytes,
    read_vectors,
    recall,
    report,
    timed_search,
)

METHODS = ("ivf", "batch", "knn")
# Exact search beyond so many operations is measured on the first rows and multiplied.
EXACT_OPERATIONS = 5e12


def main() -> None:
    """Runs one method once."""
    options = parser(__doc__)
    options.add_argument("--method", choices=METHODS, required=True)
    options.add_argument("--work", choices=("search", "whole"), required=True)
    options.add_argument("--threaded", type=int, default=0, help="of big_batch_search: 0, 1 or 2")
    chosen = options.parse_args()
    faiss.omp_set_num_threads(chosen.threads)
    clock = Clock()
    with clock.stage("read"):
        vectors = read_vectors(chosen.data)
    if chosen.method == "knn":
        exact(chosen.data, vectors, chosen.k, clock)
        return
    note = f"{chosen.nprobe} of {chosen.nlist} lists"
    if chosen.work == "search":
        index, lists = filled_index(chosen.centroids, vectors, chosen.nprobe)
        note += ", preassigned"
        clock.stages.clear()
    else:
        index, lists = built_index(chosen.out, vectors, chosen.nlist, chosen.nprobe, clock), None
    rows = None
    if chosen.method == "batch":
        given = None if lists is None else lists.astype(np.int32)
        # Its gain is that queries share lists, so a sample of them would do it wrong.
        with clock.stage("search"):
            _, found = big_batch_search(
                index, vectors, chosen.k + 1, threaded=chosen.threaded, q_assign=given
            )
        note += f", threaded {chosen.threaded}"
    else:

        def search(some: slice | NDArray[np.int64]) -> NDArray[np.int64]:
            if lists is None:
                return np.asarray(index.search(vectors[some], chosen.k + 1)[1])
            return np.asarray(search_preassigned(index, vectors[some], chosen.k + 1, lists[some])[1])

        found, rows, queries = timed_search(
            clock, chosen.data, len(vectors), chosen.search_seconds, search
        )
        note += f", {queries}"
    peak = peak_bytes()
    if lists is None:
        lists = index.quantizer.search(vectors, index.nprobe)[1]
    # Of all queries, also where a sample was searched for.
    pairs = int(np.bincount(lists[:, 0], minlength=index.nlist)[lists].sum())
    report(
        clock.stages, recall=recall(chosen.data, found, chosen.k, rows), peak_bytes=peak, pairs=pairs,
        note=note, versions={"faiss-cpu": faiss.__version__},
    )  # fmt: skip


def filled_index(
    path: Path, vectors: NDArray[np.float32], nprobe: int
) -> tuple[faiss.IndexIVFFlat, NDArray[np.int64]]:
    """Returns an index over given centroids, and the nprobe nearest lists of every vector."""
    centroids = np.load(path).astype(np.float32)
    quantizer = faiss.IndexFlatIP(centroids.shape[1])
    quantizer.add(centroids)
    index = faiss.IndexIVFFlat(quantizer, *centroids.shape[::-1], faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.nprobe = min(nprobe, len(centroids))
    # Threads share the queries out; by default only `search` does that, not `search_preassigned`.
    index.parallel_mode = 3
    _, lists = quantizer.search(vectors, index.nprobe)
    nearest = np.ascontiguousarray(lists[:, 0])
    index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(nearest))
    return index, lists


def built_index(
    out: Path, vectors: NDArray[np.float32], nlist: int, nprobe: int, clock: Clock
) -> faiss.IndexIVFFlat:
    """Trains, fills and writes an index as FAISS's own examples do."""
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], nlist, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = nprobe
    with clock.stage("train"):
        index.train(vectors)
    with clock.stage("add"):
        index.add(vectors)
    with clock.stage("write"):
        faiss.write_index(index, str(out / "index.faiss"))
    return index


def exact(data: Path, vectors: NDArray[np.float32], k: int, clock: Clock) -> None:
    """Searches every pair; the first rows only, and multiplied, where that would take too long."""
    rows, dim = vectors.shape
    queries = min(rows, max(k, int(EXACT_OPERATIONS / (2 * dim * rows))))
    with clock.stage("search", share=queries / rows):
        _, found = faiss.knn(vectors[:queries], vectors, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
    peak = peak_bytes()
    note = "all pairs" if queries == rows else f"all pairs; {queries:,} queries, multiplied"
    reached = recall(data, found, k, np.arange(queries))
    report(
        clock.stages, recall=reached, peak_bytes=peak, note=note,
        versions={"faiss-cpu": faiss.__version__},
    )  # fmt: skip


if __name__ == "__main__":
    main()
