"""Samples: seeded, without repetition, over every part."""

from pathlib import Path

import numpy as np
import pytest

from index_builder import embeddings
from index_builder.sampling import read_sample, sample_rows
from index_builder.vectors import unit_float16
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
    assert read == wanted


def test_a_part_without_rows_is_passed_over(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(2, 8)
    parts = write_embeddings(tmp_path / "e", catalogue, parts=5)
    assert 0 in [part.rows for part in parts]
    found = read_sample(str(tmp_path / "e"), parts, 2, seed=0)
    np.testing.assert_array_equal(found, unit_float16(catalogue.vectors)[0])
