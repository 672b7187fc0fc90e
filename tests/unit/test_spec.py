"""Choices that are left to Kith, and requests that cannot be built."""

import re

import pytest

from index_builder.datasets.fingerprints import fingerprint
from index_builder.errors import ConfigError
from index_builder.index.goals import Goal, Method, TransformSpec
from index_builder.index.memory import join_row_bytes
from index_builder.index.spec import MIN_POINTS_PER_CENTROID, IndexSpec, check_training_memory
from index_builder.scoring.metrics import Metric


@pytest.fixture(autouse=True)
def multiply_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are those of a host without bfloat16, whatever this one is."""
    monkeypatch.setattr("index_builder.index.spec.multiplies_bfloat16", lambda: False)


@pytest.mark.parametrize(
    "rows", [1, 2, 38, 39, 77, 78, 1_890, 10_000, 20_000, 20_001, 2_000_000, 10_000_000_000]
)
def test_automatic_choices_fit(rows: int) -> None:
    spec = IndexSpec().resolve(rows, 1280)
    assert 1 <= spec.nprobe <= spec.nlist <= spec.sample <= rows
    assert spec.sample == min(rows, 500_000)
    assert spec.nlist == 1 or spec.sample // spec.nlist >= MIN_POINTS_PER_CENTROID
    assert 1 <= spec.shards <= rows
    # Small catalogues are searched exactly, of larger ones near lists.
    assert (spec.nprobe == spec.nlist) == (rows <= 1_890)


def test_automatic_choices_at_known_sizes() -> None:
    small = IndexSpec().resolve(1_890, 1280)
    assert (small.nlist, small.nprobe, small.shards) == (48, 48, 1)
    large = IndexSpec().resolve(1_000_000, 256)
    assert (large.nlist, large.nprobe, large.shards) == (4000, 253, 2)


def test_given_values_are_taken_and_shards_never_outnumber_rows() -> None:
    spec = IndexSpec(nlist=7, nprobe=3, shards=50, training_rows=20).resolve(30, 64)
    assert (spec.nlist, spec.nprobe, spec.shards, spec.sample) == (7, 3, 30, 20)


def refused(spec: IndexSpec, rows: int, dim: int) -> str:
    with pytest.raises(ConfigError) as raised:
        spec.resolve(rows, dim)
    assert raised.value.exit_status == 2
    return str(raised.value)


def test_an_empty_catalogue() -> None:
    message = "The index would be empty: there are 0 embeddings. Embed images first."
    assert refused(IndexSpec(), 0, 64) == message


def test_more_lists_than_training_vectors() -> None:
    assert refused(IndexSpec(nlist=101), 100, 64) == (
        "index.nlist is 101, but only 100 vectors are there to train on (100 embeddings, "
        "index.training_rows 500000). Set index.nlist: auto or at most 100."
    )
    assert refused(IndexSpec(nlist=101, training_rows=50), 100, 64) == (
        "index.nlist is 101, but only 50 vectors are there to train on (100 embeddings, "
        "index.training_rows 50). Set index.nlist: auto or at most 50."
    )
    assert IndexSpec(nlist=100).resolve(100, 64).nlist == 100


def test_more_probes_than_lists() -> None:
    message = "index.nprobe is 9, but the index has 8 lists. Set index.nprobe: auto or at most 8."
    assert refused(IndexSpec(nlist=8, nprobe=9), 1000, 64) == message
    assert IndexSpec(nlist=8, nprobe=8).resolve(1000, 64).nprobe == 8


def test_more_dimensions_than_the_encoder_gives() -> None:
    spec = IndexSpec(transform=TransformSpec("pca", 65))
    assert refused(spec, 1000, 64) == (
        "index.transform.dim is 65, but the embeddings have dim 64. "
        "Set index.transform.dim to at most 64, or index.transform.type: none."
    )
    assert IndexSpec(transform=TransformSpec("pca", 64)).resolve(1000, 64).encoder_dim == 64
    # Without a transform its dim means nothing.
    assert IndexSpec(transform=TransformSpec("none", 65)).resolve(1000, 64).encoder_dim == 64


def test_training_that_takes_too_much_memory() -> None:
    spec = IndexSpec(transform=TransformSpec("pca", 256)).resolve(600_000, 1280)
    # The sample, what k-means looks at (2 bytes a number and 120 a row), and four times its centroids.
    sample, lists = 500_000 * 1280 * 2, spec.nlist
    wanted = sample + lists * 128 * (256 * 2 + 120) + 4 * lists * 256 * 2
    assert spec.training_bytes == wanted
    check_training_memory(spec, wanted)
    message = (
        "Training the index would take 1.43 GiB (500000 vectors of 1280 numbers, transform pca), "
        "index.memory_limit_gib allows 1.00 GiB. Lower index.training_rows to about 334397, choose a "
        "pooling with fewer dimensions, or raise the limit."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_training_memory(spec, 1 << 30)
    fewer = IndexSpec(transform=TransformSpec("pca", 256), training_rows=334_397)
    check_training_memory(fewer.resolve(600_000, 1280), 1 << 30)


def test_a_transform_that_no_sample_makes_small_enough() -> None:
    request = IndexSpec(transform=TransformSpec("pca", 256), training_rows=1000)
    spec = request.resolve(600_000, 25_088)
    message = "Training the index would take 18.8 GiB (1000 vectors of 25088 numbers, transform pca)"
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        check_training_memory(spec, 8 << 30)
    assert (
        "The covariance of 25088 numbers alone takes 18.8 GiB: set index.transform.type: none"
        in str(raised.value)
    )


def test_a_sample_of_float32_takes_twice_the_memory() -> None:
    transform = TransformSpec("pca", 2)
    plain = IndexSpec(transform=transform).resolve(100_000, 64)
    scaled = IndexSpec(Metric.EUCLIDEAN, transform).resolve(100_000, 64)
    assert scaled.training_bytes - plain.training_bytes == 100_000 * 64 * 2


def test_every_choice_has_a_reason() -> None:
    spec = IndexSpec().resolve(1_000_000, 256, Goal(k=20, min_recall=0.95))
    assert spec.reasons == (
        "method list_major: 1000000 vectors are compared where lists are near, "
        "6.9 times as fast as all with all",
        "nlist 4000: 4 sqrt(N), 250 rows a list",
        "nprobe 253: 4 sqrt(nlist), evaluate.min_recall 0.95",
        "encoding float16: 512 bytes a vector, unless codes are faster with the nprobe of calibration",
        "shards 2: 244.1 MiB of codes each, at most 256",
    )
    assert spec.choices() == {
        "method": "list_major",
        "encoding": "float16",
        "refine": None,
        "nlist": 4000,
        "nprobe": 253,
        "shards": 2,
    }
    few = IndexSpec().resolve(20_000, 256, Goal(k=20, min_recall=0.95))
    assert few.reasons[:3] == (
        "method exact: 20000 vectors are compared all with all, near lists would be 0.52 times as fast",
        "nlist 64: all are searched, so more lists save nothing",
        "nprobe 64: all lists",
    )
    given = IndexSpec(nlist=9, nprobe=9, shards=3).resolve(100_000, 64)
    assert given.method is Method.EXACT
    assert [reason.split(":")[1] for reason in given.reasons[:3]] == [
        " follows from index.nlist and index.nprobe as configured",
        " as configured",
        " as configured",
    ]


def test_small_catalogues_are_compared_all_with_all_in_few_lists() -> None:
    promised = Goal(min_recall=0.95)
    spec = IndexSpec().resolve(20_000, 256, promised)
    assert (spec.method, spec.nlist, spec.nprobe) == (Method.EXACT, 64, 64)
    assert IndexSpec().resolve(50_000, 256, promised).method is Method.LIST_MAJOR
    # Choosing nprobe for a promise takes as long as comparing some thousand vectors does.
    assert IndexSpec().resolve(10_000, 1280, promised).method is Method.EXACT
    assert IndexSpec().resolve(10_000, 1280).method is Method.LIST_MAJOR
    # Lists that are asked for are there anyway.
    lists = IndexSpec(nlist=512).resolve(20_000, 256, Goal(min_recall=0.9))
    assert (lists.method, lists.nlist) == (Method.LIST_MAJOR, 512)
    # A given nprobe is of as many lists as there would be otherwise.
    assert IndexSpec(nprobe=5).resolve(20_000, 256).nlist == 512


def test_a_higher_recall_starts_with_more_probes() -> None:
    goals = (0.0, 0.5, 0.9, 0.95, 0.97, 0.98, 0.999, 1.0)
    chosen = [IndexSpec().resolve(1_000_000, 256, Goal(min_recall=goal)).nprobe for goal in goals]
    assert chosen == [253, 127, 127, 253, 253, 380, 506, 506]


def test_the_probed_lists_hold_ten_rows_a_neighbor() -> None:
    spec = IndexSpec().resolve(400_000, 1280, Goal(k=5000))
    assert spec.nprobe == 317 == -(-10 * 5000 * spec.nlist // 400_000)
    assert "10 rows a neighbour, k 5000" in spec.reasons[2]
    # Where that is every list few of them do.
    assert IndexSpec().resolve(100_000, 64, Goal(k=10_000)).nprobe == 64


def test_little_memory_makes_smaller_shards() -> None:
    large = IndexSpec().resolve(1_000_000, 256, Goal(memory_limit_bytes=8 << 30))
    small = IndexSpec().resolve(1_000_000, 256, Goal(memory_limit_bytes=256 << 20))
    assert small.shards >= 20 * large.shards
    rows = -(-1_000_000 // small.shards)
    assert rows * join_row_bytes(256, small.nprobe, 20) <= 128 << 20
    assert small.reasons[-1].endswith("joining one takes 50% of index.memory_limit_gib")
    # A run is an eighth of the limit, or a quarter with the probes where those take more.
    with_probes = small.run_bytes * (2 * 256 + 4 * small.nprobe) / (2 * 256)
    assert with_probes == pytest.approx(64 << 20, rel=1e-4)
    few = IndexSpec(nprobe=8).resolve(1_000_000, 256, Goal(memory_limit_bytes=256 << 20))
    assert few.run_bytes == 32 << 20 < large.run_bytes


def test_every_choice_is_part_of_the_fingerprint() -> None:
    requests = [
        IndexSpec(),
        IndexSpec(nlist=8),
        IndexSpec(nprobe=8),
        IndexSpec(shards=8),
        IndexSpec(training_rows=8),
        IndexSpec(seed=8),
        IndexSpec(transform=TransformSpec("pca")),
        IndexSpec(transform=TransformSpec("pca", 8)),
        IndexSpec(transform=TransformSpec("pca", eigen_power=0)),
    ]
    prints = {fingerprint(request.fingerprint_value()) for request in requests}
    assert len(prints) == len(requests)
