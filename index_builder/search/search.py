"""Searching an index for a few new vectors, with the scores and the order of the join."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.errors import ConfigError
from index_builder.index.assignment import nearest_lists
from index_builder.index.shards import IndexDataset
from index_builder.rules.rules import OWN_ITEM, JoinRules
from index_builder.scoring.topk import TopK
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.vectors import squared_norms
from index_builder.search.join import JoinSpec, Queries, lookup_rows, search_shards


def search_vectors(
    index: IndexDataset, vectors: NDArray[np.floating[Any]], k: int, nprobe: int | None = None
) -> TopK:
    """Finds the k nearest items of an index for vectors [n, encoder_dim], as its encoder makes them.

    They go through the index's stored transform first. Of an item with several images the best is
    found. `nprobe` defaults to the index's own. The result's `rows` are rows of the index. Raises
    ConfigError for more lists than the index has, DatasetError for vectors that it cannot take.
    """
    trained = index.trained
    lists = index.nprobe if nprobe is None else nprobe
    if not 1 <= lists <= trained.nlist:
        raise ConfigError(
            f"nprobe is {lists}, but the index {index.folder} has {trained.nlist} lists. Search 1 to "
            f"{trained.nlist} of them."
        )
    codes = trained.transform.apply(vectors)
    probes = nearest_lists(codes, trained.centroids, lists, trained.metric)
    # A new image is no item of the catalogue: a null item is different from every other.
    table = pa.table({OWN_ITEM: pa.nulls(len(codes), pa.string())})
    queries = Queries.build(
        VectorRows.of(codes),
        squared_norms(codes),
        probes,
        table,
        JoinRules(),
        single_images=index.single_images,
    )
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
