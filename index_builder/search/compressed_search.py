"""Search by codes of 4 bits: what they propose, for the float16 vectors to decide about.

Every probed list is looked through by its codes, a sixteenth of the vectors; each query keeps the rows
with the least sums. These are then scored exactly (`proposal_scoring`), and the k best of them remain.
Which rows are proposed depends neither on threads, shards and their order nor on the machine, and so
neither does the result.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from index_builder.index.code_sums import BLOCK_ROWS, PreparedCodes, table_bytes
from index_builder.index.product_quantizer import Codebooks
from index_builder.index.proposals import Proposals
from index_builder.index.shards import IndexDataset, IndexShard, open_codes, open_shard
from index_builder.rules.rules import CandidateCodes, QueryCodes, RuleEncoder
from index_builder.scoring.blocks import Block
from index_builder.scoring.query_ranges import group_by_list

# Scratch of a thread: the tables of its queries, and sums.
_RANGE_BYTES = 8 << 20
# Queries of a range: enough that many probe the same list, few enough that threads end together.
_MOST_RANGE_ROWS = 65536
_LEAST_RANGE_ROWS = 1024
_RANGES_A_THREAD = 3
_SUMS = 1 << 16
# Lists after which thresholds are tighter.
_FIRST_LISTS = (1, 8)


def propose(
    index: IndexDataset,
    queries: Block[QueryCodes],
    probes: NDArray[np.int32],
    encoder: RuleEncoder,
    shards: Iterable[int],
    columns: tuple[str, ...],
    kept: int,
    threads: int | None = None,
) -> Proposals:
    """Returns the best `kept` proposals of each query in the lists `probes`, int32 [n, nprobe].

    `shards` are those that own a probed list, in any order; `columns` what `encoder` reads of them.
    Memory: the proposals, and of one shard its codes, mapped and prepared.
    """
    codebooks = index.trained.codebooks
    assert codebooks is not None, "an index that is searched by codes has codebooks"
    proposals = Proposals(len(queries), kept, index.layout.rows)
    scan = _ProposalScan(index, queries, probes, codebooks, proposals)
    with query_ranges(probes, table_bytes(codebooks.subspaces), threads) as run:
        for number in shards:
            with open_shard(index, number, columns) as shard, open_codes(index, number) as packed:
                candidates = encoder.encode_candidates(shard.table, shard.first_row)
                # Caps are looked at when the proposals are decided about.
                encoder.forget_caps(np.empty((len(candidates.caps), 0), dtype=np.int32))
                lists = _PreparedLists(packed, codebooks)
                run(functools.partial(scan.look_through, shard, lists, candidates))
    return proposals


class _PreparedLists:
    """Codes of the lists of a shard, prepared when they are first asked for."""

    def __init__(self, packed: NDArray[np.uint8], codebooks: Codebooks) -> None:
        self._packed = packed
        self._subspaces = codebooks.subspaces
        self._prepared: dict[tuple[int, int], PreparedCodes] = {}

    def rows(self, start: int, stop: int) -> PreparedCodes:
        """Returns some rows of the shard; two threads that prepare them at once make the same."""
        found = self._prepared.get((start, stop))
        if found is None:
            found = PreparedCodes(np.array(self._packed[start:stop]), self._subspaces)
            self._prepared[start, stop] = found
        return found


class _ProposalScan:
    """Queries on their way through the codes of shards."""

    def __init__(
        self,
        index: IndexDataset,
        queries: Block[QueryCodes],
        probes: NDArray[np.int32],
        codebooks: Codebooks,
        proposals: Proposals,
    ) -> None:
        self._layout = index.layout
        self._metric = index.trained.metric
        self._queries = queries
        self._probes = np.ascontiguousarray(probes)
        self._codebooks = codebooks
        self._proposals = proposals
        # Where the table of a query is among those of its range.
        self._places = np.zeros(len(queries), dtype=np.int64)

    def look_through(
        self,
        shard: IndexShard,
        lists: _PreparedLists,
        candidates: CandidateCodes,
        rows: NDArray[np.int64],
    ) -> None:
        """Offers a range of the queries the rows of a shard whose lists they probe."""
        first, last = self._layout.shard_lists(shard.number)
        named = self._probes[rows]
        rows = rows[((named >= first) & (named < last)).any(axis=1)]
        self._places[rows] = np.arange(len(rows))
        tables = self._codebooks.tables(self._queries.vectors.take(rows).matrix(), self._metric)
        scratch = np.empty(_SUMS, dtype=np.int32)
        # The nearest lists first, so that limits are tight before the rest.
        for columns in _columns_in_turn(self._probes.shape[1]):
            offsets, probing = group_by_list(self._probes, rows, *columns, first, last)
            for place in np.flatnonzero(np.diff(offsets)):
                slots = probing[offsets[place] : offsets[place + 1]]
                start, stop = self._layout.list_rows(shard.number, first + int(place))
                for low in range(start, stop, _SUMS):
                    high = min(stop, low + _SUMS)
                    self._offer(
                        lists.rows(low, high), candidates.slice(low, high), shard.first_row + low,
                        slots, tables, scratch,
                    )  # fmt: skip

    def _offer(
        self,
        codes: PreparedCodes,
        candidates: CandidateCodes,
        first_row: int,
        slots: NDArray[np.int64],
        tables: NDArray[np.uint8],
        scratch: NDArray[np.int32],
    ) -> None:
        step = _SUMS // (codes.blocks * BLOCK_ROWS)
        for start in range(0, len(slots), step):
            asked = slots[start : start + step]
            sums = codes.sums(tables, self._places[asked], scratch)
            self._proposals.offer(sums, asked, self._queries.codes, candidates, first_row)


@contextlib.contextmanager
def query_ranges(
    probes: NDArray[np.int32], row_bytes: int, threads: int | None
) -> Iterator[Callable[[Callable[[NDArray[np.int64]], None]], None]]:
    """Opens threads; yields what runs a function once for each range of the queries.

    Neighbouring queries, which probe the same lists, are in one range; a query takes `row_bytes` of its
    thread's scratch.
    """
    threads = threads or len(os.sched_getaffinity(0))
    order = np.argsort(probes[:, 0], kind="stable").astype(np.int64)
    step = min(_range_rows(len(order), threads), max(1, _RANGE_BYTES // row_bytes))
    ranges = [order[start : start + step] for start in range(0, len(order), step)]
    with ThreadPoolExecutor(threads) as pool:

        def run(work: Callable[[NDArray[np.int64]], None]) -> None:
            # Exceptions of the threads are raised here.
            for _ in pool.map(work, ranges):
                pass

        yield run


def _range_rows(queries: int, threads: int) -> int:
    """Returns how many queries make a range."""
    fair = max(_LEAST_RANGE_ROWS, queries // (threads * _RANGES_A_THREAD))
    return max(1, min(_MOST_RANGE_ROWS, fair, -(-queries // threads)))


def _columns_in_turn(nprobe: int) -> list[tuple[int, int]]:
    """Cuts 0 to nprobe: the nearest list, the next few, the rest."""
    cuts = [cut for cut in (0, *_FIRST_LISTS) if cut < nprobe]
    return list(itertools.pairwise([*cuts, nprobe]))
