"""Searching an index for a few new vectors, with the scores and the order of the join."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.assignment import nearest_lists
from index_builder.join import JoinSpec, Queries, lookup_rows, search_shards
from index_builder.rules import OWN_ITEM, JoinRules
from index_builder.shards import IndexDataset
from index_builder.topk import TopK
from index_builder.vectors import squared_norms


def search_vectors(
    index: IndexDataset, vectors: NDArray[np.float16], k: int, nprobe: int | None = None
) -> TopK:
    """Finds the k nearest rows of the index for new vectors, float16 [n, encoder_dim], unit length.

    The vectors go through the index's stored transform first. `nprobe` defaults to the index's own.
    The result's `rows` are rows of the index.
    """
    codes = index.trained.transform.apply(vectors)
    probes = nearest_lists(codes, index.trained.centroids, nprobe or index.nprobe)
    # A new image is no item of the catalogue: a null item is different from every other.
    table = pa.table({OWN_ITEM: pa.nulls(len(codes), pa.string())})
    queries = Queries.build(codes, squared_norms(codes), probes, table, JoinRules())
    return search_shards(index, queries, JoinSpec(k=k))


def describe_neighbors(
    index: IndexDataset, top: TopK, columns: tuple[str, ...]
) -> list[list[dict[str, object]]]:
    """Returns, for each query, its neighbours best first: rank, image_id, score and columns."""
    results: list[list[dict[str, object]]] = []
    for scores, rows, count in zip(top.scores, top.rows, top.counts, strict=True):
        found = lookup_rows(index, rows[:count], ("image_id", *columns)).to_pylist()
        results.append(
            [
                {"rank": rank, "score": float(score)} | row
                for rank, (score, row) in enumerate(zip(scores, found, strict=False), start=1)
            ]
        )
    return results
