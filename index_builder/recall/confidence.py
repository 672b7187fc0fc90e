"""A lower confidence bound of a mean of numbers in [0, 1] that supposes nothing about them.

Recalls are mostly 1, with a few failures: the normal approximation promises too much then. This is the
betting bound of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting"
(JRSS B 2024), in its form for samples drawn without replacement.

To test the hypothesis that the population's mean is m, bet on each value that it exceeds what m makes
one expect. If m is true, the capital is a fair game, and Ville's inequality says that it ever reaches
1 / alpha with a probability of at most alpha. The bound is the largest m that is refuted so. For every
bet used here the capital falls as m grows, so bisection finds it.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

CONFIDENCE = 0.95

# The stake is spread over bets of a fixed share of what may be lost, and a bet that adapts itself to
# the variance seen so far (section 4.2 of the paper, the predictable plug-in).
_SHARES = np.concatenate([np.arange(1, 20) / 20, [0.99]])
_STAKES = np.concatenate([np.full(19, 0.25 / 19), [0.25]])
_ADAPTIVE_STAKE = 0.5
# No bet risks all: a single zero would end the game.
_LARGEST_SHARE = 0.99
# Bounds are whole multiples of this, rounded down: no digit depends on the last bit of a logarithm.
_GRID = 2.0**-20
_ORDER_SEED = 0


def lower_bound(values: NDArray[np.float64], population: int, alpha: float = 1 - CONFIDENCE) -> float:
    """Returns a lower bound of a population's mean that is wrong with probability alpha at most.

    `values` [n] in [0, 1] are a random sample, without replacement, of a population of that many; their
    order is of no account. A sample of the whole population has no sampling error: its bound is its
    mean. Raises ValueError for values outside [0, 1], an empty sample or an alpha outside (0, 1).
    """
    if not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"a bound needs values in [0, 1], got {len(values)} with others among them")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, wanted a probability between 0 and 1")
    mean = float(values.mean())
    if len(values) >= population:
        return mean
    shuffled = in_random_order(values)
    low, high = 0, math.floor(mean / _GRID) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if refutes(shuffled, population, middle * _GRID, alpha):
            low = middle
        else:
            high = middle
    return low * _GRID


def in_random_order(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns values in the order in which they are bet on.

    A sample comes sorted by row, and failures cluster in lists; betting stops at its best moment, so it
    must not meet the good ones first.
    """
    return np.random.default_rng(_ORDER_SEED).permutation(values)


def refutes(values: NDArray[np.float64], population: int, mean: float, alpha: float) -> bool:
    """Tells whether values, in random order, refute a mean of the population, or any smaller one."""
    wanted = 1 / alpha
    boldness = 2 * math.log(wanted) / len(values)
    return bool(
        _reaches(
            np.ascontiguousarray(values, dtype=np.float64), float(population), mean, wanted, boldness,
            _SHARES, _STAKES,
        )
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _reaches(
    values: NDArray[np.float64],
    population: float,
    mean: float,
    wanted: float,
    boldness: float,
    shares: NDArray[np.float64],
    stakes: NDArray[np.float64],
) -> bool:
    """Tells whether the capital, 1 at the start, ever reaches `wanted`.

    Before each value, the mean of what has not been drawn yet follows from the hypothesis; a bet of
    share c multiplies its stake by 1 - c + c value / mean, which is fair if the hypothesis is true.
    """
    capital = stakes.copy()
    adaptive = _ADAPTIVE_STAKE
    drawn, squares = 0.0, 0.25
    for t in range(values.shape[0]):
        expected = (population * mean - drawn) / (population - t)
        if expected <= 0:
            return True
        # The bet may look at earlier values only: their mean and variance, a little regularised.
        variance = squares / (t + 1)
        share = min(math.sqrt(boldness / variance) * expected, _LARGEST_SHARE)
        gain = values[t] / expected - 1
        adaptive *= 1 + share * gain
        total = adaptive
        for bet in range(shares.shape[0]):
            capital[bet] *= 1 + shares[bet] * gain
            total += capital[bet]
        if total >= wanted:
            return True
        drawn += values[t]
        deviation = values[t] - (drawn + 0.5) / (t + 2)
        squares += deviation * deviation
    return False
