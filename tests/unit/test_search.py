"""Searching for new vectors gives the scores and the order of the join."""

from pathlib import Path

import numpy as np
import pytest

from index_builder.errors import ConfigError, DatasetError
from index_builder.index.goals import TransformSpec
from index_builder.index.shards import IndexDataset
from index_builder.index.spec import IndexSpec
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import unit_float16
from index_builder.search.join import JoinSpec
from index_builder.search.search import describe_neighbors, search_vectors
from tests.index_fixtures import (
    Catalogue,
    build_index,
    found_neighbors,
    gaussian_catalogue,
    join_all,
    scattered_ids,
)

CATALOGUE = gaussian_catalogue(400, 40, duplicates=0.05)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    spec = IndexSpec(transform=TransformSpec("pca", 24), nlist=12, nprobe=4, shards=3)
    return build_index(tmp_path_factory.mktemp("index"), CATALOGUE, spec)


def test_an_indexed_vector_finds_its_own_row_first(index: IndexDataset) -> None:
    unit, _ = unit_float16(CATALOGUE.vectors)
    top = search_vectors(index, unit, k=5)
    assert (top.scores[:, 0] == 1.0).all()
    results = describe_neighbors(index, top, ("brand",))
    copies = {CATALOGUE.image_ids[row] for row in (0, *range(200, 220))}
    for row, found in enumerate(results):
        image_id = CATALOGUE.image_ids[row]
        # Copies tie with each other and come by id.
        wanted = min(copies, key=str.encode) if image_id in copies else image_id
        assert found[0]["image_id"] == wanted
        assert found[0]["score"] == 1.0
        assert [neighbor["rank"] for neighbor in found] == [1, 2, 3, 4, 5]
    own = results[1][0]
    assert CATALOGUE.brands is not None
    assert own["brand"] == CATALOGUE.brands[1]


@pytest.mark.parametrize("nprobe", [None, 1, 12])
def test_search_and_join_agree(index: IndexDataset, nprobe: int | None, tmp_path: Path) -> None:
    probed = nprobe or index.nprobe
    spec = IndexSpec(transform=TransformSpec("pca", 24), nlist=12, nprobe=probed, shards=2)
    joined = found_neighbors(join_all(build_index(tmp_path, CATALOGUE, spec), JoinSpec(6)))
    unit, _ = unit_float16(CATALOGUE.vectors)
    results = describe_neighbors(index, search_vectors(index, unit, 7, nprobe), ())
    for row in range(400):
        image_id = CATALOGUE.image_ids[row]
        others = [found for found in results[row] if found["image_id"] != image_id][:6]
        ids, scores = joined[image_id]
        assert [found["image_id"] for found in others] == ids[: len(others)]
        assert [found["score"] for found in others] == scores[: len(others)]


def test_more_asked_for_than_there_is(index: IndexDataset) -> None:
    unit, _ = unit_float16(CATALOGUE.vectors[:2])
    top = search_vectors(index, unit, 1000, nprobe=12)
    assert top.counts.tolist() == [400, 400]
    assert [len(found) for found in describe_neighbors(index, top, ())] == [400, 400]


def test_a_vector_without_a_direction_is_refused(index: IndexDataset) -> None:
    broken = np.full((1, 40), np.nan, dtype=np.float16)
    with pytest.raises(DatasetError, match="1 vectors have no direction"):
        search_vectors(index, broken, 3)


@pytest.mark.parametrize("metric", [Metric.EUCLIDEAN, Metric.INNER_PRODUCT])
def test_lengths_count_under_the_other_metrics(metric: Metric, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    vectors = (rng.normal(size=(300, 20)) * rng.uniform(1, 9, size=(300, 1))).astype(np.float32)
    catalogue = Catalogue(vectors, scattered_ids(300))
    spec = IndexSpec(metric=metric, nlist=6, nprobe=6, shards=2)
    index = build_index(tmp_path, catalogue, spec, normalize=False)
    asked = rng.normal(size=(7, 20)).astype(np.float32)
    top = search_vectors(index, asked, 4)
    codes = index.trained.transform.apply(vectors).astype(np.float64)
    q = index.trained.transform.apply(asked).astype(np.float64)
    scores = q @ codes.T
    if metric is Metric.EUCLIDEAN:
        scores = 2 * scores - (q * q).sum(axis=1)[:, None] - (codes * codes).sum(axis=1)
    scores = (scores * index.trained.transform.unscale).astype(np.float32)
    wanted = np.sort(scores, axis=1)[:, ::-1][:, :4]
    assert (top.scores == wanted).all()
    for row, found in enumerate(describe_neighbors(index, top, ())):
        ids = [catalogue.image_ids[place] for place in np.argsort(-scores[row])[:4]]
        assert [neighbor["image_id"] for neighbor in found] == ids
    with pytest.raises(DatasetError, match="longer"):
        search_vectors(index, vectors * 64, 4)


def test_the_best_image_of_an_item_is_found(tmp_path: Path) -> None:
    base = gaussian_catalogue(90, 16, seed=8)
    items = [f"item-{row // 3}" for row in range(90)]
    catalogue = Catalogue(base.vectors, base.image_ids, item_ids=items)
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=4, nprobe=4, shards=2))
    unit, _ = unit_float16(base.vectors)
    top = search_vectors(index, unit, 30)
    item_of = dict(zip(base.image_ids, items, strict=True))
    for row, found in enumerate(describe_neighbors(index, top, ("item_id",))):
        assert len({neighbor["item_id"] for neighbor in found}) == 30
        assert found[0]["image_id"] == base.image_ids[row]
        assert all(item_of[str(one["image_id"])] == one["item_id"] for one in found)


@pytest.mark.parametrize("nprobe", [0, 13])
def test_more_lists_than_there_are_is_refused(index: IndexDataset, nprobe: int) -> None:
    unit, _ = unit_float16(CATALOGUE.vectors[:1])
    with pytest.raises(ConfigError, match=f"nprobe is {nprobe}, but the index .* has 12 lists"):
        search_vectors(index, unit, 3, nprobe)
