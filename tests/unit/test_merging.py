"""One FAISS file of all shards, searched with FAISS alone and held against the join."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from index_builder.errors import ConfigError, DatasetError
from index_builder.index.goals import TransformSpec
from index_builder.index.shards import IndexDataset, read_shard_table
from index_builder.index.spec import IndexSpec
from index_builder.scoring.metrics import Metric
from index_builder.search.join import JoinSpec
from index_builder.steps.merging import merge_shards
from tests.index_fixtures import build_index, clustered_catalogue, gaussian_catalogue, join_all

TIE = 2e-6


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    # Six lists in four shards: some are split.
    spec = IndexSpec(transform=TransformSpec("pca", 64), nlist=6, nprobe=3, shards=4, seed=1)
    return build_index(tmp_path_factory.mktemp("m"), clustered_catalogue(700, 96, centres=9), spec)


def test_the_merged_file_finds_what_the_join_finds(index: IndexDataset, tmp_path: Path) -> None:
    merged = merge_shards(index, str(tmp_path / "items.faiss"))
    assert merged.rows == 700
    assert merged.bytes == Path(merged.faiss_path).stat().st_size
    found = faiss.read_index(merged.faiss_path)
    assert (found.ntotal, found.nlist, found.nprobe) == (700, index.trained.nlist, 3)
    sizes = [found.invlists.list_size(number) for number in range(found.nlist)]
    assert sizes == np.diff(index.layout.list_offsets).tolist()
    # At least one list is cut in two.
    assert set(index.layout.shard_offsets.tolist()) - set(index.layout.list_offsets.tolist())

    found.make_direct_map()
    queries = found.reconstruct_n(0, 700)
    scores, rows = found.search(queries, 6)
    table = join_all(index, JoinSpec(5))
    wanted = np.asarray(table["scores"].to_pylist(), dtype=np.float32)
    joined = np.asarray(table["neighbor_rows"].to_pylist())
    for row in range(700):
        others = rows[row] != row
        assert np.abs(scores[row][others][:5] - wanted[row]).max() < TIE
        odd = set(rows[row][others][:5].tolist()) ^ set(joined[row].tolist())
        exact = queries[list(odd)].astype(np.float64) @ queries[row].astype(np.float64)
        assert (np.abs(exact - wanted[row, -1]) < TIE).all()


def test_the_ids_beside_it_name_its_rows(index: IndexDataset, tmp_path: Path) -> None:
    merged = merge_shards(index, str(tmp_path / "items.faiss"))
    assert merged.ids_path == str(tmp_path / "items.parquet")
    table = pq.read_table(merged.ids_path)
    assert table.column_names == ["row", "image_id", "item_id"]
    assert table["row"].to_pylist() == list(range(700))
    names = [
        name
        for shard in range(index.layout.shards)
        for name in read_shard_table(index, shard, ("image_id",))["image_id"].to_pylist()
    ]
    assert table["image_id"].to_pylist() == names


def test_the_file_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(200, 16, duplicates=0.3)
    files = []
    for shards in (1, 5):
        spec = IndexSpec(nlist=4, nprobe=2, shards=shards)
        built = build_index(tmp_path / str(shards), catalogue, spec)
        path = tmp_path / f"{shards}.faiss"
        merge_shards(built, str(path))
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_distances(tmp_path: Path) -> None:
    spec = IndexSpec(Metric.EUCLIDEAN, nlist=4, nprobe=4, shards=2)
    index = build_index(tmp_path, gaussian_catalogue(80, 8), spec)
    found = faiss.read_index(merge_shards(index, str(tmp_path / "x.faiss")).faiss_path)
    assert found.metric_type == faiss.METRIC_L2
    found.make_direct_map()
    distances, rows = found.search(found.reconstruct_n(0, 80), 1)
    assert rows[:, 0].tolist() == list(range(80))
    assert np.abs(distances).max() < 1e-5


def test_another_name_is_refused(index: IndexDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--merge is '.*x', wanted a file name that ends in \.faiss"):
        merge_shards(index, str(tmp_path / "x"))


def test_a_damaged_shard_is_not_merged(tmp_path: Path) -> None:
    index = build_index(tmp_path, gaussian_catalogue(50, 8), IndexSpec(nlist=2, nprobe=1, shards=2))
    path = Path(index.folder, index.parts[1].file(".faiss").path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    target = tmp_path / "x.faiss"
    with pytest.raises(DatasetError, match="does not match its checksum"):
        merge_shards(index, str(target))
    assert list(tmp_path.glob("*x.faiss*")) == []
