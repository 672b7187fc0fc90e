"""Samples: seeded, without repetition, over every part; evaluation rows set apart from training."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index_builder.datasets import embeddings
from index_builder.datasets.sampling import (
    EVALUATION_ROWS,
    evaluation_mask,
    evaluation_overlaps_training,
    evaluation_rows,
    read_sample,
    sample_rows,
)
from index_builder.scoring.vectors import unit_float16
from tests.index_fixtures import gaussian_catalogue, write_embeddings


@pytest.mark.parametrize(("rows", "sample"), [(1000, 1), (1000, 300), (1000, 999), (10**10, 500)])
def test_rows_are_different_ascending_and_seeded(rows: int, sample: int) -> None:
    chosen = sample_rows(rows, sample, seed=7)
    assert chosen.dtype == np.int64
    assert len(chosen) == sample
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < rows
    np.testing.assert_array_equal(chosen, sample_rows(rows, sample, seed=7))
    assert not np.array_equal(chosen, sample_rows(rows, sample, seed=8))


@pytest.mark.parametrize("sample", [5, 6, 100])
def test_a_sample_of_everything_is_everything(sample: int) -> None:
    assert sample_rows(5, sample, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_every_row_has_the_same_chance() -> None:
    counts = np.zeros(50)
    for seed in range(2000):
        counts[sample_rows(50, 10, seed)] += 1
    # 400 expected, standard deviation 18.
    assert counts.min() > 310
    assert counts.max() < 490


def test_vectors_are_those_of_the_chosen_rows(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(600, 8)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=4)
    unit, _ = unit_float16(catalogue.vectors)
    found = read_sample(str(tmp_path / "e"), parts, 90, seed=3)
    chosen = sample_rows(600, 90, seed=3)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, unit[chosen])
    # Every part is drawn from, in about its share.
    by_part = np.bincount(chosen // 150, minlength=4)
    assert by_part.sum() == 90
    assert by_part.min() > 10
    whole = read_sample(str(tmp_path / "e"), parts, 600, seed=3)
    np.testing.assert_array_equal(whole, unit)


def test_row_groups_without_a_chosen_row_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = write_embeddings(tmp_path / "e", gaussian_catalogue(600, 8), parts=1)
    read = []
    original = embeddings.pq.ParquetFile.read_row_group

    def watch(self: object, group: int, **options: object) -> object:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(embeddings.pq.ParquetFile, "read_row_group", watch)
    read_sample(str(tmp_path / "e"), parts, 2, seed=0)
    wanted = sorted({int(row) // 97 for row in sample_rows(600, 2, seed=0)})
    assert sorted(read) == wanted


def test_a_part_without_rows_is_passed_over(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(2, 8)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=5)
    assert 0 in [part.rows for part in parts]
    found = read_sample(str(tmp_path / "e"), parts, 2, seed=0)
    np.testing.assert_array_equal(found, unit_float16(catalogue.vectors)[0])


def ids_of(n: int) -> pa.Array:
    return pa.array([f"photo-{number}.jpg" for number in range(n)])


@pytest.mark.parametrize("rows", [5_000, 40_000, 2_000_000])
def test_evaluation_rows_are_about_as_many_as_wanted(rows: int) -> None:
    ids = ids_of(40_000)
    mask = evaluation_mask(ids, rows, seed=3)
    share = min(0.5, EVALUATION_ROWS / rows)
    # Six standard deviations.
    assert abs(mask.sum() - 40_000 * share) <= 6 * (40_000 * share * (1 - share)) ** 0.5
    assert not np.array_equal(mask, evaluation_mask(ids, rows, seed=4))


def test_a_row_is_set_apart_by_its_id_alone() -> None:
    ids = ids_of(3000)
    mask = evaluation_mask(ids, 30_000, seed=1)
    order = np.random.default_rng(0).permutation(3000)
    np.testing.assert_array_equal(evaluation_mask(ids.take(order), 30_000, seed=1), mask[order])
    chunks = pa.chunked_array(
        [ids[:7], ids[7:7], ids[7:1000].cast(pa.large_string()).cast(pa.string())]
    )
    np.testing.assert_array_equal(evaluation_mask(chunks, 30_000, seed=1), mask[:1000])
    np.testing.assert_array_equal(evaluation_mask(ids.slice(500, 20), 30_000, seed=1), mask[500:520])
    assert evaluation_mask(ids[:0], 30_000, seed=1).shape == (0,)
    # Ids that differ in one character, or are empty, are spread like others.
    short = pa.array(["", *(chr(65 + number) for number in range(26))])
    assert 0 < evaluation_mask(short, 20_000, seed=1).sum() < 27


def test_a_larger_index_sets_apart_a_part_of_the_rows_of_a_smaller_one() -> None:
    few, many = (evaluation_mask(ids_of(20_000), rows, seed=0) for rows in (200_000, 20_000))
    assert 0 < few.sum() < many.sum()
    assert not (few & ~many).any()


def test_a_small_index_trains_on_what_it_is_measured_on() -> None:
    assert evaluation_overlaps_training(999)
    assert not evaluation_overlaps_training(1000)
    assert evaluation_mask(ids_of(10), 999, seed=0).all()
    assert [evaluation_rows(rows) for rows in (999, 1000, 1891, 20_000, 10**9)] == [
        999, 500, 945, 10_000, 10_000,
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [1000, 6000])
def test_training_never_sees_an_evaluation_row(rows: int, tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(rows, 4)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=3)
    unit, _ = unit_float16(catalogue.vectors)
    apart = evaluation_mask(pa.array(catalogue.image_ids), rows, seed=5)
    found = read_sample(str(tmp_path / "e"), parts, rows, seed=5)
    np.testing.assert_array_equal(found, unit[~apart])
    some = read_sample(str(tmp_path / "e"), parts, rows // 6, seed=5)
    chosen = sample_rows(rows, rows // 6, seed=5)
    np.testing.assert_array_equal(some, unit[chosen[~apart[chosen]]])
    assert 0.4 < len(some) / (rows // 6) < 0.6


def test_a_sample_of_float32_stays_float32(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(50, 4)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=2, normalize=False)
    found = read_sample(str(tmp_path / "e"), parts, 50, seed=0)
    np.testing.assert_array_equal(found, catalogue.vectors.astype(np.float32))
    assert found.dtype == np.float32
