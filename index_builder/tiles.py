"""The inner loops of a join: a tile of fast products comes in, exact scores enter the heaps.

The vectors are float16 of a length of about 1 at most, so norms and dot products are exact in float64
in any order of summation (see `vectors`). A score is one float32 rounding of a formula of them:

    cosine         dot / sqrt(nq nx)
    euclidean      -(nq + nx - 2 dot) unscale     minus the squared distance
    inner_product  dot unscale

`unscale` = 2^(-2 e) undoes the power-of-two scale 2^e that the index gave its vectors. All compiled
code that decides about a pair is in this file: Numba's cache notices changes of one file at a time.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.metrics import Metric

_COSINE = Metric.COSINE.code
_INNER_PRODUCT = Metric.INNER_PRODUCT.code

# Unit roundoff of float32.
_UNIT_ROUNDOFF = 2.0**-24
# Products that are compared with the threshold before anything else is decided.
_CHUNK = 64
# Rows longer than this times k are worth a first threshold of their own.
_STAGED = 3
# Halvings of the range of scores in search of a first threshold.
_BISECTIONS = 20


class Heaps(NamedTuple):
    """The k best of each of n queries, best first.

    `scores` float32 and `rows` int64 [n, k] are in order of rank, `counts` int64 [n] says how many.
    Ids and capped values stay where they are written: `places` int32 [n, k] says where those of a
    rank are. `ids` uint8 [n, k, bytes], `id_lengths` int32 [n, k], `caps` int32 [c, n, k].
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    places: NDArray[np.int32]
    ids: NDArray[np.uint8]
    id_lengths: NDArray[np.int32]
    caps: NDArray[np.int32]


class QueryArrays(NamedTuple):
    """What decides about n queries beside their vectors; see Block and QueryCodes."""

    norms: NDArray[np.float64]
    same: NDArray[np.int32]
    different: NDArray[np.int32]
    excluded_offsets: NDArray[np.int64]
    excluded: NDArray[np.int32]


class CandidateArrays(NamedTuple):
    """What decides about n candidates beside their vectors; see Block, CandidateCodes, IdColumn.

    Distinct vector r belongs to the rows `runs[r]` to `runs[r + 1]`, int64.
    """

    runs: NDArray[np.int64]
    norms: NDArray[np.float64]
    same: NDArray[np.int32]
    different: NDArray[np.int32]
    excluded: NDArray[np.int32]
    caps: NDArray[np.int32]
    eligible: NDArray[np.bool_]
    id_data: NDArray[np.uint8]
    id_offsets: NDArray[np.int64]


class Tile(NamedTuple):
    """A tile of fast products float32 [m, n] and what it was made of.

    `queries` and `corpus` are its vectors, float32 [m, d] and [n, d]; `lengths` and `offsets` are |x|
    and, for euclidean, |x|^2 / 2 (else 0) of the corpus vectors, float32 [n].
    """

    fast: NDArray[np.float32]
    queries: NDArray[np.float32]
    corpus: NDArray[np.float32]
    lengths: NDArray[np.float32]
    offsets: NDArray[np.float32]


class Scoring(NamedTuple):
    """How a tile is scored: Metric.code, unscale, and the error bound of the product."""

    metric: int
    unscale: float
    error: float


def error_bound(dim: int, unit_roundoff: float = 0.0) -> float:
    """Returns how far a fast dot product can be off, relative to |q| |x|.

    `unit_roundoff` is that of rounding the inputs (0 where the product takes float16 numbers as they
    are); sums are float32. Rounded inputs are off by 2 u + u^2 of |q| |x|, and summing them adds
    gamma_d = d v / (1 - d v), v = 2^-24, of what is summed, in any order (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1).
    """
    gamma = dim * _UNIT_ROUNDOFF / (1 - dim * _UNIT_ROUNDOFF)
    rounding = 2 * unit_roundoff + unit_roundoff**2
    return rounding + (1 + rounding) * gamma


