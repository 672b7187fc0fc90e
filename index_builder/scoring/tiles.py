"""The inner loops of a join: a tile of fast products comes in, exact scores enter the heaps."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import WIDE, half_dot, passing_mask, prefetch, trailing_zeros
from index_builder.scoring.key_order import MOST_RANKED, sort_keys
from index_builder.scoring.metrics import Metric
from index_builder.scoring.scores import (
    Scoring,
    exact_score,
    least_key,
    slack,
    threshold,
)
from index_builder.scoring.vector_rows import RowArrays

_COSINE = Metric.COSINE.code

# Rows of a tile whose heaps are fetched together.
GROUP = 16
# Rows longer than this times k are worth a first threshold of their own.
_STAGED = 3
# Of a query's vector, fetched with its heap; the CPU fetches the rest by itself.
_FETCHED_BYTES = 512
# Halvings of the range of scores in search of a first threshold.
_BISECTIONS = 20
# Below any length of a vector that is not zero.
_TINY = np.float32(2.0**-30)


class Heaps(NamedTuple):
    """The k best of each of n queries, best first.

    `scores` float32 and `rows` int64 [n, k] are in order of rank, `counts` int64 [n] says how many.
    Ids and capped values stay where they are written: `places` int32 [n, k] says where those of a
    rank are. `ids` uint8 [n, k, bytes], `id_lengths` int32 [n, k], `caps` int32 [c, n, k]. `bounds`
    float32 [n, 2] are the (a, b) of `threshold` for the worst kept score, (0, -inf) while there is
    room.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    places: NDArray[np.int32]
    ids: NDArray[np.uint8]
    id_lengths: NDArray[np.int32]
    caps: NDArray[np.int32]
    bounds: NDArray[np.float32]


class QueryArrays(NamedTuple):
    """What decides about n queries; see Block and QueryCodes.

    `lengths` float32 [n] are the roots of `norms`.
    """

    vectors: RowArrays
    norms: NDArray[np.float64]
    lengths: NDArray[np.float32]
    same: NDArray[np.int32]
    different: NDArray[np.int32]
    excluded_offsets: NDArray[np.int64]
    excluded: NDArray[np.int32]


class CandidateArrays(NamedTuple):
    """What decides about n candidates; see Block, CandidateCodes, IdColumn.

    Distinct vector r belongs to the rows `runs[r]` to `runs[r + 1]`, int64; `lengths` and `halves`,
    float32 [runs], are its |x| and |x|^2 / 2.
    """

    vectors: RowArrays
    lengths: NDArray[np.float32]
    halves: NDArray[np.float32]
    runs: NDArray[np.int64]
    norms: NDArray[np.float64]
    same: NDArray[np.int32]
    different: NDArray[np.int32]
    excluded: NDArray[np.int32]
    caps: NDArray[np.int32]
    eligible: NDArray[np.bool_]
    id_data: NDArray[np.uint8]
    id_offsets: NDArray[np.int64]


@njit(cache=True, nogil=True)
def _collect(
    fast: NDArray[np.float32],
    row: int,
    lengths: NDArray[np.float32],
    offsets: NDArray[np.float32],
    a: np.float32,
    b: np.float32,
    found: NDArray[np.int32],
    count: int,
) -> int:
    """Writes the columns of a row that pass f - a u >= b + v to `found`, from `count` on.

    Returns where they end. Rows are not sliced: a slice counts a reference, in memory that threads
    share.
    """
    columns = fast.shape[1]
    whole = columns - columns % WIDE
    f, u, v = fast.ctypes.data + 4 * row * columns, lengths.ctypes.data, offsets.ctypes.data
    for first in range(0, whole, WIDE):
        passing = passing_mask(f + 4 * first, u + 4 * first, v + 4 * first, a, b)
        while passing != 0:
            found[count] = first + trailing_zeros(passing)
            count += 1
            passing &= passing - np.uint32(1)
    for j in range(whole, columns):
        if fast[row, j] - a * lengths[j] >= b + offsets[j]:
            found[count] = j
            count += 1
    return count


