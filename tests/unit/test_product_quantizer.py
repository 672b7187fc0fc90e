"""Codes and tables of the product quantizer against their definitions in plain NumPy."""

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.index.product_quantizer import Codebooks, code_bytes, subspaces_of, train_codebooks
from index_builder.scoring.metrics import Metric
from index_builder.scoring.vectors import unit_float16


def _vectors(n: int, dim: int, seed: int = 0) -> NDArray[np.float16]:
    vectors, _ = unit_float16(np.random.default_rng(seed).normal(size=(n, dim)))
    return vectors


def _unpacked(codes: NDArray[np.uint8], subspaces: int) -> NDArray[np.uint8]:
    return np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)[:, :subspaces]


def _cut(vectors: NDArray[np.float16], subspaces: int) -> NDArray[np.float64]:
    """Vectors as float64 [n, subspaces, 4], the last one filled up with zeros."""
    wide = np.pad(vectors.astype(np.float64), ((0, 0), (0, 4 * subspaces - vectors.shape[1])))
    return wide.reshape(len(vectors), subspaces, 4)


@pytest.mark.parametrize("dim", [1, 4, 13, 48])
def test_codes_name_the_nearest_codeword(dim: int) -> None:
    vectors = _vectors(300, dim)
    books = train_codebooks(vectors.astype(np.float32), seed=3)
    codes = books.encode(vectors)
    assert codes.shape == (300, code_bytes(dim))
    words = books.values.astype(np.float64)
    cut = _cut(vectors, subspaces_of(dim))
    squares = np.square(words).sum(axis=2)
    costs = squares[None] - 2 * np.einsum("nsj,scj->nsc", cut, words)
    np.testing.assert_array_equal(_unpacked(codes, books.subspaces), costs.argmin(axis=2))


@pytest.mark.parametrize("metric", list(Metric))
def test_tables_hold_the_rounded_costs(metric: Metric) -> None:
    vectors = _vectors(200, 22)
    books = train_codebooks(vectors.astype(np.float32), seed=0)
    tables = books.tables(vectors[:7], metric)
    words, cut = books.values.astype(np.float64), _cut(vectors[:7], books.subspaces)
    dots = np.einsum("nsj,scj->nsc", cut, words)
    costs = np.square(words).sum(axis=2) - 2 * dots if metric is Metric.EUCLIDEAN else -dots
    costs -= costs.min(axis=2, keepdims=True)
    unit = 255 / costs.max(axis=(1, 2), keepdims=True)
    wanted = np.floor(costs * unit + 0.5)
    np.testing.assert_array_equal(tables[:, : 16 * books.subspaces], wanted.reshape(7, -1))
    assert not tables[:, 16 * books.subspaces :].any()


def test_a_zero_query_finds_all_codewords_alike() -> None:
    books = train_codebooks(_vectors(50, 8).astype(np.float32), seed=0)
    assert not books.tables(np.zeros((1, 8), np.float16), Metric.INNER_PRODUCT).any()


def test_training_repeats_and_takes_few_vectors() -> None:
    vectors = _vectors(5, 6).astype(np.float32)
    first, second = train_codebooks(vectors, seed=1), train_codebooks(vectors, seed=1)
    np.testing.assert_array_equal(first.values, second.values)
    # Five vectors are codewords themselves.
    assert (first.encode(vectors.astype(np.float16)) < 256).all()


def test_codebooks_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codebooks are float16 \(2, 16, 4\), wanted float16 \(3, "):
        Codebooks(np.zeros((2, 16, 4), np.float16), 9)
