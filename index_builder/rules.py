"""Which pairs may be neighbours: rules on metadata columns, applied before selection.

`same` asks for an equal value; `different` refuses an equal one. A null is no value: it is never the
same as anything, and always different.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# A query never gets its own item.
OWN_ITEM = "item_id"


@dataclasses.dataclass(frozen=True)
class JoinRules:
    """Columns whose value must be the same, and columns whose value must differ."""

    same: tuple[str, ...] = ()
    different: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that deciding takes, the item among them, without repetition."""
        return tuple(dict.fromkeys((OWN_ITEM, *self.same, *self.different)))


@dataclasses.dataclass(frozen=True, eq=False)
class RuleCodes:
    """The rule columns of n rows as small numbers, int32 [rules, n]; -1 is null or unknown.

    Codes of two tables can be compared when both came from the same RuleEncoder.
    """

    same: NDArray[np.int32]
    different: NDArray[np.int32]

    def slice(self, start: int, stop: int) -> "RuleCodes":
        """Returns the codes of rows start to stop."""
        return RuleCodes(self.same[:, start:stop], self.different[:, start:stop])

    def take(self, rows: NDArray[np.int64]) -> "RuleCodes":
        """Returns the codes of some rows, in their order."""
        return RuleCodes(
            np.ascontiguousarray(self.same[:, rows]), np.ascontiguousarray(self.different[:, rows])
        )

    @staticmethod
    def none(rows: int) -> "RuleCodes":
        """Returns codes without any rule."""
        return RuleCodes(np.empty((0, rows), np.int32), np.empty((0, rows), np.int32))


class RuleEncoder:
    """Numbers the values that occur among the queries; any other value cannot match and gets -1."""

    def __init__(self, rules: JoinRules, queries: pa.Table) -> None:
        self._rules = rules
        self._values = {name: pc.unique(queries[name]).drop_null() for name in rules.columns}

    def encode(self, table: pa.Table) -> RuleCodes:
        """Returns the codes of a table that has the rule columns."""
        same = self._encode_columns(table, self._rules.same)
        different = self._encode_columns(table, (OWN_ITEM, *self._rules.different))
        return RuleCodes(same, different)

    def _encode_columns(self, table: pa.Table, names: tuple[str, ...]) -> NDArray[np.int32]:
        codes = np.empty((len(names), len(table)), dtype=np.int32)
        for row, name in enumerate(names):
            found = pc.index_in(table[name], value_set=self._values[name])
            codes[row] = pc.fill_null(found, -1).to_numpy()
        return codes
