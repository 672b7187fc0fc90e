"""Proposals against sorting: the least sums that the rules allow, in any order of the offers."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.index.proposals import Proposals, room
from index_builder.rules.rules import CandidateCodes, QueryCodes
from tests.topk_oracle import allowed_pairs, drawn_codes, pieces


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_least_sums_remain(data: st.DataObject) -> None:
    queries, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    kept = data.draw(st.integers(1, 6))
    q_codes, x_codes = drawn_codes(data, queries, rows)
    flat = data.draw(st.lists(st.integers(0, 5), min_size=queries * rows, max_size=queries * rows))
    sums = np.asarray(flat, dtype=np.int32).reshape(queries, rows)
    proposals = Proposals(queries, kept, rows + 100)
    for start, stop in pieces(data, rows):
        slots = np.asarray(data.draw(st.permutations(range(queries))), dtype=np.int64)
        part = np.ascontiguousarray(sums[slots, start:stop])
        proposals.offer(part, slots, q_codes, x_codes.slice(start, stop), 100 + start)
    found, counts = proposals.finish()
    allowed = allowed_pairs(q_codes, x_codes)
    for q in range(queries):
        ranked = sorted((sums[q, x], 100 + x) for x in np.flatnonzero(allowed[q]))
        assert sorted(found[q, : counts[q]]) == sorted(row for _, row in ranked[:kept])


def test_thousands_of_rows_in_rising_falling_and_random_order() -> None:
    rng = np.random.default_rng(0)
    rows, kept = 20_000, 150
    sums = np.stack([np.arange(rows), np.arange(rows)[::-1], rng.integers(900, size=rows)])
    sums = sums.astype(np.int32)
    proposals = Proposals(3, kept, rows)
    for start in range(0, rows, 777):
        part = np.ascontiguousarray(sums[:, start : start + 777])
        codes = CandidateCodes.none(part.shape[1])
        proposals.offer(part, np.arange(3), QueryCodes.none(3), codes, start)
    found, counts = proposals.finish()
    assert (counts == kept).all()
    for q in range(3):
        order = np.lexsort((np.arange(rows), sums[q]))
        np.testing.assert_array_equal(np.sort(found[q]), np.sort(order[:kept]))
    assert room(kept) == 2 * kept
