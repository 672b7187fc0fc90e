"""The histogram of scores: the same however it is split into parts, and for scores of any range."""

import numpy as np
import pytest

from index_builder.scoring.metrics import Metric
from transforms.score_histogram import BINS, ScoreHistogram


def histogram(scores: np.ndarray, metric: Metric, parts: int = 1) -> dict[str, list[float]]:
    whole = ScoreHistogram()
    for part in np.array_split(scores, parts):
        one = ScoreHistogram()
        one.add(part, metric)
        whole.merge(one)
    return whole.document(metric)


def test_cosines_are_counted_between_zero_and_one() -> None:
    scores = np.array([-0.3, 0.0, 0.049, 0.05, 0.5, 0.99, 1.0, 1.0000001], np.float64)
    found = histogram(scores, Metric.COSINE)
    assert found["edges"] == [round(number / BINS, 2) for number in range(BINS + 1)]
    wanted = np.zeros(BINS, int)
    wanted[[0, 1, 10, 19]] = 3, 1, 1, 3
    assert found["counts"] == wanted.tolist()


@pytest.mark.parametrize(
    ("metric", "factor"),
    [(Metric.EUCLIDEAN, -1e6), (Metric.EUCLIDEAN, -1e-9), (Metric.INNER_PRODUCT, 30)],
)
def test_other_scores_are_counted_where_they_are(metric: Metric, factor: float) -> None:
    scores = (np.random.default_rng(0).gamma(2, size=5000) * factor).astype(np.float32)
    found = histogram(scores, metric)
    assert found == histogram(scores, metric, 7) == histogram(scores[::-1], metric, 3)
    assert sum(found["counts"]) == 5000
    edges = np.array(found["edges"])
    assert (np.diff(edges) > 0).all()
    np.testing.assert_allclose(edges[[0, -1]], [scores.min(), scores.max()], rtol=0.01)
    # Close to the direct count; only scores near an edge may change sides.
    direct, _ = np.histogram(scores, bins=BINS)
    assert np.abs(np.array(found["counts"]) - direct).max() < 0.05 * direct.max()


def test_equal_scores_and_no_scores() -> None:
    for value in (0.0, -0.0, -25.0, 3e-12):
        found = histogram(np.full(9, value), Metric.EUCLIDEAN)
        assert (np.diff(found["edges"]) > 0).all()
        assert found["counts"] == [9] + [0] * (BINS - 1)
    for metric in Metric:
        assert histogram(np.empty(0), metric)["counts"] == [0] * BINS
