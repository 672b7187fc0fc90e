"""Made populations of per-query recalls whose mean is known, and how often a bound covers it."""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from index_builder.recall.confidence import lower_bound

_K = 20


@dataclasses.dataclass(frozen=True)
class RecallCase:
    """`population` recalls made by `make`, of which samples of `n` are drawn."""

    name: str
    make: Callable[[np.random.Generator, int], NDArray[np.float64]]
    n: int
    population: int = 20_000

    def coverage(self, repetitions: int, seed: int) -> float:
        """Returns the share of samples whose bound is not above the population's mean."""
        rng = np.random.default_rng(seed)
        values = self.make(rng, self.population)
        mean = values.mean()
        covered = 0
        for _ in range(repetitions):
            sample = rng.choice(values, self.n, replace=False, shuffle=False)
            covered += lower_bound(sample, self.population) <= mean
        return covered / repetitions


def _binary(share: float) -> Callable[[np.random.Generator, int], NDArray[np.float64]]:
    def make(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        # Exactly so many failures: the mean is as stated.
        return (np.arange(count) < round(share * count)).astype(np.float64)

    return make


def _lists_that_are_lost(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Most queries find all, some miss a few of 20, and a few find nothing."""
    missed = np.where(rng.random(count) < 0.8, 0, rng.geometric(0.4, count).clip(0, _K))
    return np.where(rng.random(count) < 0.005, 0.0, 1 - missed / _K)


CASES = (
    RecallCase("one query in a hundred fails", _binary(0.99), 1000),
    RecallCase("one query in a hundred fails, few asked", _binary(0.99), 100),
    RecallCase("one query in a thousand fails", _binary(0.999), 1000),
    RecallCase("half of the queries fail", _binary(0.5), 200),
    RecallCase("few are right", _binary(0.03), 200),
    RecallCase("some lists are lost", _lists_that_are_lost, 1000),
    RecallCase("skewed", lambda rng, count: rng.beta(12, 0.4, count), 300),
    RecallCase("every value as often", lambda rng, count: rng.integers(0, _K + 1, count) / _K, 300),
    RecallCase("all alike", lambda rng, count: np.full(count, 0.97), 300),
    RecallCase("most of a small catalogue", _binary(0.97), 900, population=1200),
)
