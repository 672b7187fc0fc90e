"""Which queries recall is calibrated and certified on: seeded, disjoint, and not trained on.

A query is drawn by hashes of its id, so the sample is the same however the rows are ordered or cut
into parts, every part can be asked by itself, and stages agree without telling each other.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builder.datasets.sampling import (
    evaluation_mask,
    evaluation_overlaps_training,
    evaluation_rows,
)
from index_builder.errors import DatasetError
from index_builder.rules.rules import IMAGE

CALIBRATION = 0
# An index that trains on all of its rows is measured whole if it has so many samples at most: then
# there is no sampling error.
_CENSUS_SAMPLES = 2
# Roles get ranges of the evaluation rows that are expected to hold a few more than a sample.
_SPARE = 1.2


@dataclasses.dataclass(frozen=True)
class QuerySample:
    """A random sample of `size` of the `rows` of an index, drawn with `seed`.

    Of a small index it is half of the evaluation rows, where these are fewer than two samples; a
    sample of all rows is the whole index, with the rows that were trained on.

    `split_seed` is the seed of the index, by which evaluation rows are set apart. Of `roles` samples
    that one configuration may draw this is number `role`: 0 calibrates, i certifies attempt i. They
    are disjoint where there are enough evaluation rows. Else half of these rows calibrate, and each
    attempt draws from the other half by itself.
    """

    size: int
    seed: int
    rows: int
    split_seed: int
    role: int
    roles: int

    @property
    def is_census(self) -> bool:
        """Whether the sample is the whole catalogue."""
        samples = _CENSUS_SAMPLES if evaluation_overlaps_training(self.rows) else 1
        return self.rows <= samples * self.size

    @property
    def drawn(self) -> int:
        """How many queries are drawn, of those that the rules let ask."""
        if self.is_census:
            return self.rows
        return min(self.size, evaluation_rows(self.rows) // 2)

    @property
    def is_disjoint(self) -> bool:
        """Whether the samples of the other roles have no row of this one."""
        wanted = _SPARE * self.size * self.roles
        return not self.is_census and evaluation_rows(self.rows) >= wanted

    def candidates(
        self, image_ids: pa.Array | pa.ChunkedArray
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Returns which of some ids may be in the sample, ascending, and the key of each.

        Of the candidates of all rows, `choose` keeps those with the smallest keys.
        """
        if self.is_census:
            rows = np.arange(len(image_ids), dtype=np.int64)
        else:
            rows = np.flatnonzero(evaluation_mask(image_ids, self.rows, self.split_seed))
        ids = image_ids.take(pa.array(rows)).to_pylist()
        keys = self._keys(ids, 0)
        if self.is_census:
            return rows, keys
        ranges, own = (self.roles, self.role) if self.is_disjoint else (2, min(self.role, 1))
        kept = ((keys >> np.uint64(32)) * np.uint64(ranges)) >> np.uint64(32) == own
        rows, keys = rows[kept], keys[kept]
        if not self.is_disjoint:
            # Attempts that share a range order its rows each in its own way.
            keys = self._keys([ids[place] for place in np.flatnonzero(kept)], 1 + self.role)
        return rows, keys

    def _keys(self, image_ids: list[str], number: int) -> NDArray[np.uint64]:
        """Returns the seeded hashes of some ids, uint64; with another number others."""
        key = b"".join(n.to_bytes(8, "little") for n in (self.seed, number))
        hashes = (
            hashlib.blake2b(image_id.encode(), digest_size=8, key=key).digest()
            for image_id in image_ids
        )
        return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)

    def choose(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns the places, ascending, of the candidates that are the sample."""
        if self.is_census:
            return np.arange(len(keys), dtype=np.int64)
        return np.sort(np.argsort(keys, kind="stable")[: self.drawn])


def choose_queries(tables: Iterable[pa.Table], sample: QuerySample) -> pa.Table:
    """Returns the sample, of candidates with their `key` from several parts, in the order of the keys.

    It may be done in stages; the result does not depend on the order of the tables.
    """
    table = pa.concat_tables(tables)
    chosen = table.take(pa.array(sample.choose(table["key"].to_numpy())))
    return chosen.sort_by([("key", "ascending"), (IMAGE, "ascending")])


def require_queries(queries: int) -> None:
    """Raises DatasetError where a sample is empty, so that there is nothing to measure."""
    if not queries:
        raise DatasetError(
            "No row of the catalogue may ask for neighbours, so there is no recall to measure: "
            "join.rules.queries let none through. Correct the conditions, or the columns they name."
        )
