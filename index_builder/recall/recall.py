"""The recall certificate: what was promised, on how many queries it was measured, what that proves."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.recall.confidence import CONFIDENCE, lower_bound
from index_builder.recall.query_sample import QuerySample

# Values of the column that recall is listed by; the largest are shown.
_MOST_VALUES = 100


@dataclasses.dataclass(frozen=True)
class Promise:
    """A lower bound of recall of at least `target`, on samples of `sample` queries drawn with `seed`.

    `attempts` is how often nprobe may be tried before the promise is given up: 1 where it is fixed.
    Raises ValueError.
    """

    target: float = 0.0
    sample: int = 1000
    seed: int = 1
    attempts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise ValueError(
                f"Promise.target is {self.target}, wanted 0 to 1. Give a share, such as 0.95."
            )
        for name, got in (("sample", self.sample), ("attempts", self.attempts)):
            if got < 1:
                raise ValueError(f"Promise.{name} is {got}, wanted at least 1. Raise it.")

    def alpha(self, attempt: int) -> float:
        """Returns the probability with which the bound of an attempt (from 1) may be wrong.

        Attempt i gets alpha / 2^i, so all attempts together are wrong with alpha at most; a single one
        gets alpha whole.
        """
        if not 1 <= attempt <= self.attempts:
            raise ValueError(f"attempt is {attempt}, wanted 1 to {self.attempts}")
        alpha = 1 - CONFIDENCE
        return alpha if self.attempts == 1 else alpha / 2**attempt

    def queries(self, rows: int, split_seed: int, role: int) -> QuerySample:
        """Returns the sample of a role (0 calibrates, i certifies attempt i) of an index of `rows`."""
        return QuerySample(self.sample, self.seed, rows, split_seed, role, 1 + self.attempts)


@dataclasses.dataclass(frozen=True)
class ValueRecall:
    """Recall of the queries with one value of a column; the bound is of this value by itself.

    `queries` were measured, of `rows` in the index.
    """

    value: str | None
    queries: int
    rows: int
    estimate: float
    lower_bound: float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What a sample of queries proves about a join's recall@k in the index's space.

    `lower_bound` is one-sided and distribution-free, `confidence` that of this attempt. `queries` were
    measured of `rows`: where they are all, both figures are exact. `encoder_recall` (None where it was
    not measured) is the share of the exact neighbours in the encoder's own space, before the index's
    transform, that the join has, estimated on the first `encoder_queries` of the sample.
    """

    target: float
    estimate: float
    lower_bound: float
    confidence: float
    queries: int
    rows: int
    k: int
    nprobe: int
    nlist: int
    seed: int
    attempt: int
    by: str | None = None
    values: tuple[ValueRecall, ...] = ()
    encoder_recall: float | None = None
    encoder_queries: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns the certificate as plain JSON values."""
        value = dataclasses.asdict(self)
        value["values"] = [dataclasses.asdict(one) for one in self.values]
        return value


def recalls_of_values(
    recalls: NDArray[np.float64],
    values: Sequence[str | None],
    rows_of: Mapping[str | None, int],
    alpha: float,
) -> tuple[ValueRecall, ...]:
    """Returns the recall by value of a column, largest value first.

    `recalls` [n] and `values` [n] are those of the sample, `rows_of` says how many rows of the index
    have each value.
    """
    places: dict[str | None, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    shown = sorted(places, key=lambda value: (-rows_of[value], value is None, value or ""))
    return tuple(
        ValueRecall(
            value,
            len(places[value]),
            rows_of[value],
            float(recalls[places[value]].mean()),
            lower_bound(recalls[places[value]], rows_of[value], alpha),
        )
        for value in shown[:_MOST_VALUES]
    )


def least_sample(target: float, alpha: float) -> int:
    """Returns from how many queries on, about, a sample without a miss proves a recall below 1."""
    if not 0 <= target < 1:
        raise ValueError(
            f"target is {target}, wanted less than 1: only measuring every row proves that"
        )
    sample = 1
    while lower_bound(np.ones(sample), 2**40, alpha) < target:
        sample = math.ceil(sample * 1.1)
    return sample


def raised_nprobe(nprobe: int, nlist: int) -> int:
    """Returns the nprobe of the next attempt: half as many lists more, at least one."""
    return min(nlist, max(nprobe + 1, math.floor(nprobe * 1.5)))
