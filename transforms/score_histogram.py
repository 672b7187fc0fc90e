"""A histogram of scores that parts can be counted into one by one, whatever the range of the scores."""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.scoring.metrics import Metric

BINS = 20
# Scores without a known range are counted by their first eight bits, so memory is bounded and a
# score is off by less than a hundredth of itself.
_KEPT = 2.0**8


class ScoreHistogram:
    """How many scores fall into each of twenty bins of equal width.

    Under cosine the bins go from 0 to 1, with what is outside in the first and the last. Under other
    metrics they go from the lowest to the highest score.
    """

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()

    def add(self, scores: NDArray[np.floating[Any]], metric: Metric) -> None:
        """Counts finite scores [n]; all that are added must be of one metric."""
        if metric is Metric.COSINE:
            kept = np.clip(scores * BINS, 0, BINS - 1).astype(int) / BINS
        else:
            mantissa, exponent = np.frexp(scores.astype(np.float64))
            kept = np.ldexp(np.trunc(mantissa * _KEPT) / _KEPT, exponent)
        values, counts = np.unique(kept, return_counts=True)
        self._counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def merge(self, other: "ScoreHistogram") -> None:
        """Adds the counts of another part."""
        self._counts.update(other._counts)

    def document(self, metric: Metric) -> dict[str, list[Any]]:
        """Returns `edges`, one more than bins, and `counts`, as plain JSON values."""
        values = np.array(sorted(self._counts), dtype=np.float64)
        counts = np.array([self._counts[value] for value in values], dtype=np.int64)
        if metric is Metric.COSINE or not len(values):
            edges = [round(number / BINS, 6) for number in range(BINS + 1)]
            numbers = np.rint(values * BINS).astype(int)
        else:
            low, high = float(values[0]), float(values[-1])
            # Equal scores get bins too, of a width that can be told from nothing.
            span = high - low or max(abs(low), 1.0) / 1000
            edges = [float(f"{low + span * number / BINS:.9g}") for number in range(BINS + 1)]
            numbers = np.minimum((values - low) / span * BINS, BINS - 1).astype(int)
        filled = np.zeros(BINS, dtype=np.int64)
        np.add.at(filled, numbers, counts)
        return {"edges": edges, "counts": filled.tolist()}
