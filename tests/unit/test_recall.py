"""The bound of a recall, what an attempt is worth, the sample, and nprobe chosen on one."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from index_builder.datasets.sampling import evaluation_mask
from index_builder.errors import GateError
from index_builder.index import training
from index_builder.index.goals import Method
from index_builder.index.shards import IndexDataset
from index_builder.index.spec import IndexSpec
from index_builder.recall.calibration import CalibrationSpec, choose_nprobe
from index_builder.recall.confidence import in_random_order, lower_bound, refutes
from index_builder.recall.evaluation import measure_recall
from index_builder.recall.query_sample import QuerySample
from index_builder.recall.recall import Certificate, Promise, least_sample, raised_nprobe
from index_builder.rules.rules import JoinRules
from index_builder.search.join import JoinSpec, join_shard
from index_builder.steps import building, nprobe_choice
from index_builder.steps.build_spec import BuildSpec
from pipelines.evaluate_neighbors import check_recall
from tests.index_fixtures import (
    Catalogue,
    brute_force,
    build_index,
    clustered_catalogue,
    gaussian_catalogue,
    scattered_ids,
    write_embeddings,
    write_neighbors,
)
from tests.recall_cases import CASES, RecallCase


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=60), st.integers(0, 10**6))
def test_bound_lies_between_zero_and_the_mean(values: list[float], more: int) -> None:
    sample = np.asarray(values)
    bound = lower_bound(sample, len(sample) + more)
    assert 0 <= bound <= sample.mean()
    if more == 0:
        assert bound == sample.mean()


def test_bound_of_a_thousand_perfect_queries() -> None:
    assert 0.996 < lower_bound(np.ones(1000), 10**6) < 0.997
    # The fewer are left unseen, the less can be wrong.
    bounds = [lower_bound(np.ones(1000), rows) for rows in (10**6, 1890, 1100, 1001)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 0.999


# Recalls of 1,000 queries at k 20, 0.97 on average. Most find all, some miss one to four, a few half or
# all; and the hardest case of that mean, in which a query finds all or nothing.
REALISTIC = np.repeat([1, 0.95, 0.9, 0.8, 0.5, 0], [790, 120, 50, 20, 10, 10])
ALL_OR_NOTHING = np.repeat([1.0, 0.0], [970, 30])


@pytest.mark.parametrize("recalls", [REALISTIC, ALL_OR_NOTHING], ids=["realistic", "all or nothing"])
def test_the_bound_is_not_vacuous(recalls: NDArray[np.float64]) -> None:
    assert recalls.mean() == pytest.approx(0.97)
    assert len(recalls) == 1000
    assert 0.94 <= lower_bound(recalls, 10**9) < 0.97


def test_bound_does_not_trust_the_order_of_the_sample() -> None:
    # Failures in the last lists of an index come last in a sample that is sorted by row. Betting
    # in that order would stop, satisfied, before it had seen any of them.
    sample = np.ones(1000)
    sample[-30:] = 0
    bound = lower_bound(sample, 10**6)
    assert bound < 0.965
    assert abs(bound - lower_bound(sample[::-1], 10**6)) < 0.01


def test_the_bound_is_the_largest_refuted_mean() -> None:
    values = in_random_order(np.random.default_rng(0).beta(9, 1, 400))
    bound = lower_bound(values, 5000)
    again = in_random_order(values)
    assert refutes(again, 5000, bound, 0.05)
    assert not refutes(again, 5000, bound + 2.0**-20, 0.05)
    # The surer, the lower.
    assert lower_bound(values, 5000, 0.01) < bound < lower_bound(values, 5000, 0.2)


@pytest.mark.parametrize(
    ("values", "alpha", "message"),
    [
        ([], 0.05, "values in"),
        ([1.5], 0.05, "values in"),
        ([np.nan], 0.05, "values in"),
        ([1], 1, "alpha"),
    ],
)
def test_nonsense_has_no_bound(values: list[float], alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lower_bound(np.asarray(values, dtype=np.float64), 10, alpha)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_coverage(case: RecallCase) -> None:
    """The bound is below the truth in 95 % of runs; `make torture` takes 2,000 of them."""
    # Of 300 samples, 0.91 is more than three standard deviations below 0.95.
    assert case.coverage(300, seed=0) >= 0.91


def test_attempts_share_what_may_go_wrong() -> None:
    assert Promise(0.9).alpha(1) == pytest.approx(0.05)
    shares = [Promise(0.9, attempts=3).alpha(attempt) for attempt in (1, 2, 3)]
    assert shares == pytest.approx([0.025, 0.0125, 0.00625])
    with pytest.raises(ValueError, match="attempt is 4, wanted 1 to 3"):
        Promise(0.9, attempts=3).alpha(4)


def test_the_advice_says_how_many_queries_could_prove_a_target() -> None:
    least = least_sample(0.99, 0.05)
    assert lower_bound(np.ones(least), 10**9) >= 0.99 > lower_bound(np.ones(least // 2), 10**9)
    with pytest.raises(ValueError, match="only measuring every row"):
        least_sample(1.0, 0.05)
    recall = certificate(estimate=0.995, lower_bound=0.985, queries=500)
    with pytest.raises(GateError, match=rf"enlarge evaluate\.sample \({least} without a miss"):
        check_recall({"recall": recall}, 0.99)
    # As many as there can be: too few without a miss, and too few with some.
    for queries, rows in ((250, 1000), (468, 1890)):
        recall = certificate(estimate=0.995, lower_bound=0.985, queries=queries, rows=rows)
        with pytest.raises(GateError, match=rf"measure every row, evaluate\.sample: {rows}"):
            check_recall({"recall": recall}, 0.99)
    recall = certificate(estimate=0.97, lower_bound=0.96, nprobe=16, nlist=16)
    with pytest.raises(GateError, match="Every list was searched"):
        check_recall({"recall": recall}, 0.99)
    recall = certificate(estimate=0.97, lower_bound=0.96)
    with pytest.raises(GateError, match=r"Raise index\.nprobe, or leave it `auto`"):
        check_recall({"recall": recall}, 0.99)
    check_recall({"recall": recall}, 0.96)


def certificate(**changes: float) -> dict[str, Any]:
    plain = Certificate(0.99, 0.9, 0.8, 0.95, 1000, 10**6, 10, 4, 16, 1, 1).to_json()
    return {**plain, **changes}


def test_nprobe_is_raised_by_half() -> None:
    assert [raised_nprobe(nprobe, 100) for nprobe in (1, 2, 10, 80, 100)] == [2, 3, 15, 100, 100]


def samples(rows: int, size: int, roles: int, seed: int = 1) -> list[set[str]]:
    """The samples of all roles, each drawn from two parts and put together."""
    ids = scattered_ids(rows)
    found = []
    for role in range(roles):
        sample = QuerySample(size, seed, rows, split_seed=0, role=role, roles=roles)
        keys: dict[str, int] = {}
        for part in (ids[: rows // 3], ids[rows // 3 :]):
            places, numbers = sample.candidates(pa.chunked_array([part]))
            keys |= {part[p]: int(n) for p, n in zip(places, numbers, strict=True)}
        names = list(keys)
        chosen = sample.choose(np.asarray([keys[name] for name in names], dtype=np.uint64))
        found.append({names[place] for place in chosen})
    return found


def test_samples_are_disjoint_and_not_trained_on() -> None:
    drawn = samples(20_000, 500, 4)
    assert [len(sample) for sample in drawn] == [500] * 4
    assert len(set().union(*drawn)) == 2000
    ids = scattered_ids(20_000)
    set_apart = {
        name
        for name, apart in zip(ids, evaluation_mask(pa.array(ids), 20_000, 0), strict=True)
        if apart
    }
    assert set().union(*drawn) <= set_apart
    assert samples(20_000, 500, 4, seed=2)[0] != drawn[0]


def test_small_catalogues_are_sampled_anew_or_whole() -> None:
    first, second = samples(6000, 1000, 2)
    assert len(first) == len(second) == 1000
    first, second = samples(900, 400, 2)
    assert len(first) == len(second) == 400
    assert not first & second
    assert samples(800, 400, 2) == [set(scattered_ids(800))] * 2


def test_samples_of_small_catalogues_are_half_of_the_rows_that_were_not_trained_on() -> None:
    first, second = samples(1800, 1000, 2)
    ids = scattered_ids(1800)
    mask = evaluation_mask(pa.array(ids), 1800, 0)
    apart = {name for name, one in zip(ids, mask, strict=True) if one}
    assert first | second <= apart
    assert not first & second
    for sample in (first, second):
        assert 400 <= len(sample) <= 450
    # Only who asks for all gets all.
    assert samples(1800, 1799, 2) == [first, second]
    assert samples(1800, 1800, 2) == [set(ids)] * 2


def test_attempts_of_small_catalogues_draw_anew_from_what_did_not_calibrate() -> None:
    calibrated, first, second = samples(4000, 700, 3)
    assert len(calibrated) == len(first) == len(second) == 700
    assert not calibrated & (first | second)
    assert 0.5 < len(first & second) / 700 < 0.9


CORPUS = clustered_catalogue(1500, 16, centres=80)
REQUEST = IndexSpec(nlist=24, shards=2)


def build_spec(folder: Path, catalogue: Catalogue, calibration: CalibrationSpec) -> BuildSpec:
    """A build that has everything but an nprobe."""
    parts = write_embeddings(folder / "source", catalogue)
    resolved = REQUEST.resolve(len(catalogue), catalogue.vectors.shape[1])
    resolved = dataclasses.replace(resolved, nprobe=1, method=Method.LIST_MAJOR)
    return BuildSpec(
        str(folder / "source"), tuple(parts), resolved, str(folder / "made"), "key", None, calibration
    )


RULES = [JoinRules(), JoinRules(same=("brand",)), JoinRules(max_per=(("brand", 3),))]


@pytest.mark.parametrize("rules", RULES, ids=["no rules", "same brand", "three of a brand"])
def test_the_chosen_nprobe_is_the_smallest_that_suffices(rules: JoinRules, tmp_path: Path) -> None:
    base = clustered_catalogue(300, 16, centres=40)
    catalogue = dataclasses.replace(base, brands=[f"b{row % 7}" for row in range(len(base))])
    # The whole catalogue is the sample, so recall is known exactly.
    calibration = CalibrationSpec(Promise(0.97, sample=150, attempts=3), 10, rules)
    spec = build_spec(tmp_path, catalogue, calibration)
    trained = training.load_trained(building.train(spec))
    nprobe_choice.calibrate(spec, trained)
    figures = nprobe_choice.settled_calibration(spec)
    assert figures is not None
    assert figures["queries"] == len(catalogue)
    index = build_index(tmp_path / "index", catalogue, REQUEST)
    assert np.array_equal(index.trained.centroids, trained.centroids)

    def true_recall(nprobe: int) -> float:
        exact = wanted(index, catalogue, rules, 10)
        found = wanted(index, catalogue, rules, 10, nprobe)
        return float(
            np.mean([len(exact[q] & found[q]) / len(exact[q]) if exact[q] else 1 for q in exact])
        )

    nprobe = nprobe_choice.effective_nprobe(spec, trained)
    assert 1 < nprobe < trained.nlist
    # With a cap, a row of an unprobed list may make room for one of a probed list.
    tolerance = 0.005 if rules.max_per else 1e-9
    assert figures["estimate"] == pytest.approx(true_recall(nprobe), abs=tolerance)
    assert figures["estimate"] == figures["lower_bound"] >= 0.97
    assert true_recall(nprobe - 1) < 0.97 + tolerance


def wanted(
    index: IndexDataset, catalogue: Catalogue, rules: JoinRules, k: int, nprobe: int | None = None
) -> dict[str, set[str]]:
    """The right neighbours by query; the cap is applied to the ordered list of all candidates."""
    caps, free = dict(rules.max_per), dataclasses.replace(rules, max_per=())
    everything = brute_force(index, catalogue, free, nprobe).neighbors(len(catalogue))
    brands = dict(zip(catalogue.image_ids, catalogue.columns()["brand"], strict=True))
    found = {}
    for query, (ids, _) in everything.items():
        kept: list[str] = []
        seen: Counter[object] = Counter()
        for name in ids:
            seen[brands[name]] += 1
            if seen[brands[name]] <= caps.get("brand", len(ids)):
                kept.append(name)
        found[query] = set(kept[:k])
    return found


def test_a_sample_calibrates_for_the_certificate_to_come(tmp_path: Path) -> None:
    calibration = CalibrationSpec(Promise(0.9, sample=300, attempts=3), 10, JoinRules())
    spec = build_spec(tmp_path, CORPUS, calibration)
    trained = training.load_trained(building.train(spec))
    nprobe_choice.calibrate(spec, trained)
    figures = nprobe_choice.settled_calibration(spec)
    assert figures is not None
    assert figures["lower_bound"] > 0.9
    assert figures["queries"] == 300
    assert figures["confidence"] == 0.975
    # The choice is kept: a second call does not even read the embeddings.
    nprobe_choice.calibrate(dataclasses.replace(spec, embeddings_folder="gone"), trained)
    nprobe = nprobe_choice.effective_nprobe(spec, trained)
    assert nprobe == figures["nprobe"] < trained.nlist
    recall = certify(tmp_path, CORPUS, dataclasses.replace(REQUEST, nprobe=nprobe), calibration.promise)
    assert recall.lower_bound >= 0.9


def test_all_lists_are_taken_where_nothing_less_suffices() -> None:
    spec = CalibrationSpec(Promise(1.0, sample=50), 1, JoinRules())
    sample = spec.sample(1000, 0)
    owners, ranks = np.arange(50), np.full(50, 3)
    assert choose_nprobe(spec, sample, owners, ranks, 50, 20)["nprobe"] == 20
    lower = CalibrationSpec(Promise(0.8, sample=50), 1, JoinRules())
    assert choose_nprobe(lower, sample, owners, ranks, 50, 20)["nprobe"] == 3
    # Queries without any neighbour have nothing to lose.
    none = np.empty(0, np.int64)
    assert choose_nprobe(lower, sample, none, none, 50, 20)["nprobe"] == 1


def certify(folder: Path, catalogue: Catalogue, request: IndexSpec, promise: Promise) -> Certificate:
    """Builds, joins and certifies."""
    index = build_index(folder / "index", catalogue, request)
    spec = JoinSpec(10)
    tables = [join_shard(index, number, spec) for number in range(index.layout.shards)]
    parts = write_neighbors(folder / "neighbors", tables)
    return measure_recall(index, str(folder / "neighbors"), parts, spec, promise)


def test_the_gate_holds_when_the_catalogue_has_drifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index trained on other data: nprobe that was enough for its own catalogue no longer is."""
    request = IndexSpec(nlist=24, nprobe=3, shards=2)
    promise = Promise(0.9, sample=400)
    fitting = certify(tmp_path / "fitting", CORPUS, request, promise)
    check_recall({"recall": fitting.to_json()}, promise.target)
    other = gaussian_catalogue(1500, 16, seed=3)
    away = dataclasses.replace(other, vectors=0.5 * other.vectors + 6 * np.eye(16)[0])
    trained_elsewhere = build_index(tmp_path / "elsewhere", away, request).trained
    monkeypatch.setattr(training, "train_index", lambda spec, sample: trained_elsewhere)
    drifted = certify(tmp_path / "drifted", CORPUS, request, promise)
    assert drifted.estimate < fitting.estimate - 0.1
    with pytest.raises(GateError, match=r"evaluate\.min_recall wants 0\.9.*Nothing was published"):
        check_recall({"recall": drifted.to_json()}, promise.target)
