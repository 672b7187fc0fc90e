"""hnswlib: a graph built on all cores, every vector searched for, ef tuned to a recall.

`ip` distance over unit vectors; M and ef_construction as its authors use them for such data. There are
no lists to assign: search only and the whole differ by the reading, building and writing.
"""

from importlib.metadata import version

import hnswlib
import numpy as np
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

LINKS, EF_CONSTRUCTION = 16, 200
EFS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


def main() -> None:
    """Builds, tunes and searches once."""
    options = parser(__doc__).parse_args()
    clock = Clock()
    with clock.stage("read"):
        vectors = read_vectors(options.data)
    index = hnswlib.Index("ip", vectors.shape[1])
    index.set_num_threads(options.threads)
    with clock.stage("build"):
        index.init_index(len(vectors), M=LINKS, ef_construction=EF_CONSTRUCTION, random_seed=0)
        index.add_items(vectors)
    with clock.stage("write"):
        index.save_index(str(options.out / "graph.bin"))

    def search(rows: NDArray[np.int64], ef: int) -> NDArray[np.int64]:
        index.set_ef(ef)
        return np.asarray(index.knn_query(vectors[rows], options.k + 1)[0]).astype(np.int64)

    efs = [ef for ef in EFS if ef > options.k]
    ef = tune(options.data, options.target, options.k, efs, search)
    found, rows, queries = timed_search(
        clock, options.data, len(vectors), options.search_seconds, lambda rows: search(rows, ef)
    )
    peak = peak_bytes()
    report(
        clock.stages, recall=recall(options.data, found, options.k, rows), peak_bytes=peak,
        note=f"M {LINKS}, ef_construction {EF_CONSTRUCTION}, ef {ef}, {queries}",
        versions={"hnswlib": version("hnswlib")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
