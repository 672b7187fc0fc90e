"""Deciding about proposals: the rows that codes proposed are scored exactly, by their vectors.

Vectors are read where they are mapped, list by list, for all queries of a thread that proposed some of
the list. What is entered in the heaps is the same in any order.
"""

import functools

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.index.shards import IndexDataset, IndexShard, open_shard
from index_builder.rules.rules import QueryCodes, RuleEncoder
from index_builder.scoring.blocks import Block, IdColumn, PreparedQueries
from index_builder.scoring.intrinsics import half_dot
from index_builder.scoring.scores import exact_score
from index_builder.scoring.tiles import Heaps, id_precedes
from index_builder.scoring.topk import TopK
from index_builder.scoring.vector_rows import RowArrays
from index_builder.search.compressed_search import query_ranges


def decide(
    index: IndexDataset,
    queries: Block[QueryCodes],
    probes: NDArray[np.int32],
    encoder: RuleEncoder,
    proposed: tuple[NDArray[np.int64], NDArray[np.int64]],
    columns: tuple[str, ...],
    top: TopK,
    threads: int | None = None,
) -> None:
    """Scores what `Proposals.finish` returned, exactly, and enters it in `top`.

    Slot i of `top` is query i; `columns` are those that `encoder` reads of a shard. Memory: ids, norms
    and caps of one shard, whose vectors are mapped, and 16 bytes for each proposal of the queries that
    a thread is at.
    """
    rows, counts = proposed
    prepared = PreparedQueries.of(queries)
    offsets = index.layout.shard_offsets
    touched = _touched_shards(rows, counts, offsets)
    with query_ranges(probes, 16 * rows.shape[1], threads) as run:
        for number in np.flatnonzero(touched):
            wanted = ("image_id", *columns, "squared_norm")
            with open_shard(index, int(number), wanted) as shard:
                corpus = _Corpus(shard, encoder)
                run(functools.partial(_settle, corpus, prepared, rows, counts, top))
            encoder.bound_caps(top.cap_codes)


class _Corpus:
    """A shard made ready for scoring some of its rows.

    `list_of_row` int32 [rows] counts the `lists` of the shard from its first.
    """

    def __init__(self, shard: IndexShard, encoder: RuleEncoder) -> None:
        self.shard = shard
        self.vectors, self.norms = shard.vectors(), shard.squared_norms()
        self.caps = encoder.encode_candidates(shard.table, shard.first_row).caps
        self.ids: IdColumn = shard.ids()
        bounds = [shard.layout.list_rows(shard.number, number) for number in shard.lists]
        sizes = [stop - start for start, stop in bounds]
        self.lists = len(sizes)
        self.list_of_row = np.repeat(np.arange(self.lists, dtype=np.int32), sizes)


