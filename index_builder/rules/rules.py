"""Which pairs may be neighbours: rules on metadata columns, applied before selection.

`same` asks for an equal value; `different` refuses an equal one. A null is no value: it is never the
same as anything, and always different. Conditions say which rows are asked for neighbours and which
may be one. A cap (`max_per`) is a bound on the neighbours of one query that share a value; every item
has a cap of one, its best image.

Capped selection in a bounded heap is exact, in any order of the candidates, as long as the groups are
nested: hence one `max_per` column, whose value the item must determine.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from index_builder.errors import ConfigError
from index_builder.rules.conditions import Condition, check_condition, satisfied

IMAGE = "image_id"
# A query never gets its own item.
OWN_ITEM = "item_id"
ITEM_CAP = 1
# Capped values that a task remembers before it forgets those that no kept row has.
_MOST_CAP_VALUES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ExclusionRule:
    """Pairs that may not be neighbours, as far as they decide the result.

    `by` is the column whose ids the pairs name, `tokens` are those of the content of their files, in
    order; `columns` the names of a pair's two ids there; `symmetric` excludes both directions.
    """

    tokens: tuple[str, ...]
    by: str = IMAGE
    columns: tuple[str, str] = ("query_id", "neighbor_id")
    symmetric: bool = False


@dataclasses.dataclass(frozen=True)
class JoinRules:
    """What decides about pairs, beside the score.

    `same` and `different` are columns; `queries` and `candidates` conditions that all must hold;
    `max_per` is (column, most neighbours a value), one at most. Raises ValueError.
    """

    same: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    queries: tuple[Condition, ...] = ()
    candidates: tuple[Condition, ...] = ()
    max_per: tuple[tuple[str, int], ...] = ()
    exclude: ExclusionRule | None = None

    def __post_init__(self) -> None:
        if len(self.max_per) > 1:
            raise ValueError(
                f"max_per has {len(self.max_per)} columns "
                f"({', '.join(name for name, _ in self.max_per)}), wanted one: the best under several "
                "caps cannot be kept in a list of k while candidates stream by. Keep the one that "
                "matters most."
            )
        for name, most in self.max_per:
            if most < 1:
                raise ValueError(
                    f"max_per {name} is {most}, wanted at least 1. To keep rows out, use a condition "
                    "on candidates."
                )

    @property
    def caps(self) -> tuple[int, ...]:
        """The most kept candidates a value, by the item first."""
        return (ITEM_CAP, *(most for _, most in self.max_per))

    @property
    def capped_columns(self) -> tuple[str, ...]:
        """The columns of `caps`."""
        return (OWN_ITEM, *(name for name, _ in self.max_per))

    @property
    def query_columns(self) -> tuple[str, ...]:
        """The columns of queries that deciding takes, the item among them, without repetition."""
        names = (OWN_ITEM, *self.same, *self.different, *(c.column for c in self.queries))
        return tuple(dict.fromkeys((*names, *self._excluded_columns)))

    @property
    def candidate_columns(self) -> tuple[str, ...]:
        """The same of candidates."""
        names = (*self.same, *self.different, *(c.column for c in self.candidates))
        return tuple(dict.fromkeys((*self.capped_columns, *names, *self._excluded_columns)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Both, for a join of a catalogue with itself."""
        return tuple(dict.fromkeys((*self.query_columns, *self.candidate_columns)))

    @property
    def _excluded_columns(self) -> tuple[str, ...]:
        return () if self.exclude is None else (self.exclude.by,)


