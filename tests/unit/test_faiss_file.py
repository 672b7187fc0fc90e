"""FAISS files written list by list have the bytes that FAISS itself would have written."""

import itertools
from pathlib import Path

import faiss
import numpy as np
import pytest

from index_builder.index.faiss_file import write_lists


def empty_index(nlist: int, dim: int = 6, metric: int = faiss.METRIC_INNER_PRODUCT) -> faiss.IndexIVF:
    quantizer = faiss.IndexFlat(dim, metric)
    quantizer.add(np.random.default_rng(0).normal(size=(nlist, dim)).astype(np.float32))
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, kind, metric, False)
    index.is_trained = True
    return index


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize(
    "sizes", [[3, 0, 5, 2], [0, 0, 0, 4, 0, 1], [7], [0], [0, 0, 3], [1, 2, 0], [0] * 5]
)
def test_the_bytes_are_those_of_faiss(tmp_path: Path, sizes: list[int], metric: int) -> None:
    nlist, rows = len(sizes), sum(sizes)
    codes = np.random.default_rng(1).normal(size=(rows, 6)).astype(np.float16)
    ids = np.arange(100, 100 + rows)
    wanted = empty_index(nlist, metric=metric)
    lists = np.repeat(np.arange(nlist), sizes)
    if rows:
        wide = codes.astype(np.float32)
        wanted.add_core(rows, *(faiss.swig_ptr(array) for array in (wide, ids, lists)))
    faiss.write_index(wanted, str(tmp_path / "faiss"))

    offsets = np.cumsum([0, *sizes])
    filled = [
        # In two pieces, one of which may be empty.
        ([codes[start : start + 1], codes[start + 1 : stop]], ids[start:stop])
        for start, stop in itertools.pairwise(offsets)
        if stop > start
    ]
    write_lists(str(tmp_path / "ours"), empty_index(nlist, metric=metric), np.asarray(sizes), filled)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "faiss").read_bytes()


def test_lists_of_other_sizes_are_refused(tmp_path: Path) -> None:
    codes, ids = np.ones((2, 6), dtype=np.float16), np.arange(2)
    path, sizes = str(tmp_path / "x"), np.asarray([2, 2])
    with pytest.raises(ValueError, match="list 1 has 1 codes and 2 ids, wanted 2"):
        write_lists(path, empty_index(2), sizes, [([codes], ids), ([codes[:1]], ids)])
    with pytest.raises(ValueError, match="got fewer lists than the 2 that are not empty"):
        write_lists(path, empty_index(2), sizes, [([codes], ids)])
