"""autofaiss: the index that it chooses, built and tuned by it, then every vector searched for.

It gets the vectors in memory, and half of the machine's free memory for the index. Its own tuning (the
best recall in 10 ms a query) belongs to building, but its searches would take longer than exact ones:
its main parameter (nprobe or efSearch) is set to the least that reaches the target recall.
"""

import os
from importlib.metadata import version

import faiss
import numpy as np
from autofaiss import build_index
from numpy.typing import NDArray

from benchmarks.peers.neighbors import (
    Clock,
    parser,
    peak_bytes,
    read_vectors,
    recall,
    report,
    timed_search,
    tune,
)

SETTINGS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


def main() -> None:
    """Builds, tunes and searches once."""
    options = parser(__doc__).parse_args()
    faiss.omp_set_num_threads(options.threads)
    clock = Clock()
    with clock.stage("read"):
        vectors = read_vectors(options.data)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    with clock.stage("build"):
        index, about = build_index(
            vectors, save_on_disk=False, metric_type="ip", max_index_memory_usage=f"{free // 2}MB",
            current_memory_available=f"{free}MB", nb_cores=options.threads, verbose=40,
        )  # fmt: skip
    with clock.stage("write"):
        faiss.write_index(index, str(options.out / "knn.index"))
    space = faiss.ParameterSpace()
    space.initialize(index)
    names = [space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())]
    name = next((name for name in ("efSearch", "nprobe") if name in names), None)

    def search(rows: NDArray[np.int64], setting: int) -> NDArray[np.int64]:
        if name is not None:
            space.set_index_parameter(index, name, setting)
        found: NDArray[np.int64] = index.search(vectors[rows], options.k + 1)[1]
        return found

    setting = tune(options.data, options.target, options.k, list(SETTINGS), search)
    found, rows, queries = timed_search(
        clock, options.data, len(vectors), options.search_seconds, lambda rows: search(rows, setting)
    )
    peak = peak_bytes()
    tuned = "nothing to set" if name is None else f"{name} {setting}"
    report(
        clock.stages, recall=recall(options.data, found, options.k, rows), peak_bytes=peak,
        note=f"{about['index_key']}, {tuned}, {queries}",
        versions={
            "autofaiss": version("autofaiss"), "faiss-cpu of autofaiss": version("faiss-cpu"),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