def check_rules(
    rules: JoinRules, queries: Mapping[str, pa.DataType], candidates: Mapping[str, pa.DataType]
) -> None:
    """Raises ConfigError when rules name a column that is not there, or has the wrong type.

    `queries` and `candidates` are the columns of the two sides of a join.
    """
    for side, rule_key, conditions in (
        (queries, "queries", rules.queries),
        (candidates, "candidates", rules.candidates),
    ):
        for number, condition in enumerate(conditions):
            key = f"join.rules.{rule_key}.{number}"
            check_condition(condition, _column_type(side, condition.column, f"{key}.column"), key)
    for key, names in (("same", rules.same), ("different", rules.different)):
        for name in names:
            kinds = [_column_type(side, name, f"join.rules.{key}") for side in (queries, candidates)]
            if kinds[0] != kinds[1]:
                raise ConfigError(
                    f"join.rules.{key}: {name!r} is {kinds[0]} among the queries and {kinds[1]} among "
                    "the candidates, wanted one type. Give both datasets the column in the same type."
                )
    for name, _ in rules.max_per:
        _column_type(candidates, name, "join.rules.max_per")


def _column_type(columns: Mapping[str, pa.DataType], name: str, key: str) -> pa.DataType:
    if name not in columns:
        raise ConfigError(
            f"{key}: there is no column {name!r}, wanted one of {', '.join(columns)}. Add it to "
            "images.metadata or catalog.metadata.columns and build again, or correct the name."
        )
    return columns[name]


@dataclasses.dataclass(frozen=True, eq=False)
class QueryCodes:
    """The rule columns of n queries as small numbers; -1 is null.

    `same` int32 [s, n], `different` int32 [t, n]. The candidates that query i excludes have the codes
    `excluded[excluded_offsets[i]:excluded_offsets[i + 1]]`, int32, ascending.
    """

    same: NDArray[np.int32]
    different: NDArray[np.int32]
    excluded_offsets: NDArray[np.int64]
    excluded: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.excluded_offsets) - 1

    def slice(self, start: int, stop: int) -> "QueryCodes":
        """Returns the codes of rows start to stop, sharing memory."""
        return QueryCodes(
            self.same[:, start:stop],
            self.different[:, start:stop],
            # Offsets count from the start of `excluded`, so a slice keeps all of it.
            self.excluded_offsets[start : min(stop, len(self)) + 1],
            self.excluded,
        )

    def take(self, rows: NDArray[np.int64]) -> "QueryCodes":
        """Returns the codes of some rows, in their order."""
        offsets, places = _gather(self.excluded_offsets, rows)
        return QueryCodes(
            np.ascontiguousarray(self.same[:, rows]),
            np.ascontiguousarray(self.different[:, rows]),
            offsets,
            self.excluded[places],
        )

    @staticmethod
    def none(rows: int) -> "QueryCodes":
        """Returns codes without any rule."""
        empty = np.empty((0, rows), np.int32)
        return QueryCodes(empty, empty, np.zeros(rows + 1, np.int64), np.empty(0, np.int32))


