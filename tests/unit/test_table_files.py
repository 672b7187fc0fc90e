"""The files of a metadata table: found, looked at before any work, read in order."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets.fingerprints import fingerprint
from index_builder.datasets.table_files import (
    MetadataTable,
    TableSpec,
    check_collisions,
    find_table_files,
    open_table,
    read_blocks,
    refuse_changes,
)
from index_builder.errors import ConfigError, DatasetError

STOCK = (("stock", "int64"),)


def spec_of(*paths: Path, columns: Any = STOCK, id_column: str = "item_id") -> TableSpec:
    return TableSpec(tuple(map(str, paths)), "item_id", id_column, columns)


def rows_of(table: MetadataTable) -> list[tuple[str, int, int, list[dict[str, Any]]]]:
    return [
        (Path(block.path).name, block.first, block.number, block.rows.to_pylist())
        for block in read_blocks(table)
    ]


def test_files_are_found_once_and_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("stock,item_id,more\n7,007,x\n\n,c,y\n")
    (tmp_path / "d.CSV.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfitem_id,stock\r\nd,NA\r\n"))
    pq.write_table(pa.table({"item_id": [1, 2], "stock": [3.0, None]}), tmp_path / "a.parquet")
    (tmp_path / "c.csv").write_text("item_id,stock\n")
    table = open_table(spec_of(tmp_path / "b.csv", tmp_path / "*"))
    assert rows_of(table) == [
        ("a.parquet", 0, 0, [{"item_id": 1, "stock": 3.0}, {"item_id": 2, "stock": None}]),
        ("b.csv", 0, 2, [{"item_id": "007", "stock": "7"}, {"item_id": "c", "stock": None}]),
        ("d.CSV.gz", 0, 4, [{"item_id": "d", "stock": "NA"}]),
    ]


def test_large_files_come_in_blocks_that_know_their_place(tmp_path: Path) -> None:
    n = 150_000
    ids = [f"item-{row:030d}" for row in range(n)]
    lines = "".join(f'{name},"{row}"\n' for row, name in enumerate(ids))
    (tmp_path / "a.csv").write_text("item_id,stock\n" + lines)
    pq.write_table(
        pa.table({"item_id": ids, "stock": range(n)}), tmp_path / "b.parquet", row_group_size=70_000
    )
    blocks = list(read_blocks(open_table(spec_of(tmp_path / "*"))))
    assert len(blocks) >= 5
    assert max(block.rows.num_rows for block in blocks) < 110_000
    number = 0
    for block in blocks:
        assert block.number == number
        assert block.first == number % n
        assert block.rows["item_id"][0].as_py() == ids[block.first]
        assert block.rows["stock"].cast(pa.int64())[-1].as_py() == block.first + block.rows.num_rows - 1
        number += block.rows.num_rows
    assert number == 2 * n


def test_what_decides_the_values_is_in_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("item_id,image_id,stock,price\na,b,1,2\n")

    def value(**changes: Any) -> str:
        return fingerprint(open_table(spec_of(file, **changes)).fingerprint_value())

    found = [
        value(),
        value(columns=(("stock", "string"),)),
        value(columns=(*STOCK, ("price", "int64"))),
        value(columns=(("price", "int64"), *STOCK)),
        value(id_column="image_id"),
        fingerprint(
            open_table(TableSpec((str(file),), "image_id", "item_id", STOCK)).fingerprint_value()
        ),
    ]
    file.write_text("item_id,image_id,stock,price\na,b,2,2\n")
    found.append(value())
    assert len(set(found)) == 7
    # Where the files are does not matter.
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(file, tmp_path / "elsewhere" / "b.csv")
    moved = open_table(spec_of(tmp_path / "elsewhere" / "*.csv")).fingerprint_value()
    assert fingerprint(moved) == found[-1]


@pytest.mark.parametrize("name", ["none.csv", "none*.csv", "none/*.csv", "."])
def test_a_path_without_files_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_table_files(spec_of(tmp_path / name))
    assert str(caught.value) == (
        f"catalog.metadata.paths: no file matches {tmp_path / name}, wanted a Parquet or CSV table. "
        "Correct the path; a relative path in a config file is relative to that file's folder."
    )


def test_a_file_that_is_no_table_by_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("item_id,stock\n")
    with pytest.raises(ConfigError) as caught:
        find_table_files(spec_of(tmp_path / "*"))
    assert str(caught.value) == (
        f"catalog.metadata.paths: {tmp_path / 'notes.txt'} is no table by its name, wanted one that "
        "ends with .parquet, .csv, .csv.gz. Name the files, or narrow the pattern."
    )


@pytest.mark.parametrize(
    ("header", "key", "number", "name"),
    [
        ("id,stock", "id_column", 0, "item_id"),
        ("item_id,stocks", "columns.stock", 0, "stock"),
        ("item_id;stock", "id_column", 0, "item_id"),
        ("item_id,stock,stock", "columns.stock", 2, "stock"),
    ],
)
def test_a_file_without_a_column_is_refused(
    tmp_path: Path, header: str, key: str, number: int, name: str
) -> None:
    (tmp_path / "a.csv").write_text("item_id,stock\n")
    (tmp_path / "b.csv").write_text(header + "\n")
    with pytest.raises(ConfigError) as caught:
        find_table_files(spec_of(tmp_path / "*"))
    assert str(caught.value) == (
        f"catalog.metadata.{key}: {tmp_path / 'b.csv'} has {number} columns '{name}', wanted one; its "
        f"columns are {header.replace(',', ', ')}. Correct the name or the table."
    )


@pytest.mark.parametrize(
    ("columns", "key", "kind"),
    [
        ({"item_id": [1.5], "stock": [1]}, "id_column", "double"),
        ({"item_id": ["a"], "stock": [[1]]}, "columns.stock", "list<element: int64>"),
        ({"item_id": ["a"], "stock": [{"x": 1}]}, "columns.stock", "struct<x: int64>"),
    ],
)
def test_a_column_of_another_kind_is_refused(
    tmp_path: Path, columns: dict[str, Any], key: str, kind: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigError) as caught:
        find_table_files(spec_of(tmp_path / "a.parquet"))
    wanted = "string" if key == "id_column" else "int64"
    assert f"catalog.metadata.{key}: " in str(caught.value)
    assert f" as {kind}, which does not convert to {wanted}. Name another column" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 and no more"),
        ("a.csv", b""),
        ("a.csv", b"item_id,stock\na\n"),
        ("a.csv.gz", b""),
        ("a.csv.gz", b"item_id,stock\na,1\n"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\..* cannot be read as a (CSV|Parquet) table: .* again"):
        find_table_files(spec_of(tmp_path / name))


def test_damage_behind_the_header_is_found_while_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    lines = "".join(f"item-{row:09d},{row}\n" for row in range(400_000))
    file.write_text("item_id,stock\n" + lines + "torn\n")
    table = open_table(spec_of(file))
    with pytest.raises(
        DatasetError, match=r"a\.csv \(catalog\.metadata\.paths\) cannot be read as a CSV"
    ):
        list(read_blocks(table))


def test_a_changed_or_missing_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("item_id,stock\na,1\n")
    table = open_table(spec_of(file))
    refuse_changes(table)
    file.write_text("item_id,stock\na,2\n")
    with pytest.raises(DatasetError, match=r"a\.csv .* was changed while the index was built, wanted"):
        refuse_changes(table)
    file.unlink()
    with pytest.raises(DatasetError, match="was changed while the index was built"):
        refuse_changes(table)


def test_a_column_comes_from_one_place(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=(("price", "float64"), *STOCK))
    check_collisions(spec, ["brand"])
    with pytest.raises(ConfigError) as caught:
        check_collisions(spec, ["brand", "stock"])
    assert str(caught.value) == (
        "catalog.metadata.columns.stock: the images have a column 'stock' already, wanted each column "
        "from one place. Remove it here or from images.metadata."
    )
