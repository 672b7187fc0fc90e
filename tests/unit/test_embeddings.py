"""Blocks of embeddings: schema, reading by row group, reading single rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index_builder.datasets import embeddings, manifests
from index_builder.datasets.embeddings import EmbeddingSchema
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import DatasetError
from index_builder.scoring.vectors import unit_float16
from index_builder.search.neighbors import NeighborsSchema
from tests.index_fixtures import Catalogue, gaussian_catalogue, write_embeddings


@pytest.fixture
def catalogue() -> Catalogue:
    return gaussian_catalogue(500, 12)


def test_what_is_written_is_read_back(catalogue: Catalogue, tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    parts = write_embeddings(folder, catalogue, parts=2)
    blocks = [list(embeddings.read_part(str(folder), part)) for part in parts]
    assert [[len(block) for block in part] for part in blocks] == [[97, 97, 56]] * 2
    table = pa.concat_tables([block for part in blocks for block in part])
    unit, _ = unit_float16(catalogue.vectors)
    assert embeddings.list_matrix(table["vector"]).tobytes() == unit.tobytes()
    for name, values in catalogue.columns().items():
        assert table[name].to_pylist() == values
    some = next(embeddings.read_part(str(folder), parts[0], ["image_id"]))
    assert some.column_names == ["image_id"]


def test_a_part_without_rows_has_one_empty_block(tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    parts = write_embeddings(folder, gaussian_catalogue(1, 12), parts=2)
    assert [part.rows for part in parts] == [0, 1]
    (block,) = embeddings.read_part(str(folder), parts[0])
    assert len(block) == 0
    assert embeddings.list_matrix(block["vector"]).shape == (0, 12)
    (named,) = embeddings.read_part(str(folder), parts[0], ["image_id"])
    assert named.column_names == ["image_id"]


def test_single_rows_come_in_their_order(catalogue: Catalogue, tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    (part,) = write_embeddings(folder, catalogue, parts=1)
    rows = np.asarray([0, 96, 97, 98, 300, 499])
    table = embeddings.read_rows(str(folder), part, rows, ["image_id"])
    assert table["image_id"].to_pylist() == [catalogue.image_ids[row] for row in rows]
    assert table.column_names == ["image_id"]
    assert len(embeddings.read_rows(str(folder), part, rows[:0], ["image_id"])) == 0


def test_a_damaged_part_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    part, _ = write_embeddings(folder, catalogue, parts=2)
    path = folder / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=r"part-00000\.parquet does not match its checksum"):
        next(embeddings.read_part(str(folder), part))
    # A manifest that lists something that never was Parquet.
    file = manifests.describe_file(str(folder), "part-00000.parquet")
    listed = Part(part.name, "key", part.rows, (file,))
    with pytest.raises(DatasetError, match=r"part-00000\.parquet is not a Parquet file: .*Make it"):
        next(embeddings.read_part(str(folder), listed))


def test_schema_lists_every_column_with_its_type() -> None:
    schema = EmbeddingSchema(3, (("price", "float64"), ("sold", "bool"))).arrow()
    described = embeddings.describe_schema(schema)
    assert described[2] == {"name": "vector", "type": "fixed_size_list<item: halffloat>[3]"}
    names = {field["name"] for field in described}
    assert {"price", "sold"} < names
    assert names - {"price", "sold"} < embeddings.RESERVED_COLUMNS


def test_no_metadata_column_can_meet_a_column_of_the_index_or_the_join() -> None:
    carried = NeighborsSchema((("brand", pa.string()),)).arrow().names
    fixed = set(carried) - {"query_brand", "neighbor_brand"}
    for prefix in ("query_", "neighbor_"):
        taken = {name.removeprefix(prefix) for name in fixed if name.startswith(prefix)}
        assert taken
        assert taken <= embeddings.RESERVED_COLUMNS
    assert {"list", "code", "probes", "squared_norm"} <= embeddings.RESERVED_COLUMNS


@pytest.mark.parametrize("shape", [(2, 4), (6,)])
def test_vectors_of_another_dim_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"vectors have shape .*, wanted \[n, 3\]"):
        EmbeddingSchema(3).table(np.zeros(shape, np.float16), {})


def test_vectors_have_the_type_of_the_dataset(tmp_path: Path) -> None:
    unit, raw = EmbeddingSchema(3), EmbeddingSchema(3, normalize=False)
    assert (unit.dtype, raw.dtype) == (np.float16, np.float32)
    for schema, other in ((unit, np.float32), (raw, np.float16), (raw, np.float64)):
        wanted = np.dtype(schema.dtype)
        with pytest.raises(ValueError, match=f"vectors are {np.dtype(other)}, wanted {wanted}"):
            schema.table(np.zeros((2, 3), other), {})
    catalogue = gaussian_catalogue(50, 12)
    (part,) = write_embeddings(tmp_path / "e", catalogue, parts=1, normalize=False)
    (block,) = embeddings.read_part(str(tmp_path / "e"), part)
    found = embeddings.list_matrix(block["vector"])
    assert found.tobytes() == catalogue.vectors.astype(np.float32).tobytes()


def test_a_column_that_is_not_there(catalogue: Catalogue, tmp_path: Path) -> None:
    (part,) = write_embeddings(tmp_path / "e", catalogue, parts=1)
    with pytest.raises(DatasetError, match=r"part-00000\.parquet has no column colour, only image_id,"):
        next(embeddings.read_part(str(tmp_path / "e"), part, ["image_id", "colour"]))


def test_pages_that_are_damaged(catalogue: Catalogue, tmp_path: Path) -> None:
    (part,) = write_embeddings(tmp_path / "e", catalogue, parts=1)
    path = tmp_path / "e" / "part-00000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    file = manifests.describe_file(str(tmp_path / "e"), path.name)
    listed = Part(part.name, "key", part.rows, (file,))
    with pytest.raises(DatasetError, match=r"part-00000\.parquet is damaged: .*Make it again"):
        list(embeddings.read_part(str(tmp_path / "e"), listed))


def test_matrix_of_slices_and_chunks() -> None:
    matrix = np.arange(24, dtype=np.int32).reshape(8, 3)
    column = pa.chunked_array([embeddings.list_array(matrix)])
    np.testing.assert_array_equal(embeddings.list_matrix(column.slice(2, 5)), matrix[2:7])
    halves = pa.chunked_array([column.chunk(0).slice(6), column.chunk(0).slice(0, 2)])
    np.testing.assert_array_equal(embeddings.list_matrix(halves), matrix[[6, 7, 0, 1]])
    assert embeddings.list_matrix(pa.chunked_array([], column.type)).shape == (0, 3)
    transposed = np.arange(6, dtype=np.float16).reshape(2, 3).T
    copied = embeddings.list_matrix(pa.chunked_array([embeddings.list_array(transposed)]))
    np.testing.assert_array_equal(copied, transposed)


@pytest.mark.parametrize("dim", [None, "3", 0, -1])
def test_a_manifest_without_a_dim(dim: object) -> None:
    manifest = Manifest("embeddings", "f", {}, [], (), {"dim": dim})
    with pytest.raises(DatasetError, match=rf"states dim {dim!r}, wanted a positive whole number"):
        embeddings.load_dim(manifest)
    assert embeddings.load_dim(Manifest("embeddings", "f", {}, [], (), {"dim": 3})) == 3