def _gather(
    offsets: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns offsets of the ranges of some rows laid end to end, and where each entry comes from."""
    lengths = offsets[rows + 1] - offsets[rows]
    gathered = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.repeat(offsets[rows] - gathered[:-1], lengths) + np.arange(gathered[-1])
    return gathered, places.astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class CandidateCodes:
    """The rule columns of n candidates as small numbers.

    `same` int32 [s, n] and `different` int32 [t, n]: -1 is null, or a value that no query has.
    `excluded` int32 [n]: -1 where no query excludes it. `caps` int32 [c, n], parallel to
    `RuleEncoder.caps`: the value that the cap counts, -1 where nothing is counted. `eligible` bool [n].
    """

    same: NDArray[np.int32]
    different: NDArray[np.int32]
    excluded: NDArray[np.int32]
    caps: NDArray[np.int32]
    eligible: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.eligible)

    def slice(self, start: int, stop: int) -> "CandidateCodes":
        """Returns the codes of rows start to stop, sharing memory."""
        return CandidateCodes(
            self.same[:, start:stop],
            self.different[:, start:stop],
            self.excluded[start:stop],
            self.caps[:, start:stop],
            self.eligible[start:stop],
        )

    def take(self, rows: NDArray[np.int64]) -> "CandidateCodes":
        """Returns the codes of some rows, in their order."""
        return CandidateCodes(
            np.ascontiguousarray(self.same[:, rows]),
            np.ascontiguousarray(self.different[:, rows]),
            self.excluded[rows],
            np.ascontiguousarray(self.caps[:, rows]),
            self.eligible[rows],
        )

    @staticmethod
    def none(rows: int) -> "CandidateCodes":
        """Returns codes without any rule."""
        empty = np.empty((0, rows), np.int32)
        return CandidateCodes(
            empty, empty, np.full(rows, -1, np.int32), empty, np.ones(rows, dtype=bool)
        )


class RuleEncoder:
    """Turns the rule columns of one task into codes that can be compared.

    `queries` has the rule columns of all queries of the task; `exclusions` (string columns `query_id`
    and `neighbor_id`) at least the excluded pairs of these queries; with `single_images` no item has a
    second image, so nothing is counted by item. Where the queries are then rows of the index,
    `own_rows` int64 [n] are their numbers, different ones: a query's own item is its own row, and no
    ids are compared.

    Memory: the values that occur among the queries, their excluded pairs, and the capped values of
    the corpus since the last `forget_caps`.
    """

    def __init__(
        self,
        rules: JoinRules,
        queries: pa.Table,
        exclusions: pa.Table | None = None,
        *,
        single_images: bool = False,
        own_rows: NDArray[np.int64] | None = None,
    ) -> None:
        if rules.exclude is not None and exclusions is None:
            raise ValueError("the rules exclude pairs, but the task was given none to encode")
        self._rules = rules
        if own_rows is not None and not single_images:
            raise ValueError("own_rows tell items apart only where no item has a second image")
        self._own_rows = own_rows
        compared = (*rules.same, *rules.different, *(() if own_rows is not None else (OWN_ITEM,)))
        self._values = {name: pc.unique(queries[name]).drop_null() for name in compared}
        capped = zip(rules.capped_columns, rules.caps, strict=True)
        kept = [one for one in capped if one[0] != OWN_ITEM or not single_images]
        self._capped = [(name, _Numbering()) for name, _ in kept]
        # The most kept candidates a value, parallel to `CandidateCodes.caps`.
        self.caps = tuple(most for _, most in kept)
        self._exclusions = None
        if rules.exclude is not None and exclusions is not None:
            self._exclusions = _Exclusions(queries[rules.exclude.by], exclusions)

    def encode_queries(self, table: pa.Table) -> QueryCodes:
        """Returns the codes of some of the queries; of all of them where `own_rows` are given."""
        if self._own_rows is None:
            own = _codes_in(table[OWN_ITEM], self._values[OWN_ITEM])
        else:
            own = np.arange(len(self._own_rows), dtype=np.int32)
        same, different = self._compared(table, own)
        if self._exclusions is None:
            none = QueryCodes.none(len(table))
            return QueryCodes(same, different, none.excluded_offsets, none.excluded)
        assert self._rules.exclude is not None
        offsets, excluded = self._exclusions.of_queries(table[self._rules.exclude.by])
        return QueryCodes(same, different, offsets, excluded)

    def encode_candidates(self, table: pa.Table, first_row: int | None = None) -> CandidateCodes:
        """Returns the codes of candidates; a table has their rule columns.

        They are the rows of the index from `first_row` on, which is needed where `own_rows` are given.
        """
        if self._own_rows is None:
            own = _codes_in(table[OWN_ITEM], self._values[OWN_ITEM])
        elif first_row is None:
            raise ValueError("own_rows are given, but not which rows of the index these are")
        else:
            own = np.full(len(table), -1, dtype=np.int32)
            places = self._own_rows - first_row
            inside = np.flatnonzero((places >= 0) & (places < len(table)))
            own[places[inside]] = inside
        same, different = self._compared(table, own)
        excluded = np.full(len(table), -1, dtype=np.int32)
        if self._exclusions is not None:
            assert self._rules.exclude is not None
            excluded = self._exclusions.of_candidates(table[self._rules.exclude.by])
        caps = np.empty((len(self._capped), len(table)), dtype=np.int32)
        for row, (name, numbers) in enumerate(self._capped):
            caps[row] = numbers.encode(table[name])
        return CandidateCodes(same, different, excluded, caps, satisfied(self._rules.candidates, table))

    @property
    def cap_values(self) -> int:
        """How many values of capped columns are remembered."""
        return sum(len(numbers) for _, numbers in self._capped)

    def bound_caps(self, kept: NDArray[np.int32]) -> None:
        """Calls `forget_caps` once far more values are remembered than are kept."""
        if self.cap_values > _MOST_CAP_VALUES + 2 * kept.size:
            self.forget_caps(kept)

    def forget_caps(self, kept: NDArray[np.int32]) -> None:
        """Forgets the values of capped columns that nothing kept has, and numbers the rest anew.

        `kept` int32 [c, ...] are the codes of all kept candidates (-1: none), which are changed in
        place; codes that were given out before are void. So a task's memory does not grow with the
        corpus that it has seen.
        """
        for codes, (_, numbers) in zip(kept, self._capped, strict=True):
            used = np.unique(codes[codes >= 0])
            codes[codes >= 0] = np.searchsorted(used, codes[codes >= 0])
            numbers.keep(used)

    def _compared(
        self, table: pa.Table, own: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns what must be the same and what must differ; `own` are the codes of the item."""
        same = self._encode_columns(table, self._rules.same)
        return same, np.vstack([own[None], self._encode_columns(table, self._rules.different)])

    def _encode_columns(self, table: pa.Table, names: tuple[str, ...]) -> NDArray[np.int32]:
        codes = np.empty((len(names), len(table)), dtype=np.int32)
        for row, name in enumerate(names):
            codes[row] = _codes_in(table[name], self._values[name])
        return codes


def _codes_in(column: pa.ChunkedArray, values: pa.Array) -> NDArray[np.int32]:
    """Returns the place of each value among `values`, int32 [n], -1 where it is null or not there."""
    codes: NDArray[np.int32] = pc.fill_null(pc.index_in(column, value_set=values), -1).to_numpy()
    return codes


class _Numbering:
    """Numbers values in the order in which they come; a null gets -1."""

    def __init__(self) -> None:
        self._values: pa.Array | None = None

    def __len__(self) -> int:
        return 0 if self._values is None else len(self._values)

    def encode(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        new = pc.unique(column).drop_null()
        if self._values is None:
            self._values = new
        else:
            unknown = pc.invert(pc.is_in(new, value_set=self._values))
            self._values = pa.concat_arrays([self._values, new.filter(unknown)])
        return _codes_in(column, self._values)

    def keep(self, codes: NDArray[np.int32]) -> None:
        if self._values is not None:
            self._values = self._values.take(pa.array(codes))


class _Exclusions:
    """The excluded pairs of a task's queries: for each query value the codes of the candidates'."""

    def __init__(self, queries: pa.ChunkedArray, pairs: pa.Table) -> None:
        self._queries = pc.unique(queries).drop_null()
        owners = _codes_in(pairs["query_id"], self._queries)
        pairs, owners = pairs.filter(pa.array(owners >= 0)), owners[owners >= 0]
        self._neighbors = pc.unique(pairs["neighbor_id"]).drop_null()
        codes = _codes_in(pairs["neighbor_id"], self._neighbors)
        # One number a pair, so that sorting them orders by owner, then by code.
        found = np.unique(owners.astype(np.int64) << 32 | codes)
        counts = np.bincount(found >> 32, minlength=len(self._queries))
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._codes = (found & 0xFFFFFFFF).astype(np.int32)

    def of_queries(self, ids: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        # A null id has no exclusions: one empty range more, at the end, is -1 by wrapping around.
        offsets = np.append(self._offsets, self._offsets[-1])
        rows = _codes_in(ids, self._queries).astype(np.int64) % len(self._offsets)
        gathered, places = _gather(offsets, rows)
        return gathered, self._codes[places]

    def of_candidates(self, ids: pa.ChunkedArray) -> NDArray[np.int32]:
        return _codes_in(ids, self._neighbors)
