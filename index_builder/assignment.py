"""Assigning vectors to inverted lists: which centroids are nearest, exactly and repeatably."""

import numpy as np
from numpy.typing import NDArray

from index_builder.rules import RuleCodes
from index_builder.topk import Block, IdColumn, TopK


def nearest_lists(
    vectors: NDArray[np.float16], centroids: NDArray[np.float16], nprobe: int
) -> NDArray[np.int32]:
    """Returns the nprobe nearest lists of each vector, nearest first, int32 [n, nprobe].

    Nearest by exact inner product, as FAISS's coarse quantizer ranks them; ties go to the lower
    list number.
    """
    count = len(centroids)
    top = TopK(len(vectors), nprobe, id_bytes=4)
    top.offer(
        np.arange(len(vectors)),
        plain_block(vectors),
        plain_block(centroids),
        IdColumn.numbers(count),
        first_row=0,
    )
    return top.rows.astype(np.int32)


def plain_block(vectors: NDArray[np.float16]) -> Block:
    """Wraps vectors so that their score is the inner product, without rules."""
    ones = np.ones(len(vectors))
    return Block(vectors.astype(np.float32), ones, RuleCodes.none(len(vectors)))
