"""Which method is cheapest: the model against what was measured, and the choices that follow."""

import pytest

from index_builder.index import method_cost
from index_builder.index.goals import Encoding, Goal, Method
from index_builder.index.memory import join_row_bytes
from index_builder.index.method_cost import (
    LEAST_GAIN,
    Night,
    codes_cost,
    codes_over_pairs,
    probed_rows,
    vectors_cost,
)
from index_builder.index.spec import IndexSpec
from index_builder.index.training import KMEANS_ITERATIONS
from index_builder.recall.recall import Promise

# (dim, nprobe, rows probed, k, bfloat16, microseconds by vectors, by codes): one core, refine 10.
SEARCHED = [
    (256, 8, 375, 21, False, 12.6, 36.3),
    (256, 64, 2703, 21, False, 28.3, 53.3),
    (256, 4, 1024, 21, True, 8.8, 39.1),
    (256, 32, 7805, 21, True, 17.0, 54.0),
    (256, 64, 20_000, 100, True, 52.2, 191.3),
    (1280, 8, 1555, 21, False, 41.7, 83.6),
    (1280, 32, 5776, 21, False, 115.9, 107.8),
    (1280, 86, 14_966, 21, False, 283.5, 171.4),
]
# Core seconds from vectors to neighbours, k 21: (rows, dim, bfloat16, recall), of exact, and of
# list-major with (nlist, nprobe), calibration apart. Recall 0 is none promised.
NIGHTS = [
    (5_000, 64, False, 0.0, 0.20, (128, 46), 0.19, 0.00),
    (5_000, 64, True, 0.9, 0.22, (128, 9), 0.27, 0.20),
    (5_000, 64, False, 0.99, 0.20, (128, 26), 0.19, 0.19),
    (10_000, 1280, False, 0.0, 2.47, (256, 64), 1.92, 0.00),
    (10_000, 1280, True, 0.9, 1.41, (256, 5), 1.16, 1.32),
    (10_000, 1280, False, 0.9, 2.47, (256, 5), 1.25, 1.23),
    (20_000, 64, True, 0.9, 0.69, (512, 12), 0.60, 0.31),
    (20_000, 64, False, 0.9, 0.80, (512, 12), 0.61, 0.30),
    (20_000, 64, False, 0.99, 0.80, (512, 68), 0.91, 0.31),
    (20_000, 256, False, 0.0, 1.75, (512, 91), 1.52, 0.00),
    (20_000, 256, True, 0.9, 0.96, (512, 6), 0.74, 0.50),
    (20_000, 256, False, 0.9, 1.75, (512, 6), 0.87, 0.53),
    (20_000, 256, False, 0.99, 1.75, (512, 31), 1.06, 0.53),
    (24_000, 128, False, 0.9, 1.55, (615, 7), 0.86, 0.44),
    (24_000, 128, True, 0.99, 0.89, (615, 40), 0.99, 0.41),
    (30_000, 1280, True, 0.0, 4.82, (693, 106), 5.20, 0.00),
    (30_000, 1280, True, 0.9, 4.82, (693, 4), 3.36, 2.31),
    (30_000, 1280, False, 0.99, 15.66, (693, 20), 6.05, 2.54),
    (50_000, 64, True, 0.9, 2.27, (894, 11), 1.83, 0.53),
    (50_000, 64, True, 0.99, 2.27, (894, 82), 2.74, 0.52),
    (50_000, 256, True, 0.0, 3.50, (894, 120), 3.98, 0.00),
    (50_000, 256, True, 0.9, 3.50, (894, 5), 2.34, 0.98),
    (50_000, 256, False, 0.9, 8.98, (894, 5), 3.11, 0.95),
    (50_000, 256, True, 0.99, 3.50, (894, 40), 3.04, 0.96),
    (200_000, 256, True, 0.9, 41.15, (1789, 6), 12.42, 3.36),
]


@pytest.mark.parametrize(("dim", "nprobe", "probed", "k", "bfloat16", "vectors", "codes"), SEARCHED)
def test_the_model_knows_the_time_of_a_search(
    dim: int, nprobe: int, probed: int, k: int, bfloat16: bool, vectors: float, codes: float
) -> None:
    by_vectors = vectors_cost(probed, dim, k, nprobe, bfloat16)
    by_codes = codes_cost(probed, dim, 10 * k, nprobe)
    assert by_vectors == pytest.approx(1000 * vectors, rel=0.2)
    assert by_codes == pytest.approx(1000 * codes, rel=0.2)
    picked = codes if by_vectors / by_codes >= LEAST_GAIN else vectors
    assert picked <= 1.2 * min(vectors, codes)


@pytest.mark.parametrize(
    ("rows", "dim", "bfloat16", "recall", "exact", "lists", "rest", "calibration"), NIGHTS
)
def test_auto_picks_the_method_with_the_shorter_night(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    dim: int,
    bfloat16: bool,
    recall: float,
    exact: float,
    lists: tuple[int, int],
    rest: float,
    calibration: float,
) -> None:
    monkeypatch.setattr("index_builder.index.spec.multiplies_bfloat16", lambda: bfloat16)
    night, (nlist, nprobe) = Night(rows, dim, 21, bfloat16), lists
    every = night.cost(min(rows, 64 * 128), 64, 64, calibrated=False)
    some = night.cost(min(rows, nlist * 128), nlist, nprobe, calibrated=recall > 0)
    assert every == pytest.approx(1e9 * exact, rel=0.2)
    list_major = rest + 2 * calibration
    assert some == pytest.approx(1e9 * list_major, rel=0.2)
    chosen = IndexSpec().resolve(rows, dim, Goal(21, recall))
    seconds = {Method.EXACT: exact, Method.LIST_MAJOR: list_major}
    assert seconds[chosen.method] <= 1.2 * min(seconds.values())


