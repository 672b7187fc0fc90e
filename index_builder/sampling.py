"""Seeded random samples of a dataset's rows, drawn over all of its parts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index_builder import embeddings
from index_builder.manifests import Part


def sample_rows(rows: int, sample: int, seed: int) -> NDArray[np.int64]:
    """Returns `sample` different row numbers below `rows`, ascending, the same for the same seed."""
    if sample >= rows:
        return np.arange(rows, dtype=np.int64)
    chosen = np.random.default_rng(seed).choice(rows, size=sample, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)


def read_sample(folder: str, parts: Sequence[Part], sample: int, seed: int) -> NDArray[np.float16]:
    """Reads a random sample of the vectors of a dataset, float16 [sample, dim].

    Every row of every part has the same chance; only row groups that hold a chosen row are read.
    """
    starts = np.cumsum([0] + [part.rows for part in parts])
    chosen = sample_rows(int(starts[-1]), sample, seed)
    blocks = []
    for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
        rows = chosen[(chosen >= start) & (chosen < stop)] - start
        if len(rows):
            table = embeddings.read_rows(folder, part, rows, ["vector"])
            blocks.append(embeddings.list_matrix(table["vector"]))
    return np.concatenate(blocks)
