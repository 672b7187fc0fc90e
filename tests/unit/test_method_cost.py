"""When codes are faster: the model against what was measured, and the choice that follows."""

import pytest

from index_builder.index.method_cost import LEAST_GAIN, codes_cost, probed_rows, vectors_cost
from index_builder.index.spec import Encoding, Goal, IndexSpec, Method, join_row_bytes

# (dim, rows probed, proposals, microseconds by vectors, by codes): one run, one core, k 21.
MEASURED = [
    (256, 3906, 210, 46.9, 70.0),
    (256, 7677, 210, 79.6, 80.1),
    (1280, 3055, 210, 152.2, 147.1),
    (1280, 7342, 210, 327.2, 184.9),
]


@pytest.mark.parametrize(("dim", "probed", "proposals", "vectors", "codes"), MEASURED)
def test_the_model_picks_what_was_faster(
    dim: int, probed: int, proposals: int, vectors: float, codes: float
) -> None:
    assert vectors_cost(probed, dim, k=21) == pytest.approx(1000 * vectors, rel=0.12)
    assert codes_cost(probed, dim, proposals) == pytest.approx(1000 * codes, rel=0.12)
    gain = vectors_cost(probed, dim, k=21) / codes_cost(probed, dim, proposals)
    picked = codes if gain >= LEAST_GAIN else vectors
    assert picked <= 1.2 * min(vectors, codes)


def test_codes_do_not_pay_for_a_few_rows() -> None:
    for k in (1, 5, 20, 100):
        for dim in (128, 256, 1280):
            assert vectors_cost(10 * k, dim, k) < 1.2 * codes_cost(10 * k, dim, 10 * k)


def test_a_query_probes_larger_lists_than_the_mean() -> None:
    assert probed_rows(1000, 10, 2) == 300
    assert probed_rows(1000, 10, 9) == probed_rows(1000, 10, 10) == 1000


def test_a_host_that_multiplies_in_bfloat16_needs_codes_later() -> None:
    for dim, probed in ((256, 4_145), (1280, 4_145)):
        rounded, plain = (vectors_cost(probed, dim, 21, bfloat16) for bfloat16 in (True, False))
        # Measured on a CPU with AMX: 1.9 and 2.8 times.
        assert 1.5 < plain / rounded < 3
    assert vectors_cost(20_000, 256, 21) > LEAST_GAIN * codes_cost(20_000, 256, 210)
    assert vectors_cost(20_000, 256, 21, bfloat16=True) < codes_cost(20_000, 256, 210)


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
        "2.8 times as fast as float16"
    )
    # Without a promise the neighbours are those of the probed lists, all of them.
    assert IndexSpec(nlist=1789, nprobe=180).resolve(200_000, 1280).method is Method.LIST_MAJOR
    assert not IndexSpec().resolve(200_000, 127, promised).may_have_codes
    strict = Goal(k=21, min_recall=0.99)
    assert not IndexSpec(nlist=1789, nprobe=180).resolve(200_000, 1280, strict).may_have_codes
    # With a free nprobe it is decided once that is calibrated.
    free = IndexSpec().resolve(200_000, 1280, promised)
    assert (free.method, free.may_have_codes) == (Method.LIST_MAJOR, True)


def test_a_given_encoding_is_taken() -> None:
    codes = IndexSpec(encoding=Encoding.COMPRESSED, refine=4).resolve(1000, 64)
    assert (codes.method, codes.refine) == (Method.COMPRESSED, 4)
    assert codes.reasons[3].endswith("propose 4 rows a neighbour, as configured")
    assert codes.reasons[0].startswith("method compressed: 1000 vectors")
    plain = IndexSpec(encoding=Encoding.FLOAT16, nlist=1789, nprobe=180)
    assert plain.resolve(200_000, 1280, Goal(k=21, min_recall=0.9)).method is Method.LIST_MAJOR


def test_proposals_are_part_of_a_tasks_memory() -> None:
    assert join_row_bytes(256, 16, 20, 10) == join_row_bytes(256, 16, 20) + 32 + 64 + 16 * 200