def test_the_model_speaks_of_the_builds_own_numbers() -> None:
    assert method_cost.ROUNDS == KMEANS_ITERATIONS
    assert Promise().sample == method_cost.CALIBRATION_QUERIES


def test_the_host_decides_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def multiplies_bfloat16() -> bool:
        asked.append(True)
        return len(asked) == 1

    monkeypatch.setattr("index_builder.index.spec.multiplies_bfloat16", multiplies_bfloat16)
    goal = Goal(21, 0.99)
    assert IndexSpec().resolve(5_000, 256, goal).method is Method.EXACT
    assert IndexSpec().resolve(1_000_000, 256, goal).method is Method.LIST_MAJOR
    assert not asked
    methods = [IndexSpec().resolve(50_000, 256, goal).method for _ in range(2)]
    assert methods == [Method.EXACT, Method.LIST_MAJOR]


def test_codes_have_to_be_learned_and_lists_ranked() -> None:
    plain, coded = Night(50_000, 256, 21, False), Night(50_000, 256, 21, False, 210)
    few, many = (night.cost(50_000, 894, 5, calibrated=True) for night in (plain, coded))
    # Measured: 4.1 and 6.2 s.
    assert 1.3 < many / few < 1.7
    assert plain.cost(50_000, 894, 50, calibrated=True) > 1.1 * few


def test_codes_do_not_pay_for_a_few_rows() -> None:
    for k in (1, 5, 20, 100):
        for dim in (128, 256, 1280):
            assert vectors_cost(10 * k, dim, k, 4) < 1.2 * codes_cost(10 * k, dim, 10 * k, 4)


def test_a_query_probes_larger_lists_than_the_mean() -> None:
    assert probed_rows(1000, 10, 2) == 300
    assert probed_rows(1000, 10, 9) == probed_rows(1000, 10, 10) == 1000


def test_a_host_that_multiplies_in_bfloat16_needs_codes_later() -> None:
    by_vectors = [vectors_cost(30_000, 1280, 21, 180, rounded) for rounded in (False, True)]
    by_codes = codes_cost(30_000, 1280, 210, 180)
    assert by_vectors[0] > LEAST_GAIN * by_codes
    assert by_vectors[1] < by_codes
    shares = [codes_over_pairs(30_000, 1280, 210, 180, rounded) for rounded in (False, True)]
    assert shares[0] < 1 < shares[1]


def test_auto_takes_codes_where_a_promise_allows_them_and_they_are_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index_builder.index.spec.multiplies_bfloat16", lambda: False)
    promised = Goal(k=21, min_recall=0.95)
    few = IndexSpec(nlist=1789, nprobe=16).resolve(200_000, 256, promised)
    assert (few.method, few.may_have_codes) == (Method.LIST_MAJOR, False)
    assert few.reasons[3].startswith("encoding float16: 512 bytes a vector, codes would be 0.")
    many = IndexSpec(nlist=1789, nprobe=180).resolve(200_000, 1280, promised)
    assert (many.method, many.encoding, many.refine) == (Method.COMPRESSED, Encoding.COMPRESSED, 10)
    assert many.reasons[3] == (
        "encoding compressed: codes of 160 bytes propose 10 rows a neighbour, "
        "1.8 times as fast as float16"
    )
    # Without a promise the neighbours are those of the probed lists, all of them.
    assert IndexSpec(nlist=1789, nprobe=180).resolve(200_000, 1280).method is Method.LIST_MAJOR
    assert not IndexSpec().resolve(200_000, 127, promised).may_have_codes
    strict = Goal(k=21, min_recall=0.99)
    assert not IndexSpec(nlist=1789, nprobe=180).resolve(200_000, 1280, strict).may_have_codes
    # With a free nprobe it is decided once that is calibrated, if codes may be faster at all.
    free = IndexSpec().resolve(200_000, 1280, promised)
    assert (free.method, free.may_have_codes) == (Method.LIST_MAJOR, True)
    assert "unless codes are faster with the nprobe of calibration" in free.reasons[3]
    monkeypatch.setattr("index_builder.index.spec.multiplies_bfloat16", lambda: True)
    rounded = IndexSpec().resolve(200_000, 1280, promised)
    assert (rounded.method, rounded.may_have_codes) == (Method.LIST_MAJOR, False)


def test_a_given_encoding_is_taken() -> None:
    codes = IndexSpec(encoding=Encoding.COMPRESSED, refine=4).resolve(1000, 64)
    assert (codes.method, codes.refine) == (Method.COMPRESSED, 4)
    assert codes.reasons[3].endswith("propose 4 rows a neighbour, as configured")
    assert codes.reasons[0].startswith("method compressed: 1000 vectors")
    plain = IndexSpec(encoding=Encoding.FLOAT16, nlist=1789, nprobe=180)
    assert plain.resolve(200_000, 1280, Goal(k=21, min_recall=0.9)).method is Method.LIST_MAJOR


def test_proposals_are_part_of_a_tasks_memory() -> None:
    assert join_row_bytes(256, 16, 20, 10) == join_row_bytes(256, 16, 20) + 32 + 64 + 16 * 200
