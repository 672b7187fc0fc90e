"""Choices that are left to Kith, and requests that cannot be built."""

import re

import pytest

from index_builder.errors import ConfigError
from index_builder.fingerprints import fingerprint
from index_builder.spec import (
    MIN_POINTS_PER_CENTROID,
    IndexSpec,
    TransformSpec,
    check_training_memory,
)


@pytest.mark.parametrize(
    "rows", [1, 2, 38, 39, 77, 78, 1_890, 10_000, 20_000, 20_001, 2_000_000, 10_000_000_000]
)
def test_automatic_choices_fit(rows: int) -> None:
    spec = IndexSpec().resolve(rows, 1280)
    assert 1 <= spec.nprobe <= spec.nlist <= spec.sample <= rows
    assert spec.sample == min(rows, 500_000)
    assert spec.nlist == 1 or spec.sample // spec.nlist >= MIN_POINTS_PER_CENTROID
    assert 1 <= spec.shards <= rows
    # Small catalogues are searched exactly.
    assert (spec.nprobe == spec.nlist) == (rows <= 20_000)


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
    spec = IndexSpec(transform=TransformSpec("pca", 256)).resolve(600_000, 25_088)
    needed = 500_000 * 25_088 * 12 + 3 * 25_088**2 * 8
    assert spec.training_bytes == needed
    check_training_memory(spec, needed)
    message = (
        "Training the index would take 154.3 GiB (500000 vectors of 25088 numbers, transform "
        "pca), index.memory_limit_gib allows 8.0. Lower index.training_rows to about 28532,"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_training_memory(spec, 8 << 30)


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
