"""ScaNN: tree, anisotropic hashing, reordering, batched over all cores; tuned to a recall.

The settings are those of its documentation for sets of this size: leaves as many as the lists of the
others, 2 dimensions a block, threshold 0.2. Leaves to search and the candidates that are reordered are
raised until the target is reached.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import scann
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

BLOCK_DIMS, THRESHOLD = 2, 0.2
TRAINING_ROWS = 250_000
# (leaves to search, candidates to reorder), both in multiples: of nprobe, and of k.
SETTINGS = ((0.5, 4), (1, 4), (1, 8), (1.5, 8), (2, 8), (2, 16), (4, 16), (4, 32), (8, 32))


def main() -> None:
    """Builds, tunes and searches once."""
    options = parser(__doc__).parse_args()
    clock = Clock()
    with clock.stage("read"):
        vectors = read_vectors(options.data)
    k = options.k + 1
    with clock.stage("build"):
        builder = scann.scann_ops_pybind.builder(vectors, k, "dot_product")
        builder.set_n_training_threads(options.threads)
        searcher = (
            builder.tree(
                num_leaves=options.nlist, num_leaves_to_search=options.nprobe,
                training_sample_size=min(len(vectors), TRAINING_ROWS),
            )
            .score_ah(BLOCK_DIMS, anisotropic_quantization_threshold=THRESHOLD)
            .reorder(4 * k)
            .build()
        )  # fmt: skip
    with clock.stage("write"):
        folder = Path(options.out) / "scann"
        folder.mkdir()
        searcher.serialize(str(folder))

    def search(rows: NDArray[np.int64] | slice, setting: tuple[float, int]) -> NDArray[np.int64]:
        leaves = min(options.nlist, max(1, round(setting[0] * options.nprobe)))
        found, _ = searcher.search_batched_parallel(
            vectors[rows], final_num_neighbors=k, leaves_to_search=leaves,
            pre_reorder_num_neighbors=setting[1] * k,
        )  # fmt: skip
        return found.astype(np.int64)

    searcher.set_num_threads(options.threads)
    setting = tune(options.data, options.target, options.k, list(SETTINGS), search)
    found, rows, queries = timed_search(
        clock, options.data, len(vectors), options.search_seconds, lambda rows: search(rows, setting)
    )
    peak = peak_bytes()
    report(
        clock.stages, recall=recall(options.data, found, options.k, rows), peak_bytes=peak,
        note=f"{setting[0]:g} nprobe leaves, {setting[1]} k reordered, {queries}",
        versions={"scann": version("scann")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