def _settle(
    corpus: _Corpus,
    queries: PreparedQueries,
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    top: TopK,
    asked: NDArray[np.int64],
) -> None:
    """Enters what a range of the queries has proposed of a shard, list by list."""
    owners, found = _group_pairs(
        rows, counts, asked, corpus.shard.first_row, corpus.list_of_row, corpus.lists
    )
    _enter_pairs(
        owners, found, queries.arrays.vectors, queries.arrays.norms,
        corpus.vectors.arrays, corpus.norms, corpus.shard.first_row,
        corpus.caps, corpus.ids.data, corpus.ids.offsets,
        top.metric.code, top.unscale, top.caps, top.heaps,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _touched_shards(
    rows: NDArray[np.int64], counts: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tells which shards own a row of `rows`, bool [shards]."""
    touched = np.zeros(offsets.shape[0] - 1, dtype=np.bool_)
    first, last = 0, 0
    for q in range(rows.shape[0]):
        for place in range(counts[q]):
            row = rows[q, place]
            # Most often it is in the shard of the row before.
            if not first <= row < last:
                shard = np.searchsorted(offsets, row, side="right") - 1
                first, last = offsets[shard], offsets[shard + 1]
                touched[shard] = True
    return touched


@njit(cache=True, nogil=True)
def _group_pairs(
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    asked: NDArray[np.int64],
    first_row: int,
    list_of_row: NDArray[np.int32],
    lists: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups the proposals of some queries that are in a shard by list.

    Returns each pair's query and its row, counted from the shard's first.
    """
    size = list_of_row.shape[0]
    offsets = np.zeros(lists + 1, dtype=np.int64)
    for slot in asked:
        for place in range(counts[slot]):
            row = rows[slot, place] - first_row
            if 0 <= row < size:
                offsets[list_of_row[row] + 1] += 1
    offsets = np.cumsum(offsets)
    ends = offsets[:-1].copy()
    owners = np.empty(offsets[-1], dtype=np.int64)
    found = np.empty(offsets[-1], dtype=np.int64)
    for slot in asked:
        for place in range(counts[slot]):
            row = rows[slot, place] - first_row
            if 0 <= row < size:
                number = list_of_row[row]
                owners[ends[number]], found[ends[number]] = slot, row
                ends[number] += 1
    return owners, found


@njit(cache=True, nogil=True, error_model="numpy")
def _enter_pairs(
    owners: NDArray[np.int64],
    found: NDArray[np.int64],
    q_vectors: RowArrays,
    q_norms: NDArray[np.float64],
    x_vectors: RowArrays,
    x_norms: NDArray[np.float64],
    first_row: int,
    x_caps: NDArray[np.int32],
    id_data: NDArray[np.uint8],
    id_offsets: NDArray[np.int64],
    metric: int,
    unscale: float,
    caps: NDArray[np.int64],
    heaps: Heaps,
) -> None:
    """Scores pairs of a shard exactly and enters them in the heaps, as `tiles.offer_tile` does.

    Pair p is query `owners[p]` and row `found[p]` of the shard.
    """
    scores, rows, counts, places = heaps.scores, heaps.rows, heaps.counts, heaps.places
    ids, id_lengths, kept_caps = heaps.ids, heaps.id_lengths, heaps.caps
    k, dim = scores.shape[1], q_vectors.dim
    q_bits, x_bits = q_vectors.bits.ctypes.data, x_vectors.bits.ctypes.data
    for p in range(owners.shape[0]):
        slot, x = owners[p], found[p]
        dot = half_dot(q_bits + 2 * q_vectors.starts[slot], x_bits + 2 * x_vectors.starts[x], dim)
        score = exact_score(metric, unscale, dot, q_norms[slot], x_norms[x])
        count = counts[slot]
        if count == k and score < scores[slot, k - 1]:
            continue
        id_start, id_stop = id_offsets[x], id_offsets[x + 1]
        # Which kept entry has to go: the worst of the innermost full group, if any is full.
        out = k - 1 if count == k else -1
        for cap in range(caps.shape[0]):
            value = x_caps[cap, x]
            if value < 0:
                continue
            kept, last = 0, -1
            for rank in range(count):
                if kept_caps[cap, slot, places[slot, rank]] == value:
                    kept += 1
                    last = rank
            if kept >= caps[cap]:
                out = last
                break
        if out >= 0:
            place = places[slot, out]
            if score < scores[slot, out] or (
                score == scores[slot, out]
                and not id_precedes(
                    id_data, id_start, id_stop, ids, slot, place, id_lengths[slot, place]
                )
            ):
                continue
            rank = out
        else:
            place, rank = np.int32(count), count
            counts[slot] = count + 1
        while rank > 0:
            before = places[slot, rank - 1]
            if score < scores[slot, rank - 1] or (
                score == scores[slot, rank - 1]
                and not id_precedes(
                    id_data, id_start, id_stop, ids, slot, before, id_lengths[slot, before]
                )
            ):
                break
            scores[slot, rank], rows[slot, rank] = scores[slot, rank - 1], rows[slot, rank - 1]
            places[slot, rank] = before
            rank -= 1
        scores[slot, rank], rows[slot, rank], places[slot, rank] = score, first_row + x, place
        id_lengths[slot, place] = id_stop - id_start
        for byte in range(id_stop - id_start):
            ids[slot, place, byte] = id_data[id_start + byte]
        for cap in range(caps.shape[0]):
            kept_caps[cap, slot, place] = x_caps[cap, x]
