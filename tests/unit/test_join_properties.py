"""The search of lists against a brute force of the probed lists: any shards, threads and product."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.scoring import query_ranges
from index_builder.scoring.blocks import IdColumn, PreparedCandidates, PreparedQueries
from index_builder.scoring.list_scan import list_scan
from index_builder.scoring.metrics import Metric
from index_builder.scoring.query_ranges import QueryRange, Schedule, count_ranges
from index_builder.scoring.scores import error_bound
from index_builder.scoring.topk import TopK
from tests.topk_oracle import (
    METRICS,
    RuledCase,
    corpus_block,
    kept,
    pieces,
    query_block,
)


@dataclasses.dataclass(frozen=True)
class ShiftedProduct:
    """A product that is off by a share of what its unit roundoff allows."""

    share: float
    name: str = "shifted"
    unit_roundoff: float = 2.0**-8

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Writes the exact products, shifted."""
        q, x = queries.astype(np.float64), corpus.astype(np.float64)
        lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)
        out[:] = q @ x.T + self.share * 2 * self.unit_roundoff * lengths


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_small_search(data: st.DataObject) -> None:
    case = RuledCase.drawn(data, most_queries=6)
    k = data.draw(st.integers(1, 35))
    rows, queries = len(case.ids), len(case.queries)

    # Lists are ranges of the rows, some of them empty; a shard owns pieces of some lists.
    nlist = data.draw(st.integers(1, 6))
    lists = np.sort(data.draw(st.lists(st.integers(0, nlist - 1), min_size=rows, max_size=rows)))
    order = st.permutations(range(nlist))
    nprobe = data.draw(st.integers(1, nlist))
    probes = np.asarray([data.draw(order)[:nprobe] for _ in range(queries)], dtype=np.int32)

    top = case.no_rows_yet(k)
    prepared = PreparedQueries.of(query_block(case.queries, case.own))
    product = data.draw(st.sampled_from([None, *map(ShiftedProduct, (-1.0, 0.0, 0.5, 1.0))]))
    threads = data.draw(st.integers(1, 3))
    with list_scan(top, prepared, probes, threads, product) as scan:
        for start, stop in pieces(data, rows):

            def candidates(number: int, start: int = start, stop: int = stop) -> PreparedCandidates:
                first, last = np.searchsorted(lists, [number, number + 1]).clip(start, stop).tolist()
                block = corpus_block(case.corpus, case.others).slice(first, last)
                return PreparedCandidates.of(block, case.column.slice(first, last), first)

            scan.run(range(nlist), candidates)

    probed = (probes[:, :, None] == lists).any(axis=1)
    assert kept(top, case.ids) == case.best(k, probed)


def test_bytes_do_not_depend_on_the_product_or_on_threads() -> None:
    rng = np.random.default_rng(0)
    corpus = (rng.normal(size=(900, 24)) / 10).astype(np.float16)
    corpus[400:440] = corpus[3]
    probes = np.asarray([rng.permutation(9)[:4] for _ in range(900)], dtype=np.int32)
    found = []
    for metric in METRICS:
        for product, threads in ((None, 1), (ShiftedProduct(-1.0), 2), (ShiftedProduct(1.0), 7)):
            top = search(corpus, probes, metric, product, threads)
            found.append((top.scores.tobytes(), top.rows.tobytes()))
    assert [found[0:3], found[3:6], found[6:9]] == [[found[0]] * 3, [found[3]] * 3, [found[6]] * 3]
    assert len(set(found)) == 3


def search(
    corpus: NDArray[np.float16],
    probes: NDArray[np.int32],
    metric: Metric,
    product: ShiftedProduct | None,
    threads: int,
) -> TopK:
    """Searches nine lists of a hundred rows for every row."""
    block, names = corpus_block(corpus), [f"{row:04}" for row in range(len(corpus))]
    ids = IdColumn.from_arrow(pa.array(names))
    top = TopK(len(corpus), 12, 4, metric)
    with list_scan(top, PreparedQueries.of(query_block(corpus)), probes, threads, product) as scan:
        scan.run(
            range(9),
            lambda number: PreparedCandidates.of(
                block.slice(number * 100, number * 100 + 100),
                ids.slice(number * 100, number * 100 + 100),
                number * 100,
            ),
        )
    return top


def test_shifted_products_stay_within_the_bound_that_they_state() -> None:
    product = ShiftedProduct(1.0)
    assert 2 * product.unit_roundoff < error_bound(1, product.unit_roundoff)


def test_ranges_cover_the_queries_and_give_every_thread_some() -> None:
    for queries in (1, 5, 1000, 5000, 200_000, 10_000_000):
        for threads in (1, 2, 16, 200):
            at_once, rounds = count_ranges(queries, threads)
            assert min(queries, threads) <= at_once <= threads + 1
            assert rounds == 1 or queries / (at_once * rounds) > 65_000
            assert queries / (at_once * rounds) <= 131_072
    # Few ranges: the more queries of one probe a list, the better the product runs.
    assert count_ranges(200_000, 2) == (3, 1)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_range_goes_through_each_of_its_probes_once(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    nlist, queries = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 400))
    nprobe = data.draw(st.integers(1, nlist))
    probes = np.asarray([rng.permutation(nlist)[:nprobe] for _ in range(queries)], dtype=np.int32)
    lists = range(*sorted(data.draw(st.tuples(*[st.integers(0, nlist)] * 2))))
    rows = np.flatnonzero(rng.random(queries) < 0.6)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(query_ranges, "_LEAST_TAKEN", data.draw(st.integers(1, 300)))
    scanned, seen = QueryRange(probes, rows, lists), []
    while scanned.left:
        before = scanned.left
        seen += [(number, slot) for number, slots in scanned.take() for slot in slots.tolist()]
        assert scanned.left < before or not lists
    monkey.undo()
    wanted = [(int(probe), int(row)) for row in rows for probe in probes[row] if probe in lists]
    assert sorted(seen) == sorted(wanted)
    # The nearest list of a query comes before its others.
    nearest = {(int(probes[row, 0]), int(row)) for row in rows}
    firsts = sum(pair in nearest for pair in wanted)
    assert all(pair in nearest for pair in seen[:firsts])


def test_threads_share_ranges_to_the_end_and_no_two_have_the_same() -> None:
    probes = np.zeros((90_000, 1), dtype=np.int32)
    rounds = [
        [QueryRange(probes, rows, range(1)) for rows in np.array_split(part, 4)]
        for part in np.array_split(np.arange(len(probes)), 5)
    ]
    schedule, taken = Schedule(rounds), np.zeros(len(probes), dtype=np.int64)
    held: set[int] = set()

    def work(_: int) -> None:
        while (mine := schedule.acquire()) is not None:
            assert id(mine) not in held
            held.add(id(mine))
            for _, slots in mine.take():
                taken[slots] += 1
            held.discard(id(mine))
            schedule.release(mine)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert (taken == 1).all()
    assert schedule.acquire() is None


def test_a_list_that_cannot_be_read_stops_all_threads() -> None:
    corpus = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float16)
    top = TopK(len(corpus), 3, 4)
    prepared = PreparedQueries.of(query_block(corpus))
    probes = (np.arange(len(corpus), dtype=np.int32) % 50)[:, None]
    asked: list[int] = []

    def candidates(number: int) -> PreparedCandidates | None:
        asked.append(number)
        if len(asked) == 7:
            raise OSError("the disk is gone")
        return None

    with list_scan(top, prepared, probes, threads=2) as scan, pytest.raises(OSError, match="is gone"):
        scan.run(range(50), candidates)
    assert len(asked) < 150
