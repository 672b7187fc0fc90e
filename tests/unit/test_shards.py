"""Index shards: the FAISS files as plain FAISS reads them, and the Parquet beside them."""

import dataclasses
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import manifests
from index_builder.datasets.table_files import TableSpec, open_table
from index_builder.errors import DatasetError
from index_builder.index import assigned_parts, shards
from index_builder.index.goals import TransformSpec
from index_builder.index.shards import IndexDataset, open_index, open_shard
from index_builder.index.spec import IndexSpec
from index_builder.scoring.vectors import squared_norms, unit_float16
from index_builder.search.join import JoinSpec
from tests.index_fixtures import (
    Catalogue,
    build_index,
    clustered_catalogue,
    gaussian_catalogue,
    join_all,
)

CATALOGUE = clustered_catalogue(900, 96, centres=20)
# A score of FAISS is a float32 product of vectors that are of unit length within 1e-7.
TIE = 2e-6


@pytest.fixture(scope="module", params=["none", "pca"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> IndexDataset:
    spec = IndexSpec(transform=TransformSpec(request.param, 64), nlist=24, nprobe=5, shards=4, seed=1)
    return build_index(tmp_path_factory.mktemp("index"), CATALOGUE, spec)


def faiss_shards(index: IndexDataset) -> list[faiss.IndexIVF]:
    """The index's files, opened with nothing but FAISS."""
    return [faiss.read_index(f"{index.folder}/{part.file('.faiss').path}") for part in index.parts]


def indexed_codes(index: IndexDataset) -> tuple[np.ndarray, list[str]]:
    """What the index was given, by row number: vectors through the transform, and their ids."""
    ids: list[str] = []
    for number in range(index.layout.shards):
        ids += shards.read_shard_table(index, number, ("image_id",))["image_id"].to_pylist()
    unit, _ = unit_float16(CATALOGUE.vectors)
    codes = index.trained.transform.apply(unit)
    row_of = {image_id: row for row, image_id in enumerate(CATALOGUE.image_ids)}
    return codes[[row_of[image_id] for image_id in ids]], ids


@pytest.mark.parametrize("nprobe", [5, 24])
def test_plain_faiss_finds_the_neighbors_of_the_join(
    index: IndexDataset, nprobe: int, tmp_path: Path
) -> None:
    k = 10
    spec = IndexSpec(
        transform=TransformSpec("pca" if index.trained.dim == 64 else "none", 64),
        nlist=24, nprobe=nprobe, shards=4, seed=1,
    )  # fmt: skip
    rebuilt = build_index(tmp_path, CATALOGUE, spec)
    codes, ids = indexed_codes(rebuilt)
    found_scores, found_rows = [], []
    for part in faiss_shards(rebuilt):
        part.nprobe = nprobe
        scores, rows = part.search(codes.astype(np.float32), k + 1)
        found_scores.append(scores)
        found_rows.append(rows)
    scores, rows = np.concatenate(found_scores, axis=1), np.concatenate(found_rows, axis=1)
    scores[rows < 0] = -np.inf
    scores[rows == np.arange(len(rows))[:, None]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    table = join_all(rebuilt, JoinSpec(k))
    assert table["query_id"].to_pylist() == ids
    assert set(table["status"].to_pylist()) == {"filled"}
    joined_scores = np.asarray(table["scores"].to_pylist(), dtype=np.float32)
    joined_rows = np.asarray(table["neighbor_rows"].to_pylist())
    assert np.abs(scores - joined_scores).max() < TIE
    for row in range(len(codes)):
        odd = set(rows[row].tolist()) ^ set(joined_rows[row].tolist())
        exact = codes[list(odd)].astype(np.float64) @ codes[row].astype(np.float64)
        # Where the two differ, it is by a tie for the last place.
        assert (np.abs(exact - joined_scores[row, -1]) < TIE).all()


def test_codes_are_what_the_index_was_given(index: IndexDataset) -> None:
    codes, _ = indexed_codes(index)
    for number, part in enumerate(faiss_shards(index)):
        start, stop = index.layout.shard_rows(number)
        assert part.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        assert not part.by_residual
        assert part.metric_type == faiss.METRIC_INNER_PRODUCT
        assert part.ntotal == stop - start
        for list_number in range(part.nlist):
            size = part.invlists.list_size(list_number)
            if size == 0:
                continue
            rows = faiss.rev_swig_ptr(part.invlists.get_ids(list_number), size)
            raw = faiss.rev_swig_ptr(part.invlists.get_codes(list_number), size * part.code_size)
            stored = raw.view(np.float16).reshape(size, part.d)
            assert stored.tobytes() == codes[rows].tobytes()


def test_ids_are_the_row_numbers_of_the_whole_index(index: IndexDataset) -> None:
    seen = []
    for number, part in enumerate(faiss_shards(index)):
        lists = []
        for list_number in range(part.nlist):
            size = part.invlists.list_size(list_number)
            rows = faiss.rev_swig_ptr(part.invlists.get_ids(list_number), size).tolist()
            offset, end = index.layout.list_rows(number, list_number)
            start = index.layout.shard_rows(number)[0]
            assert rows == list(range(start + offset, start + end))
            if rows:
                lists.append(list_number)
            seen += rows
        # Foreign lists are empty, but the quantizer knows the centroids of all.
        first, last = index.layout.shard_lists(number)
        assert (min(lists), max(lists)) == (first, last - 1)
        assert last - first < part.nlist
        centroids = part.quantizer.reconstruct_n(0, part.nlist)
        np.testing.assert_array_equal(centroids, index.trained.centroids.astype(np.float32))
    assert seen == list(range(900))


def test_rows_are_in_the_nearest_list_of_their_vector(index: IndexDataset) -> None:
    codes, _ = indexed_codes(index)
    affinity = codes.astype(np.float64) @ index.trained.centroids.astype(np.float64).T
    nearest = np.argsort(-affinity, axis=1, kind="stable")
    offsets = index.layout.list_offsets
    np.testing.assert_array_equal(np.repeat(np.arange(24), np.diff(offsets)), nearest[:, 0])
    for number in range(index.layout.shards):
        start, stop = index.layout.shard_rows(number)
        with open_shard(index, number, ("probes",)) as shard:
            np.testing.assert_array_equal(shard.probes(), nearest[start:stop, :5])


def test_an_opened_shard_agrees_with_its_files(index: IndexDataset) -> None:
    codes, ids = indexed_codes(index)
    for number in range(index.layout.shards):
        start, stop = index.layout.shard_rows(number)
        columns = ("image_id", "squared_norm", "brand", "image_id")
        with open_shard(index, number, columns, verify=True) as shard:
            assert shard.first_row == start
            assert shard.vectors().matrix().tobytes() == codes[start:stop].tobytes()
            assert shard.squared_norms().tolist() == squared_norms(codes[start:stop]).tolist()
            assert shard.table["image_id"].to_pylist() == ids[start:stop]
            foreign = next(n for n in range(24) if n not in shard.lists)
            assert shard.list_codes(foreign).shape == (0, index.trained.dim)


def test_vectors_stay_mapped_after_the_shard_is_closed(index: IndexDataset) -> None:
    codes, _ = indexed_codes(index)
    start, stop = index.layout.shard_rows(1)
    with open_shard(index, 1, ("probes",)) as shard:
        first, vectors = weakref.ref(shard), shard.vectors()
    some = vectors.take(np.arange(0, stop - start, 3))
    del shard, vectors
    gc.collect()
    assert first() is None
    assert some.matrix().tobytes() == codes[start:stop:3].tobytes()


def test_parquet_keeps_metadata_and_drops_the_vector(index: IndexDataset) -> None:
    table = pq.read_table(f"{index.folder}/{index.parts[0].file('.parquet').path}")
    names = ["image_id", "item_id", "source_shard", "row", "brand", "size", "probes", "squared_norm"]
    assert table.column_names == names


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = IndexSpec(nlist=10, nprobe=4, shards=3)
    catalogue = gaussian_catalogue(300, 32)
    one = build_index(tmp_path / "one", catalogue, spec)
    two = build_index(tmp_path / "two", catalogue, spec)
    assert one.manifest == two.manifest
    names = sorted(path.name for path in Path(one.folder).iterdir())
    assert len(names) == 1 + 2 + 2 * 3
    for name in names:
        assert Path(one.folder, name).read_bytes() == Path(two.folder, name).read_bytes()


def test_rows_do_not_depend_on_how_the_embeddings_are_cut(tmp_path: Path) -> None:
    spec = IndexSpec(nlist=10, nprobe=4, shards=3)
    catalogue = gaussian_catalogue(300, 32)
    one = build_index(tmp_path / "one", catalogue, spec, parts=1)
    many = build_index(tmp_path / "many", catalogue, spec, parts=11)
    assert one.manifest.content == many.manifest.content


def test_parts_without_rows(tmp_path: Path) -> None:
    # Every image of a source shard may have failed.
    base = gaussian_catalogue(3, 16)
    index = build_index(tmp_path, Catalogue(base.vectors, base.image_ids), IndexSpec(), parts=8)
    assert index.layout.rows == 3
    assert len(join_all(index, JoinSpec(2))) == 3


def test_the_longest_id_is_known(tmp_path: Path) -> None:
    names = ["a", "ü" * 40, "b" * 11]
    index = build_index(tmp_path, Catalogue(np.eye(3), names), IndexSpec(nlist=1, nprobe=1, shards=3))
    assert index.id_bytes == 80
    assert sorted(int(part.properties["max_id_bytes"]) for part in index.parts) == [1, 11, 80]


def test_a_changed_quantizer_is_refused(tmp_path: Path) -> None:
    index = build_index(tmp_path, gaussian_catalogue(50, 16), IndexSpec(nlist=2, nprobe=1))
    path = Path(index.folder, shards.TRAINED_NAME)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"trained\.npz does not match its checksum"):
        open_index(index.folder)


def two_indexes(folder: Path) -> tuple[IndexDataset, IndexDataset]:
    """Two indexes of the same sizes over different vectors."""
    spec = IndexSpec(nlist=4, nprobe=2, shards=2)
    return (
        build_index(folder / "a", gaussian_catalogue(200, 16, seed=1), spec),
        build_index(folder / "b", gaussian_catalogue(200, 16, seed=2), spec),
    )


@pytest.mark.parametrize("suffix", [".faiss", ".parquet"])
@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, suffix: str, size: int) -> None:
    index = build_index(tmp_path, gaussian_catalogue(50, 16), IndexSpec(nlist=2, nprobe=1))
    file = index.parts[0].file(suffix)
    path = Path(index.folder, file.path)
    data = path.read_bytes()[: size if size >= 0 else file.bytes - 1]
    path.write_bytes(data)
    told = rf"shard-00000\{suffix} has {len(data)} bytes, but .* lists it with {file.bytes} bytes"
    with pytest.raises(DatasetError, match=told), open_shard(index, 0, ("image_id",)):
        pass
    path.unlink()
    with pytest.raises(DatasetError, match=r"is missing, but"), open_shard(index, 0, ()):
        pass


def put_shard(index: IndexDataset, number: int, other: Path) -> IndexDataset:
    """Puts another FAISS file into a shard's place, with a manifest that does not notice."""
    part = index.parts[number]
    target = Path(index.folder, part.file(".faiss").path)
    target.write_bytes(other.read_bytes())
    changed = manifests.describe_file(index.folder, target.name)
    files = tuple(changed if file.path == changed.path else file for file in part.files)
    parts = tuple(
        dataclasses.replace(one, files=files) if one.name == part.name else one
        for one in index.manifest.parts
    )
    return dataclasses.replace(index, manifest=dataclasses.replace(index.manifest, parts=parts))


def test_a_shard_of_another_index_is_refused(tmp_path: Path) -> None:
    one, other = two_indexes(tmp_path)
    foreign = Path(other.folder, other.parts[0].file(".faiss").path)
    # The manifest's checksum tells it where the shard is verified ...
    Path(one.folder, one.parts[0].file(".faiss").path).write_bytes(
        foreign.read_bytes()[: one.parts[0].file(".faiss").bytes].ljust(
            one.parts[0].file(".faiss").bytes
        )
    )
    with (
        pytest.raises(DatasetError, match="does not match its checksum"),
        open_shard(one, 0, (), verify=True),
    ):
        pass
    # ... and the file itself wherever it is opened.
    mixed = put_shard(one, 0, foreign)
    with (
        pytest.raises(DatasetError, match="is a shard of another index: got"),
        open_shard(mixed, 0, ()),
    ):
        pass


def test_a_shard_with_other_centroids_is_refused(tmp_path: Path) -> None:
    index = build_index(tmp_path, gaussian_catalogue(60, 16), IndexSpec(nlist=3, nprobe=1))
    path = Path(index.folder, index.parts[0].file(".faiss").path)
    changed = faiss.read_index(str(path))
    centroids = changed.quantizer.reconstruct_n(0, 3)
    changed.quantizer.reset()
    changed.quantizer.add(centroids[::-1].copy())
    faiss.write_index(changed, str(tmp_path / "other"))
    mixed = put_shard(index, 0, tmp_path / "other")
    told = r"another index: got other centroids, wanted those of trained\.npz"
    with pytest.raises(DatasetError, match=told), open_shard(mixed, 0, ()):
        pass


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    index = build_index(tmp_path, gaussian_catalogue(60, 16), IndexSpec(nlist=3, nprobe=1))
    (tmp_path / "other").write_bytes(b"no index at all")
    mixed = put_shard(index, 0, tmp_path / "other")
    with pytest.raises(DatasetError, match="cannot be read as a FAISS index"), open_shard(mixed, 0, ()):
        pass


@pytest.mark.parametrize("run_bytes", [1, 1 << 20])
def test_shards_do_not_depend_on_how_parts_are_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_bytes: int
) -> None:
    catalogue = gaussian_catalogue(900, 32, duplicates=0.2)
    spec = IndexSpec(nlist=12, nprobe=4, shards=5)
    wanted = build_index(tmp_path / "one", catalogue, spec)
    monkeypatch.setattr(assigned_parts, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(assigned_parts, "_GROUP_ROWS", 10)
    plain = assigned_parts.assign_part
    groups = []

    def in_runs(*arguments: Any) -> None:
        plain(*arguments, run_bytes=run_bytes)
        groups.append(pq.ParquetFile(arguments[-1]).num_row_groups)

    monkeypatch.setattr(assigned_parts, "assign_part", in_runs)
    found = build_index(tmp_path / "many", catalogue, spec, parts=2)
    # Of 450 rows at once, 45 groups of 10; in runs of 64 and 33, the last group of a run is shorter.
    assert groups == ([51, 51] if run_bytes == 1 else [45, 45])
    assert found.manifest.content == wanted.manifest.content


def test_equal_vectors_lie_side_by_side_in_the_order_of_their_ids(tmp_path: Path) -> None:
    catalogue = gaussian_catalogue(400, 32, duplicates=0.4)
    index = build_index(tmp_path, catalogue, IndexSpec(nlist=6, nprobe=2, shards=3))
    runs = 0
    for number in range(index.layout.shards):
        with open_shard(index, number, ("image_id",)) as shard:
            names = shard.table["image_id"].to_pylist()
            for list_number in shard.lists:
                start, stop = index.layout.list_rows(number, list_number)
                rows = [bytes(row) for row in shard.list_codes(list_number)]
                # Each vector makes one run.
                assert len(list(itertools.groupby(rows))) == len(set(rows))
                for _, run in itertools.groupby(range(stop - start), rows.__getitem__):
                    ids = [names[start + row].encode() for row in run]
                    assert ids == sorted(ids)
                    runs += len(ids) > 1
    assert runs >= 1


def test_a_folder_that_holds_no_index(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a complete index dataset"):
        open_index(str(tmp_path))


@pytest.mark.parametrize("key", ["image_id", "item_id"])
def test_columns_of_a_metadata_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    # What a shard took of the table is scratch, which committing removes.
    monkeypatch.setattr(manifests, "clear_work", lambda folder: None)
    base = gaussian_catalogue(200, 16)
    items = [f"item-{row // 3}" for row in range(200)]
    catalogue = Catalogue(base.vectors, base.image_ids, items, base.brands, base.sizes)
    column = catalogue.columns()[key]
    known = sorted(set(column))[::2]
    lines = [f"{name},{number}" for number, name in enumerate([*known, "nobody"])]
    (tmp_path / "stock.csv").write_text("\n".join(["sku,stock", *lines]) + "\n")
    spec = TableSpec((str(tmp_path / "*.csv"),), key, "sku", (("stock", "int64"),))
    request = IndexSpec(nlist=10, nprobe=4, shards=3)
    index = build_index(tmp_path / "one", catalogue, request, metadata=open_table(spec))
    plain = build_index(tmp_path / "two", catalogue, request)
    stock = {name: number for number, name in enumerate(known)}
    used: set[int] = set()
    for number, part in enumerate(index.parts):
        table = pq.read_table(f"{index.folder}/{part.file('.parquet').path}")
        assert table.column_names[4:] == ["brand", "size", "stock", "probes", "squared_norm"]
        values = [stock.get(name) for name in table[key].to_pylist()]
        assert table["stock"].to_pylist() == values
        matched = sum(value is not None for value in values)
        assert part.properties["metadata_matched"] == matched > 0
        assert part.properties["metadata_unmatched"] == len(table) - matched > 0
        taken = np.load(shards.table_rows_path(index.folder, part.name, part.key))
        assert taken["used"].tolist() == sorted(set(values) - {None})
        assert taken["table_rows"] == len(known) + 1
        used.update(taken["used"].tolist())
        # Nothing else depends on the table.
        twin = pq.read_table(f"{plain.folder}/{plain.parts[number].file('.parquet').path}")
        assert table.drop_columns(["stock"]).equals(twin)
        assert part.file(".faiss") == plain.parts[number].file(".faiss")
    assert used == set(range(len(known)))
