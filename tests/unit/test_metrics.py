"""The metrics, and what plain FAISS finds in an index of each."""

import dataclasses
import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from index_builder.datasets.storage import join
from index_builder.index.goals import TransformSpec
from index_builder.index.shards import read_shard_table
from index_builder.index.spec import IndexSpec
from index_builder.scoring.metrics import Metric
from tests.index_fixtures import Catalogue, build_index, scattered_ids


def test_names_codes_and_json() -> None:
    assert [(metric.value, metric.code) for metric in Metric] == [
        ("cosine", 0),
        ("euclidean", 1),
        ("inner_product", 2),
    ]
    assert [metric.is_scaled for metric in Metric] == [False, True, True]
    for metric in Metric:
        spec = IndexSpec(metric)
        assert json.loads(json.dumps(spec.fingerprint_value()))["metric"] == metric.value
        assert dataclasses.replace(spec, metric=Metric(metric.value)) == spec


def uneven(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Features around a few centres, away from the origin, with lengths between 20 and 300."""
    rng = np.random.default_rng(seed)
    centres = rng.gamma(0.5, 3.0, size=(8, dim))
    vectors = centres[rng.integers(8, size=n)] * rng.uniform(1, 10, size=(n, 1))
    return (vectors + rng.normal(size=(n, dim))).astype(np.float32)


def direct_scores(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Scores of all pairs of the vectors themselves, in float64."""
    wide = vectors.astype(np.float64)
    if metric is Metric.EUCLIDEAN:
        return -np.square(wide[:, None] - wide[None]).sum(axis=-1)
    if metric is Metric.COSINE:
        wide = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return wide @ wide.T


PLAIN, TURNED = TransformSpec(), TransformSpec("pca", 24, 0.0)


# Centring moves angles, so under cosine with PCA the true neighbours are others.
@pytest.mark.parametrize(
    ("metric", "transform"),
    [
        (Metric.COSINE, PLAIN),
        (Metric.EUCLIDEAN, PLAIN),
        (Metric.EUCLIDEAN, TURNED),
        (Metric.INNER_PRODUCT, PLAIN),
        (Metric.INNER_PRODUCT, TURNED),
    ],
)
def test_plain_faiss_finds_the_neighbours_of_the_metric(
    metric: Metric, transform: TransformSpec, tmp_path: Path
) -> None:
    vectors = uneven(400, 24)
    request = IndexSpec(metric, transform, nlist=6, nprobe=6, shards=2)
    index = build_index(tmp_path, Catalogue(vectors, scattered_ids(400)), request, normalize=False)
    learned = index.trained.transform
    assert index.trained.metric is learned.metric is metric
    queries = learned.apply(vectors).astype(np.float32)
    found, ids = np.empty((400, 0)), np.empty((400, 0), np.int64)
    for part in index.parts:
        shard = faiss.read_index(join(index.folder, part.file(".faiss").path))
        assert shard.metric_type == (
            faiss.METRIC_L2 if metric is Metric.EUCLIDEAN else faiss.METRIC_INNER_PRODUCT
        )
        assert shard.nlist == index.trained.nlist
        shard.nprobe = shard.nlist
        scores, rows = shard.search(queries, 5)
        found = np.hstack([found, -scores if metric is Metric.EUCLIDEAN else scores])
        ids = np.hstack([ids, rows])
    # The rows of the index by their numbers in the catalogue.
    tables = [read_shard_table(index, number, ("image_id",)) for number in range(len(index.parts))]
    names = [name for table in tables for name in table["image_id"].to_pylist()]
    catalogue_row = {name: row for row, name in enumerate(scattered_ids(400))}
    row_of = np.array([catalogue_row[name] for name in names])
    order = np.argsort(-found, axis=1)[:, :5]
    best = row_of[np.take_along_axis(ids, order, axis=1)]
    direct = direct_scores(vectors, metric)
    # In the units of the embeddings, the neighbours are as good as the true ones, up to what the
    # rounding to float16 costs.
    got = np.sort(np.take_along_axis(direct, best, axis=1))[:, ::-1]
    wanted = np.sort(direct)[:, ::-1][:, :5]
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    unit = 1.0 if metric is Metric.COSINE else norms.max() * norms
    assert (np.abs(got - wanted).max(axis=1) <= 2e-3 * unit).all()
    # And in the index's space they are those of the exact scores, up to ties within 2e-6.
    codes = learned.apply(vectors).astype(np.float64)
    exact = direct_scores(codes, metric)
    kept = np.sort(np.take_along_axis(exact, best, axis=1))[:, ::-1]
    assert np.abs(kept - np.sort(exact)[:, ::-1][:, :5]).max() < 2e-6
