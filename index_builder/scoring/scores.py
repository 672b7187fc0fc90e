"""Scores: their exact formulas, and which fast products may still matter.

The vectors are float16 of a length of about 1 at most, so norms and dot products are exact in float64
in any order of summation (see `vectors`). A score is one float32 rounding of a formula of them:

    cosine         dot / sqrt(nq nx)
    euclidean      -(nq + nx - 2 dot) unscale     minus the squared distance
    inner_product  dot unscale

`unscale` = 2^(-2 e) undoes the power-of-two scale 2^e that the index gave its vectors.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from index_builder.scoring.metrics import Metric

_COSINE = Metric.COSINE.code
_INNER_PRODUCT = Metric.INNER_PRODUCT.code

# Unit roundoff of float32.
_UNIT_ROUNDOFF = 2.0**-24


class Scoring(NamedTuple):
    """How a tile is scored: Metric.code and unscale."""

    metric: int
    unscale: float


def error_bound(dim: int, unit_roundoff: float = 0.0) -> float:
    """Returns how far a fast dot product can be off, relative to |q| |x|.

    `unit_roundoff` is that of rounding the inputs (0 where the product takes float16 numbers as they
    are); sums are float32. Rounded inputs are off by 2 u + u^2 of |q| |x|, and summing them adds
    gamma_d = d v / (1 - d v), v = 2^-24, of what is summed, in any order (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1).
    """
    rounding = 2 * unit_roundoff + unit_roundoff**2
    return rounding + (1 + rounding) * _gamma(dim)


def split_error_bound(dim: int, unit_roundoff: float) -> float:
    """Returns how far a fast dot product of numbers in two parts can be off, relative to |q| |x|.

    A number is q' + q", where q' is rounded by `unit_roundoff` u at most: q' x' + q' x" + q" x' are
    3 d products, as large as (1 + u)^2 + 2 u (1 + u) of |q| |x|; q" x", at most u^2, is left out.
    """
    u = unit_roundoff
    return u**2 + ((1 + u) ** 2 + 2 * u * (1 + u)) * _gamma(3 * dim)


def _gamma(count: int) -> float:
    return count * _UNIT_ROUNDOFF / (1 - count * _UNIT_ROUNDOFF)


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


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def threshold(scoring: Scoring, worst: float, q_norm: float) -> tuple[np.float32, np.float32]:
    """Which products of a query may score `worst` or better: (a, b).

    A corpus vector of length u and offset v (|x|^2 / 2 for euclidean, else 0) is out when its fast
    product f < (a - e |q|) u + b + v, where e bounds the error of f relative to |q| u, apart from the
    rounding of this test itself: see `slack`.
    """
    metric, unscale = scoring
    # Scores are rounded to float32: half a unit in the last place, or of the smallest number.
    least_score = worst - abs(worst) * 2.0**-23 - 2.0**-148
    if metric == _COSINE:
        a, b = least_score * np.sqrt(q_norm), 0.0
    elif metric == _INNER_PRODUCT:
        a, b = 0.0, least_score / unscale
    else:
        a, b = 0.0, (q_norm + least_score / unscale) / 2
    return np.float32(a), np.float32(b)


@njit(cache=True, nogil=True, forceinline=True)
def slack(a: float, b: float, length: float, most: float, offset: float) -> float:
    """How far rounding can take f - a u >= b + v in float32 from the truth.

    It rounds a few times, each time by 2^-24 of its largest number. `length` is |q|, `most` and
    `offset` bound u and v.
    """
    return 2.0**-20 * ((abs(a) + length) * most + abs(b) + offset) + 2.0**-120


@njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def least_key(
    cosine: bool, a: float, b: float, off: float, least: float, most: float, offset: float
) -> np.float32:
    """A floor of f / u (cosine) or f - v (the others) of whatever passes f - a u >= b - off + v.

    `least` and `most` bound u.
    """
    if cosine:
        return np.float32(a - 3 * off / least)
    return np.float32(min(a * least, a * most) + b - 3 * off)