@njit(cache=True, nogil=True, fastmath=True)
def exact_dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Dot product of float16 numbers; exact in any order of summation, so reordering is harmless.

    A product of two has 22 bits, so float32 holds it; only the sum needs float64. That halves the
    conversions, which are what takes the time.
    """
    total = 0.0
    for i in range(a.shape[0]):
        # Numba has one 64-bit float; NumPy's stubs have two.
        total += np.float64(a[i] * b[i])  # type: ignore[assignment]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def exact_score(metric: int, unscale: float, dot: float, q_norm: float, x_norm: float) -> np.float32:
    """The score of a pair from its exact dot product and squared norms.

    Never -0.0: which zero a sum of products gives depends on the order of summation.
    """
    if metric == _COSINE:
        # No index with zero vectors is built under cosine; a number is safer than NaN all the same.
        lengths = np.sqrt(q_norm * x_norm)
        return np.float32(dot / lengths + 0.0) if lengths > 0 else np.float32(0.0)
    if metric == _INNER_PRODUCT:
        return np.float32(dot * unscale + 0.0)
    # Minus the distance, so that equal vectors give +0.0.
    return np.float32((2 * dot - q_norm - x_norm) * unscale + 0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def admission(
    scoring: Scoring, worst: float, q_norm: float, least: float, most: float, offset: float
) -> tuple[np.float32, np.float32, np.float32]:
    """Which fast products f of a query may score `worst` or better: (a, b, floor).

    A corpus vector of length u and offset v is out when f < a u + (b + v) in float32 arithmetic.
    Whatever passes has f / u >= floor (cosine) or f - v >= floor (the others). `least` and `most`
    bound u, `offset` bounds v, of the corpus vectors that are tested.
    """
    if not np.isfinite(worst):
        return np.float32(0.0), np.float32(-np.inf), np.float32(-np.inf)
    metric, unscale, error = scoring
    length = np.sqrt(q_norm)
    # Scores are rounded to float32: half a unit in the last place, or of the smallest number.
    least_score = worst - abs(worst) * 2.0**-23 - 2.0**-148
    if metric == _COSINE:
        a, b = (least_score - error) * length, 0.0
    elif metric == _INNER_PRODUCT:
        a, b = -error * length, least_score / unscale
    else:
        a, b = -error * length, (q_norm + least_score / unscale) / 2
    # The test itself rounds a few times, each time by 2^-24 of its largest number.
    slack = 2.0**-21 * ((abs(a) + length) * most + abs(b) + offset) + 2.0**-120
    floor = a - 2 * slack / least if metric == _COSINE else a * most + b - 2 * slack
    return np.float32(a), np.float32(b - slack), np.float32(floor)


@njit(cache=True, nogil=True, forceinline=True)
def _any_passes(
    fast: NDArray[np.float32],
    lengths: NDArray[np.float32],
    offsets: NDArray[np.float32],
    a: np.float32,
    b: np.float32,
) -> bool:
    """Tells whether any product passes the test of `admission`.

    Without branches and with a result of one byte, so that it runs 8 or 16 wide; a maximum, or
    stopping at the first, runs one by one and takes four times as long.
    """
    hits = np.uint8(0)
    for j in range(fast.shape[0]):
        hits |= np.uint8(fast[j] - a * lengths[j] >= b + offsets[j])
    return bool(hits != 0)


@njit(cache=True, nogil=True)
def _survivors(
    fast: NDArray[np.float32],
    lengths: NDArray[np.float32],
    offsets: NDArray[np.float32],
    a: np.float32,
    b: np.float32,
    found: NDArray[np.int32],
) -> int:
    """Writes the columns that pass the test of `admission` to `found`; returns how many."""
    count = 0
    for start in range(0, fast.shape[0], _CHUNK):
        f = fast[start : start + _CHUNK]
        u, v = lengths[start : start + _CHUNK], offsets[start : start + _CHUNK]
        if _any_passes(f, u, v, a, b):
            for j in range(f.shape[0]):
                if f[j] - a * u[j] >= b + v[j]:
                    found[count] = start + j
                    count += 1
    return count


@njit(cache=True, nogil=True)
def _count_passing(
    fast: NDArray[np.float32],
    lengths: NDArray[np.float32],
    offsets: NDArray[np.float32],
    a: np.float32,
    b: np.float32,
) -> int:
    count = 0
    for j in range(fast.shape[0]):
        count += fast[j] - a * lengths[j] >= b + offsets[j]
    return count


@njit(cache=True, nogil=True)
def _provisional(
    fast: NDArray[np.float32],
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
        count = _count_passing(fast, lengths, offsets, a, b)
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
def _sift_down(keys: NDArray[np.float32], found: NDArray[np.int32], start: int, count: int) -> None:
    """Restores a binary heap, the largest key first, below one entry."""
    key, column = keys[start], found[start]
    parent = start
    while True:
        child = 2 * parent + 1
        if child >= count:
            break
        if child + 1 < count and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= key:
            break
        keys[parent], found[parent] = keys[child], found[child]
        parent = child
    keys[parent], found[parent] = key, column


@njit(cache=True, nogil=True)
def _excludes(excluded: NDArray[np.int32], low: int, high: int, code: int) -> bool:
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
def _id_precedes(
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
    tile: Tile,
    scoring: Scoring,
    slots: NDArray[np.int64],
    query_rows: NDArray[np.int64],
    queries: QueryArrays,
    first_run: int,
    first_row: int,
    candidates: CandidateArrays,
    caps: NDArray[np.int64],
    heaps: Heaps,
    found: NDArray[np.int32],
    keys: NDArray[np.float32],
    limits: NDArray[np.float32],
) -> int:
    """Scores exactly what may enter the heaps, and enters it; returns how many pairs were scored.

    Row i of the tile is row `query_rows[i]` of the queries and slot `slots[i]` of the heaps; column
    j is run `first_run + j` of the candidates, whose rows are numbered from `first_row` in the
    whole index. `found` and `keys` are scratch of at least n numbers, `limits` of [m, 3].

    The kept entries are the best set under the caps, whatever the order of the offers: groups are
    nested, an item's images in those of its brand, so the sets that are allowed are the independent
    sets of a laminar matroid. There the best set stays best when a new element replaces the worst
    one of the innermost group that is full (the whole heap is the outermost).

    One function, and arrays unpacked once: a call that passes this many arrays costs more than a row.
    """
    fast, q_vectors, x_vectors, lengths, offsets = tile
    q_norms, q_same, q_different, q_excluded_offsets, q_excluded = queries
    runs, x_norms, x_same, x_different, x_excluded, x_caps, eligible, id_data, id_offsets = candidates
    scores, rows, counts, places, ids, id_lengths, kept_caps = heaps
    metric, unscale, _ = scoring
    k = scores.shape[1]
    least, most, offset = lengths.min(), lengths.max(), offsets.max()
    cosine = metric == _COSINE
    rescored = 0
    # In a loop of its own, so that the rows' cache misses overlap.
    for i in range(fast.shape[0]):
        worst = np.float64(scores[slots[i], k - 1])
        limits[i] = admission(scoring, worst, q_norms[query_rows[i]], least, most, offset)
    for i in range(fast.shape[0]):
        a, b, floor = limits[i]
        full = b > -np.inf
        first_a, first_b = a, b
        if full:
            left = _survivors(fast[i], lengths, offsets, a, b, found)
            if left == 0:
                continue
        slot, q = slots[i], query_rows[i]
        q_norm = q_norms[q]
        staged = not full and fast.shape[1] > _STAGED * k
        if staged:
            bound = 1.1 if cosine else 1.1 * np.sqrt(q_norm) * most + offset
            first_a, first_b = _provisional(fast[i], lengths, offsets, cosine, bound, k + k // 8 + 1)
            left = _survivors(fast[i], lengths, offsets, first_a, first_b, found)
        elif not full:
            left = fast.shape[1]
            for j in range(left):
                found[j] = j
        for stage in range(1 + staged):
            if stage == 1:
                # What the first test left out and the heap, now as good as full, still lets in.
                left = _survivors(fast[i], lengths, offsets, a, b, found)
                others = 0
                for c in range(left):
                    j = found[c]
                    if not fast[i, j] - first_a * lengths[j] >= first_b + offsets[j]:
                        found[others] = j
                        others += 1
                left = others
            for c in range(left):
                j = found[c]
                keys[c] = fast[i, j] / lengths[j] if cosine else fast[i, j] - offsets[j]
            # The best first, so that the threshold rises before the rest is looked at.
            for start in range(left // 2 - 1, -1, -1):
                _sift_down(keys, found, start, left)
            while left > 0 and not keys[0] < floor:
                j = found[0]
                left -= 1
                keys[0], found[0] = keys[left], found[left]
                _sift_down(keys, found, 0, left)
                if full and fast[i, j] - a * lengths[j] < b + offsets[j]:
                    continue
                scored, entered = False, False
                score = np.float32(0.0)
                for x in range(runs[first_run + j], runs[first_run + j + 1]):
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
                        allowed = not _excludes(q_excluded, low, high, x_excluded[x])
                    if not allowed:
                        continue
                    if not scored:
                        dot = exact_dot(q_vectors[i], x_vectors[j])
                        score = exact_score(metric, unscale, dot, q_norm, x_norms[x])
                        scored = True
                        rescored += 1
                    count = counts[slot]
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
                            and not _id_precedes(
                                id_data, id_start, id_stop, ids, slot, place, id_lengths[slot, place]
                            )
                        ):
                            # The rows of a run are in the order of their ids: the rest is no better.
                            if out == k - 1:
                                break
                            continue
                        rank = out
                    else:
                        place, rank = np.int32(count), count
                        counts[slot] = count + 1
                    while rank > 0:
                        before = places[slot, rank - 1]
                        if score < scores[slot, rank - 1] or (
                            score == scores[slot, rank - 1]
                            and not _id_precedes(
                                id_data, id_start, id_stop, ids, slot, before, id_lengths[slot, before]
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
                    for byte in range(id_stop - id_start):
                        ids[slot, place, byte] = id_data[id_start + byte]
                    for cap in range(caps.shape[0]):
                        kept_caps[cap, slot, place] = x_caps[cap, x]
                    entered = True
                if entered and counts[slot] == k:
                    full = True
                    worst = np.float64(scores[slot, k - 1])
                    a, b, floor = admission(scoring, worst, q_norm, least, most, offset)
    return rescored