@njit(cache=True, nogil=True)
def _provisional(
    fast: NDArray[np.float32],
    row: int,
    lengths: NDArray[np.float32],
    offsets: NDArray[np.float32],
    cosine: bool,
    bound: float,
    wanted: int,
) -> tuple[np.float32, np.float32]:
    """A test (a, b) that `wanted` products pass, and about twice as many at most: by bisection.

    With nothing to compare with yet, it finds the best of a row faster than sorting would. `bound`
    is of f / u (cosine) or f - v (the others).
    """
    low, high = np.float32(-bound), np.float32(bound)
    lowest = low
    zero = np.float32(0.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / np.float32(2)
        a, b = (middle, zero) if cosine else (zero, middle)
        count = 0
        for j in range(np.uint64(fast.shape[1])):
            count += fast[row, j] - a * lengths[j] >= b + offsets[j]
        if count < wanted:
            high = middle
        else:
            low = middle
            if count <= 2 * wanted:
                break
    # From -bound on everything passes, whatever the rounding.
    if low == lowest:
        return zero, np.float32(-np.inf)
    return (low, zero) if cosine else (zero, low)


@njit(cache=True, nogil=True)
def excludes(excluded: NDArray[np.int32], low: int, high: int, code: int) -> bool:
    """Tells whether ascending codes contain one."""
    while low < high:
        middle = (low + high) // 2
        if excluded[middle] < code:
            low = middle + 1
        elif excluded[middle] > code:
            high = middle
        else:
            return True
    return False


@njit(cache=True, nogil=True)
def id_precedes(
    data: NDArray[np.uint8],
    start: int,
    stop: int,
    kept: NDArray[np.uint8],
    slot: int,
    place: int,
    length: int,
) -> bool:
    """Tells whether data[start:stop] sorts before kept[slot, place, :length], byte by byte."""
    for i in range(min(stop - start, length)):
        if data[start + i] != kept[slot, place, i]:
            return bool(data[start + i] < kept[slot, place, i])
    return stop - start < length


@njit(cache=True, nogil=True, error_model="numpy")
def offer_tile(
    fast: NDArray[np.float32],
    errors: NDArray[np.float32],
    scoring: Scoring,
    slots: NDArray[np.int64],
    query_rows: NDArray[np.int64],
    queries: QueryArrays,
    lengths: NDArray[np.float32],
    offsets: NDArray[np.float32],
    first_run: int,
    first_row: int,
    candidates: CandidateArrays,
    caps: NDArray[np.int64],
    heaps: Heaps,
    found: NDArray[np.int32],
    keys: NDArray[np.float32],
) -> tuple[int, int]:
    """Scores exactly what may enter the heaps, and enters it.

    Returns how many pairs were scored, and how many of them had to be: they entered, or a cap kept them
    out.

    Row i of the products `fast` [m, n] is row `query_rows[i]` of the queries and slot `slots[i]` of the
    heaps; column j is run `first_run + j` of the candidates, whose rows are numbered from `first_row`
    in the whole index, of length `lengths[j]` and with `offsets[j]` (|x|^2 / 2 for euclidean, else 0).
    `errors[i]` bounds how far the products of row i are off, relative to the lengths of their vectors.
    `found` and `keys` are scratch of at least (GROUP + 1) n and n numbers, n padded to WIDE.

    The kept entries are the best set under the caps, whatever the order of the offers: groups are
    nested, an item's images in those of its brand, so the sets that are allowed are the independent
    sets of a laminar matroid. There the best set stays best when a new element replaces the worst
    one of the innermost group that is full (the whole heap is the outermost).

    One function, and arrays unpacked once: a call that passes this many arrays costs more than a row.
    Heaps lie far apart in memory, so those of a group of rows are fetched while the group is tested.
    """
    q_vectors, q_norms, q_lengths, q_same, q_different, q_excluded_offsets, q_excluded = queries
    (
        x_vectors,
        _,
        _,
        runs,
        x_norms,
        x_same,
        x_different,
        x_excluded,
        x_caps,
        eligible,
        id_data,
        id_offsets,
    ) = candidates
    scores, rows, counts, places, ids, id_lengths, kept_caps, bounds = heaps
    metric, unscale = scoring
    k = scores.shape[1]
    columns = fast.shape[1]
    least, most, offset = lengths.min(), lengths.max(), offsets.max()
    cosine = metric == _COSINE
    rescored, needed = 0, 0
    scores_address, rows_address = scores.ctypes.data, rows.ctypes.data
    places_address, lengths_address = places.ctypes.data, id_lengths.ctypes.data
    caps_address = kept_caps.ctypes.data
    bounds_address, q_lengths_address = bounds.ctypes.data, q_lengths.ctypes.data
    q_bits_address, q_norms_address = q_vectors.bits.ctypes.data, q_norms.ctypes.data
    x_bits_address = x_vectors.bits.ctypes.data
    q_starts, x_starts = q_vectors.starts, x_vectors.starts
    dim = q_vectors.dim
    fetched = min(2 * dim, _FETCHED_BYTES)
    for i in range(min(GROUP, fast.shape[0])):
        prefetch(bounds_address + 8 * slots[i])
        prefetch(q_lengths_address + 4 * query_rows[i])
    ends = np.empty(GROUP, dtype=np.int64)
    ranks, ranked = np.empty(MOST_RANKED, dtype=np.int32), np.empty(MOST_RANKED, dtype=np.int32)
    ranked_keys = np.empty(MOST_RANKED, dtype=np.float32)
    for group in range(0, fast.shape[0], GROUP):
        group_end = min(group + GROUP, fast.shape[0])
        end = 0
        for i in range(group_end, min(group_end + GROUP, fast.shape[0])):
            prefetch(bounds_address + 8 * slots[i])
            prefetch(q_lengths_address + 4 * query_rows[i])
        for i in range(group, group_end):
            slot = slots[i]
            a, b = bounds[slot, 0], bounds[slot, 1]
            start = end
            if b > -np.inf:
                q_length = q_lengths[query_rows[i]]
                a -= errors[i] * q_length
                b = np.float32(b - slack(a, b, q_length, most, offset))
                end = _collect(fast, i, lengths, offsets, a, b, found, end)
            ends[i - group] = end
            if end > start or b == -np.inf:
                for line in range(0, 4 * k, 64):
                    prefetch(scores_address + slot * 4 * k + line)
                    prefetch(places_address + slot * 4 * k + line)
                    prefetch(lengths_address + slot * 4 * k + line)
                    if caps.shape[0] > 0:
                        prefetch(caps_address + slot * 4 * k + line)
                for line in range(0, 8 * k, 64):
                    prefetch(rows_address + slot * 8 * k + line)
                prefetch(q_norms_address + 8 * query_rows[i])
                q_address = q_bits_address + 2 * q_starts[query_rows[i]]
                for line in range(0, fetched, 64):
                    prefetch(q_address + line)
                for c in range(start, end):
                    x_address = x_bits_address + 2 * x_starts[runs[first_run + found[c]]]
                    for line in range(0, fetched, 64):
                        prefetch(x_address + line)
        for i in range(group, group_end):
            base = ends[i - group - 1] if i > group else 0
            left = ends[i - group] - base
            slot, q = slots[i], query_rows[i]
            b0 = bounds[slot, 1]
            full = b0 > -np.inf
            if full and left == 0:
                continue
            q_norm, q_length = q_norms[q], q_lengths[q]
            error = errors[i] * q_length
            a = bounds[slot, 0] - error
            off = slack(a, b0, q_length, most, offset) if full else 0.0
            b = np.float32(b0 - off)
            first_a, first_b = a, b
            floor = least_key(cosine, a, b0, off, least, most, offset) if full else np.float32(-np.inf)
            staged = not full and columns > _STAGED * k
            if not full:
                base = end
                if staged:
                    bound = 1.1 if cosine else 1.1 * np.sqrt(q_norm) * most + offset
                    first_a, first_b = _provisional(
                        fast, i, lengths, offsets, cosine, bound, k + k // 8 + 1
                    )
                    left = _collect(fast, i, lengths, offsets, first_a, first_b, found, base) - base
                else:
                    left = columns
                    for j in range(columns):
                        found[base + j] = j
            for stage in range(1 + staged):
                if stage == 1:
                    # What the first test left out and the heap, now as good as full, still lets in.
                    left = _collect(fast, i, lengths, offsets, a, b, found, base) - base
                    others = 0
                    for c in range(left):
                        j = found[base + c]
                        if not fast[i, j] - first_a * lengths[j] >= first_b + offsets[j]:
                            found[base + others] = j
                            others += 1
                    left = others
                for c in range(left):
                    j = found[base + c]
                    keys[c] = fast[i, j] / max(lengths[j], _TINY) if cosine else fast[i, j] - offsets[j]
                # The best first, so that the threshold rises before the rest is looked at.
                sort_keys(keys, found, base, left, ranks, ranked_keys, ranked)
                for c in range(left):
                    if keys[c] < floor:
                        break
                    j = found[base + c]
                    if full and fast[i, j] - a * lengths[j] < b + offsets[j]:
                        continue
                    scored, entered, capped = False, False, False
                    score = np.float32(0.0)
                    run = runs[first_run + j]
                    for x in range(run, runs[first_run + j + 1]):
                        # Rules: is the pair allowed?
                        allowed = eligible[x]
                        for rule in range(q_same.shape[0]):
                            code = q_same[rule, q]
                            allowed &= code >= 0 and code == x_same[rule, x]
                        for rule in range(q_different.shape[0]):
                            code = q_different[rule, q]
                            allowed &= code < 0 or code != x_different[rule, x]
                        if allowed and x_excluded[x] >= 0:
                            low, high = q_excluded_offsets[q], q_excluded_offsets[q + 1]
                            allowed = not excludes(q_excluded, low, high, x_excluded[x])
                        if not allowed:
                            continue
                        if not scored:
                            dot = half_dot(
                                q_bits_address + 2 * q_starts[q],
                                x_bits_address + 2 * x_starts[run],
                                dim,
                            )
                            score = exact_score(metric, unscale, dot, q_norm, x_norms[x])
                            scored = True
                            rescored += 1
                        count = k if full else counts[slot]
                        id_start, id_stop = id_offsets[x], id_offsets[x + 1]
                        # Which kept entry has to go: the worst of the innermost full group, if any is.
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
                                    id_data,
                                    id_start,
                                    id_stop,
                                    ids,
                                    slot,
                                    place,
                                    id_lengths[slot, place],
                                )
                            ):
                                # Rows of a run are in the order of ids: the rest is no better.
                                if out == k - 1:
                                    break
                                capped = True
                                continue
                            rank = out
                        else:
                            place, rank = np.int32(count), count
                            counts[slot] = count + 1
                            full = count + 1 == k
                        while rank > 0:
                            before = places[slot, rank - 1]
                            if score < scores[slot, rank - 1] or (
                                score == scores[slot, rank - 1]
                                and not id_precedes(
                                    id_data,
                                    id_start,
                                    id_stop,
                                    ids,
                                    slot,
                                    before,
                                    id_lengths[slot, before],
                                )
                            ):
                                break
                            scores[slot, rank] = scores[slot, rank - 1]
                            rows[slot, rank] = rows[slot, rank - 1]
                            places[slot, rank] = before
                            rank -= 1
                        scores[slot, rank], rows[slot, rank], places[slot, rank] = (
                            score,
                            first_row + x,
                            place,
                        )
                        id_lengths[slot, place] = id_stop - id_start
                        first_byte = np.uint64(id_start)
                        for byte in range(np.uint64(id_stop - id_start)):
                            ids[slot, place, byte] = id_data[first_byte + byte]
                        for cap in range(caps.shape[0]):
                            kept_caps[cap, slot, place] = x_caps[cap, x]
                        entered = True
                    needed += entered or capped
                    if entered and full:
                        a, b0 = threshold(scoring, np.float64(scores[slot, k - 1]), q_norm)
                        bounds[slot, 0], bounds[slot, 1] = a, b0
                        a -= error
                        off = slack(a, b0, q_length, most, offset)
                        b = np.float32(b0 - off)
                        floor = least_key(cosine, a, b0, off, least, most, offset)
    return rescored, needed
