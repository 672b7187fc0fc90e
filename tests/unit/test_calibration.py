"""nprobe is chosen on the recall that will be certified: under the rules, without excluded pairs."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from index_builder import library
from index_builder.index import training
from index_builder.index.assignment import nearest_lists, places_of_lists
from index_builder.index.goals import Goal
from index_builder.index.shards import open_index
from index_builder.index.spec import IndexSpec
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.recall import Promise
from index_builder.rules.conditions import Condition
from index_builder.rules.exclusions import ExclusionSpec, find_exclusions, read_pairs_of
from index_builder.rules.rules import JoinRules
from index_builder.scoring.metrics import Metric
from index_builder.steps import building, nprobe_choice
from tests.index_fixtures import Catalogue, build_index, clustered_catalogue
from tests.unit.rules_for_tests import expected
from tests.unit.test_exclusions import write_pairs
from tests.unit.test_recall import REQUEST, build_spec

K = 6


@pytest.mark.parametrize("metric", list(Metric))
def test_the_place_of_a_list_is_that_in_the_whole_order(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(70, 6)).astype(np.float16)
    # Many centroids are equal, so that lists tie.
    centroids = rng.integers(-1, 2, size=(90, 6)).astype(np.float16)
    order = nearest_lists(vectors, centroids, 90, metric)
    owners = np.repeat(np.arange(70), 3)
    lists = rng.integers(90, size=210)
    places = places_of_lists(vectors, centroids, owners, lists, metric)
    assert places.tolist() == [
        1 + int(np.flatnonzero(order[owner] == number)[0])
        for owner, number in zip(owners, lists, strict=True)
    ]


def test_few_queries_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors, centroids = (rng.normal(size=(n, 8)).astype(np.float16) for n in (40, 30))
    owners, lists = np.sort(rng.integers(40, size=200)), rng.integers(30, size=200)

    def places() -> NDArray[np.int64]:
        return places_of_lists(vectors, centroids, owners, lists)

    usual = places()
    monkeypatch.setattr("index_builder.index.assignment._SORTED_NUMBERS", 1)
    assert np.array_equal(places(), usual)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    base = clustered_catalogue(300, 16, centres=40)
    return dataclasses.replace(
        base,
        item_ids=[f"item{row // 2}" for row in range(300)],
        brands=[f"b{row % 7}" for row in range(300)],
    )


@pytest.mark.parametrize("by", ["image_id", "item_id"])
def test_excluded_pairs_are_no_neighbours_that_could_be_missed(
    by: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    """The four nearest of every query are excluded: those left are farther, in more lists."""
    index = build_index(tmp_path / "index", catalogue, REQUEST)
    rules = JoinRules(candidates=(Condition("brand", not_in=("b1",)),))
    names = dict(zip(catalogue.image_ids, catalogue.columns()[by], strict=True))
    nearest = expected(index, catalogue, rules, 4)
    pairs = sorted({(names[q], names[x]) for q, (found, _) in nearest.items() for x in found})
    # A pair of strangers excludes nothing; the join would name it.
    path = write_pairs(tmp_path / "pairs.parquet", [*pairs, ("nobody", "nothing"), (pairs[0][0], None)])
    files = find_exclusions(ExclusionSpec((path,), by, symmetric=True))
    promise = Promise(0.97, sample=150, attempts=3)
    plain = CalibrationSpec(promise, K, rules)
    excluding = dataclasses.replace(plain, exclusions=files)
    assert plain.fingerprint_value() != excluding.fingerprint_value()
    chosen = {}
    for name, calibration in (("plain", plain), ("excluding", excluding)):
        spec = build_spec(tmp_path / name, catalogue, calibration)
        trained = training.load_trained(building.train(spec))
        nprobe_choice.calibrate(spec, trained)
        figures = nprobe_choice.settled_calibration(spec)
        assert figures is not None
        chosen[name] = figures
    settled = dataclasses.replace(rules, exclude=files.rule())
    exact = expected(index, catalogue, settled, K, excluded=pairs)
    recalls = []
    probed = expected(index, catalogue, settled, K, chosen["excluding"]["nprobe"], excluded=pairs)
    for query, (found, _) in exact.items():
        recalls.append(len(set(found) & set(probed[query][0])) / len(found) if found else 1)
    # The whole catalogue is the sample, so the figure is the recall itself, up to second images.
    assert chosen["excluding"]["estimate"] == pytest.approx(np.mean(recalls), abs=0.003)
    assert chosen["plain"]["nprobe"] < chosen["excluding"]["nprobe"]


def test_pairs_of_some_queries_are_read_from_the_files(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "p.parquet", [("a", "b"), ("c", "a"), ("d", "e"), ("a", None)])
    for symmetric, wanted in ((False, [("a", "b")]), (True, [("a", "b"), ("a", "c")])):
        files = find_exclusions(ExclusionSpec((path,), symmetric=symmetric))

        table = read_pairs_of(files, pa.array(["a", None, "b"] if not symmetric else ["a"]))
        assert sorted(zip(*(column.to_pylist() for column in table.columns), strict=True)) == wanted


def test_columns_of_groups_are_said_to_be_left_out(catalogue: Catalogue, tmp_path: Path) -> None:
    rules = JoinRules(same=("brand",), max_per=(("group", 1),))
    spec = build_spec(tmp_path, catalogue, CalibrationSpec(Promise(0.9, sample=150), K, rules))
    nprobe_choice.calibrate(spec, training.load_trained(building.train(spec)))
    figures = nprobe_choice.settled_calibration(spec)
    assert figures is not None
    assert figures["rules_left_out"] == ["group"]


def test_the_library_calibrates_without_excluded_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small an index would be searched whole.
    monkeypatch.setattr("index_builder.index.spec.LEAST_GAIN_OF_LISTS", 0)
    base = clustered_catalogue(400, 16, centres=40)
    source = library.import_arrays(base.vectors, base.image_ids, str(tmp_path / "embeddings"))
    path = write_pairs(tmp_path / "p.parquet", [(name, "i0") for name in base.image_ids[1:]])
    goal, promise = Goal(k=5, min_recall=0.9), Promise(0.9, sample=100)
    made = [
        library.build(
            source, str(tmp_path / name), IndexSpec(nlist=16), goal, promise=promise, exclusions=pairs
        )
        for name, pairs in (("plain", None), ("excluding", ExclusionSpec((path,))))
    ]
    plain, excluding = (open_index(folder).manifest for folder in made)
    assert plain.fingerprint != excluding.fingerprint
    assert excluding.properties["calibration"]["nprobe"] == excluding.properties["nprobe"]
