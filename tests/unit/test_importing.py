"""Vectors made elsewhere become an embeddings dataset, whole or not at all."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from index_builder.datasets import embeddings, manifests, unique_ids
from index_builder.errors import ConfigError, DatasetError
from index_builder.scoring.vectors import unit_float16
from index_builder.steps import importing
from index_builder.steps.importing import import_arrays, import_vectors
from pipelines.cli import app

ROWS, DIM = 60, 6


def vectors(rows: int = ROWS, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)


def table(rows: int = ROWS, seed: int = 0, **columns: Any) -> pa.Table:
    values: dict[str, Any] = {
        "id": [f"{seed}-{row}" for row in range(rows)],
        "vector": list(vectors(rows, seed)),
    }
    return pa.table(values | columns)


def read(folder: str) -> pa.Table:
    made = manifests.load(folder, embeddings.KIND)
    return pa.concat_tables(
        [block for part in made.parts for block in embeddings.read_part(folder, part)]
    )


def write(path: Path, content: pa.Table, row_group_size: int = 7) -> str:
    pq.write_table(content, path, row_group_size=row_group_size)
    return str(path)


def test_files_become_a_dataset_with_metadata(tmp_path: Path) -> None:
    for number in range(2):
        more = {
            "sku": [f"s{row % 9}" for row in range(ROWS)],
            "brand": pa.array(["x", None] * (ROWS // 2)).dictionary_encode(),
            "stock": pa.array(range(ROWS), pa.int16()),
            "price": pa.array(np.arange(ROWS, dtype=np.float32)),
            "new": [True, None] * (ROWS // 2),
        }
        write(tmp_path / f"v{number}.parquet", table(seed=number, **more))
    folder = import_vectors(
        str(tmp_path / "v*.parquet"), str(tmp_path / "out"), item_column="sku", encoder="net"
    )
    made = manifests.load(folder, embeddings.KIND)
    assert made.rows == 2 * ROWS
    assert made.properties == {
        "dim": DIM,
        "encoder": {"encoder": "net", "imported": True, "normalize": True},
    }
    found = read(folder)
    assert [field["name"] for field in made.schema] == found.schema.names
    kinds = {field.name: str(field.type) for field in found.schema}
    assert [kinds[name] for name in ("brand", "stock", "price", "new")] == [
        "string", "int64", "double", "bool",
    ]  # fmt: skip
    assert found["image_id"].to_pylist() == [f"{n}-{row}" for n in range(2) for row in range(ROWS)]
    assert found["item_id"].to_pylist() == [f"s{row % 9}" for row in range(ROWS)] * 2
    unit, _ = unit_float16(np.concatenate([vectors(seed=0), vectors(seed=1)]))
    assert (embeddings.list_matrix(found["vector"]) == unit).all()
    row = found.slice(ROWS + 1, 1).to_pylist()[0]
    assert row["source_shard"] == f"{tmp_path.name}/v1.parquet"
    assert (row["row"], row["brand"], row["stock"], row["new"]) == (1, None, 1, None)
    assert row["content_sha256"] == hashlib.sha256(unit[ROWS + 1].tobytes()).digest()


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda value: pa.list_(value, DIM)])
def test_every_kind_of_vector_column(
    number: type[np.floating[Any]], kind: Callable[[pa.DataType], pa.DataType], tmp_path: Path
) -> None:
    values = vectors().astype(number)
    column = pa.array(list(values), kind(pa.from_numpy_dtype(number)))
    path = write(tmp_path / "v.parquet", pa.table({"id": np.arange(ROWS), "vector": column}))
    found = read(import_vectors(path, str(tmp_path / "out")))
    assert (embeddings.list_matrix(found["vector"]) == unit_float16(values)[0]).all()
    assert found["image_id"].to_pylist() == [str(row) for row in range(ROWS)]


def test_without_normalising_vectors_stay_as_they_are(tmp_path: Path) -> None:
    values = vectors() * 1000
    values[3] = 0
    path = write(tmp_path / "v.parquet", table(vector=list(values)))
    found = read(import_vectors(path, str(tmp_path / "out"), normalize=False))
    assert found.schema.field("vector").type == pa.list_(pa.float32(), DIM)
    assert (embeddings.list_matrix(found["vector"]) == values).all()


def test_bytes_depend_neither_on_row_groups_nor_on_parts_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "ROW_GROUP_ROWS", 16)
    monkeypatch.setattr(importing, "_PART_BYTES", 16 * DIM * 2 * 2)
    written = []
    for size in (3, 50, 1000):
        (tmp_path / str(size)).mkdir()
        path = write(tmp_path / str(size) / "in.parquet", table(), size)
        folder = Path(import_vectors(path, str(tmp_path / f"out-{size}")))
        parts = manifests.load(str(folder), embeddings.KIND).parts
        assert [part.rows for part in parts] == [32, 28]
        groups = pq.ParquetFile(folder / "part-00000.parquet").metadata.num_row_groups
        assert groups == 2
        columns = read(str(folder)).drop_columns(["source_shard"])
        written.append(columns)
    assert all(one.equals(written[0]) for one in written)


def test_arrays_and_mapped_files_give_what_a_parquet_file_gives(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors())
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    ids, brands = [f"0-{row}" for row in range(ROWS)], ["b"] * ROWS
    folder = import_arrays(mapped, ids, str(tmp_path / "a"), columns={"brand": brands})
    path = write(tmp_path / "v.parquet", table(brand=brands))
    other = read(import_vectors(path, str(tmp_path / "b")))
    found = read(folder)
    assert set(found["source_shard"].to_pylist()) == {"array"}
    assert found.drop_columns(["source_shard"]).equals(other.drop_columns(["source_shard"]))


def test_importing_again_changes_nothing_and_other_input_is_refused(tmp_path: Path) -> None:
    path, folder = write(tmp_path / "v.parquet", table()), str(tmp_path / "out")
    import_vectors(path, folder)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert import_vectors(path, folder) == folder
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    for options in ({"encoder": "net"}, {"normalize": False}):
        with pytest.raises(DatasetError, match="holds another dataset"):
            import_vectors(path, folder, **options)  # type: ignore[arg-type]
    write(tmp_path / "v.parquet", table(seed=1))
    with pytest.raises(DatasetError, match="holds another dataset"):
        import_vectors(path, folder)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["rows"] == ROWS


def broken(row: int, value: float) -> list[NDArray[np.float32]]:
    values = vectors()
    values[row, 2] = value
    return list(values)


def zero(row: int) -> list[NDArray[np.float32]]:
    values = vectors()
    values[row] = 0
    return list(values)


def with_null(row: int) -> pa.Array:
    lists: list[Any] = vectors().tolist()
    lists[row][0] = None
    return pa.array(lists, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vector": broken(41, np.nan)}, r"v.parquet row 41 \(.*\): the vector of '0-41' has NaN"),
        ({"vector": broken(5, np.inf)}, "row 5 .* has NaN, an infinity or a missing number"),
        ({"vector": with_null(7)}, "row 7 .* has NaN, an infinity or a missing number"),
        ({"vector": zero(9)}, r"row 9 .*: the vector of '0-9' is zero"),
        ({"vector": [*vectors()[:-1], np.ones(DIM + 1, np.float32)]}, "row 59 .* has 7 numbers, .* 6"),
        ({"vector": [*vectors()[:-1].tolist(), None]}, "row 59 .* has no vector"),
        ({"id": [*map(str, range(ROWS - 1)), None]}, "row 59 .* has no id"),
        (
            {"id": [*map(str, range(ROWS - 2)), "3", "3"]},
            r"1 image ids occur more than once .*'3' at .*v.parquet row 3 and .*v.parquet row 58",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_taken_leave_nothing_behind(
    columns: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_PART_BYTES", 1)
    monkeypatch.setattr(importing, "ROW_GROUP_ROWS", 16)
    path = write(tmp_path / "v.parquet", table(**columns))
    with pytest.raises(DatasetError, match=message):
        import_vectors(path, str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("**/*")) or not (tmp_path / "out").exists()


def test_files_of_two_lengths_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table())
    other = pa.table({"id": ["x"], "vector": [[1.0, 2.0]]})
    write(tmp_path / "b.parquet", other)
    with pytest.raises(DatasetError, match=r"b.parquet row 0: the vector of 'x' has 2 numbers, .* 6"):
        import_vectors([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")], str(tmp_path / "o"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_column": "sku"}, r"has 0 columns 'sku', wanted one; its columns are id, vector"),
        ({"vector_column": "brand"}, "has the column 'brand' as string, wanted a list of float16"),
        ({"id_column": "vector", "vector_column": "id"}, "wanted a list of float16"),
        ({"item_column": "tags"}, "has the column 'tags' as list.* wanted text or whole numbers"),
        ({}, "has the column 'tags' as list<.*>, wanted text, numbers or truth values as metadata"),
        ({"columns": ("brand", "row")}, "has the column 'row', a name that the dataset needs itself"),
        ({"columns": ("nothing",)}, "has 0 columns 'nothing'"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    more = {"brand": ["b"] * ROWS, "tags": [["t"]] * ROWS, "row": range(ROWS)}
    path = write(tmp_path / "v.parquet", table(**more))
    with pytest.raises(ConfigError, match=message):
        import_vectors(path, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_files_that_are_none_or_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No file matches .*/v\*.parquet"):
        import_vectors(str(tmp_path / "v*.parquet"), str(tmp_path / "out"))
    (tmp_path / "v.parquet").write_text("id,vector")
    with pytest.raises(DatasetError, match="v.parquet cannot be read as Parquet"):
        import_vectors(str(tmp_path / "v.parquet"), str(tmp_path / "out"))
    write(tmp_path / "v.parquet", table(brand=["b"] * ROWS))
    write(tmp_path / "w.parquet", table(seed=1, brand=range(ROWS)))
    with pytest.raises(ConfigError, match="w.parquet has the column 'brand' as int64, the first file"):
        import_vectors(str(tmp_path / "*.parquet"), str(tmp_path / "out"))
    write(tmp_path / "empty.parquet", table().slice(0, 0))
    with pytest.raises(DatasetError, match="There are 0 vectors to import"):
        import_vectors(str(tmp_path / "empty.parquet"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    write(path, table())
    data = bytearray(path.read_bytes())
    # The footer stays readable; the pages in the middle are gone.
    data[200 : len(data) // 2] = bytes(len(data) // 2 - 200)
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="v.parquet cannot be read as Parquet"):
        import_vectors(str(path), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ids, folder = [str(row) for row in range(ROWS)], str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"vectors are int64 \[60, 6\], wanted floats \[n, dim\]"):
        import_arrays(vectors().astype(np.int64), ids, folder)
    with pytest.raises(ConfigError, match="ids has 3 values for 60 vectors"):
        import_arrays(vectors(), ids[:3], folder)
    with pytest.raises(ConfigError, match="'item_id', a name that the dataset needs itself"):
        import_arrays(vectors(), ids, folder, columns={"item_id": ids})


def test_ids_whose_hashes_meet_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = import_vectors(write(tmp_path / "v.parquet", table()), str(tmp_path / "out"))
    parts = manifests.load(folder, embeddings.KIND).parts
    monkeypatch.setattr(unique_ids, "_hash_ids", lambda ids: np.zeros(len(ids), dtype=np.int64))
    unique_ids.check_unique_ids(folder, parts)
    with pytest.raises(DatasetError, match="60 image ids occur more than once"):
        unique_ids.check_unique_ids(folder, [*parts, *parts])


def test_the_command_imports(tmp_path: Path) -> None:
    write(tmp_path / "v.parquet", table(sku=["s"] * ROWS, brand=["b"] * ROWS, more=["m"] * ROWS))
    paths, folder = str(tmp_path / "*.parquet"), str(tmp_path / "out")
    arguments = ["import-vectors", paths, "--output", folder, "--json"]
    options = ["--item-column", "sku", "--column", "brand", "--encoder", "net", "--no-normalize"]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["status"], report["rows"], report["dim"]) == ("done", ROWS, DIM)
    found = read(report["embeddings"])
    assert "more" not in found.column_names
    assert set(found["item_id"].to_pylist()) == {"s"}
    assert found.schema.field("vector").type.value_type == pa.float32()
    result = CliRunner().invoke(app, [*arguments, "--id-column", "nothing"])
    assert result.exit_code == 2
    assert "has 0 columns 'nothing'" in json.loads(result.stdout)["error"]["message"]
