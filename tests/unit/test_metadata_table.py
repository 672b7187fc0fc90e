"""Values of a metadata table for the ids of an index shard, against a dictionary."""

import decimal
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import metadata_table, table_files
from index_builder.datasets.metadata_table import convert_values, count_used, look_up
from index_builder.datasets.table_files import MetadataTable, TableSpec, open_table
from index_builder.errors import DatasetError

COLUMNS = (("stock", "int64"), ("price", "float64"), ("brand", "string"), ("new", "bool"))


def table_of(*paths: Path, columns: Any = COLUMNS, id_column: str = "id") -> MetadataTable:
    return open_table(TableSpec(tuple(map(str, paths)), "item_id", id_column, columns))


def write_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["id,stock,price,brand,new", *rows]) + "\n")
    return path


def test_values_go_to_every_row_of_an_id_and_null_to_unknown_ones(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "a.csv",
        "b,2,1.5,ACME,true",
        "unknown,3,2,B,1",
        '"a,""1"""," 7 ",,,',
        "7,1,1,short,0",
    )
    found = look_up(table_of(file), pa.array(["x", 'a,"1"', "b", "007", "b"]))
    assert found.columns.to_pydict() == {
        "stock": [None, 7, 2, None, 2],
        "price": [None, None, 1.5, None, 1.5],
        "brand": [None, None, "ACME", None, "ACME"],
        "new": [None, None, True, None, True],
    }
    assert found.columns.schema.types == [pa.int64(), pa.float64(), pa.string(), pa.bool_()]
    assert (found.matched, found.table_rows, found.used.tolist()) == (3, 4, [0, 2])


@pytest.mark.parametrize("ids", [[], ["a"]])
def test_an_empty_table_and_an_empty_shard(tmp_path: Path, ids: list[str]) -> None:
    empty = write_csv(tmp_path / "a.csv")
    found = look_up(table_of(empty), pa.array(ids, pa.string()))
    assert found.columns.to_pylist() == [dict.fromkeys(("stock", "price", "brand", "new"))] * len(ids)
    assert (found.matched, found.table_rows, len(found.used)) == (0, 0, 0)
    full = write_csv(tmp_path / "b.csv", "b,1,1,1,1")
    assert look_up(table_of(full), pa.array(ids, pa.string())).table_rows == 1


@pytest.mark.parametrize("batch_rows", [1, 7, 1 << 16])
@pytest.mark.parametrize("n_ids", [5, 300])
def test_any_cut_of_the_table_gives_what_a_dictionary_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int, n_ids: int
) -> None:
    monkeypatch.setattr(metadata_table, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(table_files, "BATCH_ROWS", batch_rows)
    draw = random.Random(n_ids)
    names = draw.sample([f"item-{number}" for number in range(1000)], 500)
    values = {name: (draw.randrange(9), draw.choice([None, "x", "y"])) for name in names}
    # Files of both kinds, of several sizes, one of them empty, with other columns between.
    for number, (start, stop) in enumerate([(0, 1), (1, 1), (1, 200), (200, 203), (203, 500)]):
        rows = names[start:stop]
        table = pa.table(
            {
                "brand": pa.array([values[name][1] for name in rows], pa.string()),
                "other": pa.array(rows, pa.string()),
                "id": pa.array(rows, pa.string()).dictionary_encode(),
                "stock": pa.array([values[name][0] for name in rows], pa.int16()),
            }
        )
        if number % 2:
            lines = [f"{name},{values[name][1] or ''},{values[name][0]}" for name in rows]
            (tmp_path / f"{number}.csv").write_text("\n".join(["id,brand,stock", *lines]) + "\n")
        else:
            pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=60)
    ids = [f"item-{draw.randrange(1000)}" for _ in range(n_ids)]
    table_here = table_of(tmp_path / "*", columns=(("stock", "int64"), ("brand", "string")))
    found = look_up(table_here, pa.array(ids))
    expected = [values.get(name, (None, None)) for name in ids]
    assert found.columns["stock"].to_pylist() == [stock for stock, _ in expected]
    assert found.columns["brand"].to_pylist() == [brand for _, brand in expected]
    assert found.matched == sum(name in values for name in ids)
    used = {row for row, name in enumerate(names) if name in ids}
    assert (set(found.used.tolist()), found.table_rows) == (used, 500)


def test_ids_that_are_numbers_or_unmarked_bytes(tmp_path: Path) -> None:
    for number, ids in enumerate(([12, None], [b"13", b"a"])):
        table = pa.table({"id": ids, "stock": [1, 2]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    table_here = table_of(tmp_path / "*", columns=(("stock", "int64"),))
    found = look_up(table_here, pa.array(["12", "13", "012"]))
    assert found.columns["stock"].to_pylist() == [1, 1, None]
    pq.write_table(pa.table({"id": [b"\xff"], "stock": [1]}), tmp_path / "2.parquet")
    with pytest.raises(DatasetError, match=r"2\.parquet .* cannot be read .* Invalid UTF8"):
        look_up(table_of(tmp_path / "*", columns=(("stock", "int64"),)), pa.array(["12"]))


@pytest.mark.parametrize("batch_rows", [1, 1 << 16])
def test_an_id_twice_stops_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(metadata_table, "BATCH_ROWS", batch_rows)
    one = write_csv(tmp_path / "1.csv", "a,1,1,,", "b,1,1,,", "z,,,,", "z,,,,")
    two = write_csv(tmp_path / "2.csv", "c,1,1,,", "d,1,1,,", "b,1,1,,", "b,1,1,,")
    # Rows that no item asks for may be twice.
    assert look_up(table_of(one, two), pa.array(["a", "c"])).matched == 2
    with pytest.raises(DatasetError) as caught:
        look_up(table_of(one, two), pa.array(["a", "b", "a"]))
    assert str(caught.value) == (
        f"The id 'b' is in the table of catalog.metadata more than once: {one} row 1 and {two} row 2 "
        "(counted from 0), wanted each id once. Remove one of the rows."
    )
    again = write_csv(tmp_path / "3.csv", "x,1,1,,", "b,1,1,,", "b,1,1,,")
    with pytest.raises(DatasetError, match=r"3\.csv row 1 and .*3\.csv row 2 \(counted from 0\)"):
        look_up(table_of(again), pa.array(["b"]))


@pytest.mark.parametrize(
    ("row", "column", "value", "kind"),
    [
        ("b,many,1,,", "stock", "'many'", "int64"),
        ("b,1.5,1,,", "stock", "'1.5'", "int64"),
        ("b,9223372036854775808,1,,", "stock", "'9223372036854775808'", "int64"),
        ('b,1,"1,5",,', "price", "'1,5'", "float64"),
        ("b,1,1,,perhaps", "new", "'perhaps'", "bool"),
    ],
)
def test_a_value_that_does_not_convert_is_named(
    tmp_path: Path, row: str, column: str, value: str, kind: str
) -> None:
    first = write_csv(tmp_path / "1.csv", *[f"x{number},1,1,x,1" for number in range(40)])
    second = write_csv(tmp_path / "2.csv", "a,1,1,,1", "unknown,much,dear,,maybe", row, row[1:])
    ids = pa.array(["b", "a", *[f"x{number}" for number in range(40)]])
    with pytest.raises(DatasetError) as caught:
        look_up(table_of(first, second), ids)
    assert str(caught.value) == (
        f"{second} row 2 (counted from 0): id 'b' has {column} {value}, wanted {kind} "
        f"(catalog.metadata.columns.{column}). Correct the value there; leave it empty where it is not "
        "known."
    )


def test_text_that_is_no_text_is_named(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b"], "brand": column}), tmp_path / "a.parquet")
    table = table_of(tmp_path / "a.parquet", columns=(("brand", "string"),))
    with pytest.raises(DatasetError, match=r"row 1 .*: id 'b' has brand b'\\xff\\xfe', wanted string"):
        look_up(table, pa.array(["b", "a"]))


@pytest.mark.parametrize(
    ("values", "kind", "wanted"),
    [
        (
            ["12", " -3 ", "+4", "12.0", "5.", "", "  ", None],
            "int64",
            [12, -3, 4, 12, 5, None, None, None],
        ),
        (["9223372036854775807"], "int64", [2**63 - 1]),
        (["1e3", " .5", "", "-2"], "float64", [1000.0, 0.5, None, -2.0]),
        (["true", "False", "1", " 0", ""], "bool", [True, False, True, False, None]),
        (["", " x "], "string", ["", " x "]),
        ([12, None], "string", ["12", None]),
        ([3.0, None], "int64", [3, None]),
        ([decimal.Decimal("12.50"), None], "float64", [12.5, None]),
        ([decimal.Decimal("12.00")], "int64", [12]),
        ([0, 1, None], "bool", [False, True, None]),
        ([1.0], "bool", [True]),
        ([True, None], "bool", [True, None]),
        ([True], "int64", [1]),
        ([None], "int64", [None]),
        ([None], "bool", [None]),
        ([None], "string", [None]),
        ([b"bytes"], "string", ["bytes"]),
    ],
)
def test_values_that_convert(values: list[Any], kind: str, wanted: list[Any]) -> None:
    for column in (pa.array(values), pa.array(values).dictionary_encode(), pa.array(values)[:0]):
        found = convert_values(column, kind)
        assert found.to_pylist() == wanted[: len(column)]
        assert str(found.type) == {"float64": "double"}.get(kind, kind)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["x"], "int64"),
        (["1.5"], "int64"),
        (["."], "int64"),
        (["yes"], "bool"),
        (["2"], "bool"),
        ([2], "bool"),
        ([0.5], "bool"),
        ([1.5], "int64"),
        ([float("nan")], "int64"),
        ([2**53 + 1], "float64"),
        ([decimal.Decimal("12.50")], "int64"),
        ([b"\xff"], "string"),
    ],
)
def test_values_that_do_not(values: list[Any], kind: str) -> None:
    with pytest.raises(pa.ArrowException):
        convert_values(pa.array(values), kind)


def test_a_table_that_changes_under_the_reader_is_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "a,1,1,,")
    table = table_of(file)
    write_csv(file, "a,2,1,,")
    with pytest.raises(DatasetError, match="was changed while the index was built"):
        look_up(table, pa.array(["a"]))


def test_rows_that_several_shards_use_count_once() -> None:
    used = [np.array(rows, dtype=np.int64) for rows in ([0, 3], [], [3, 5])]
    assert count_used(iter(used), 7) == 3
    assert count_used(iter([]), 0) == 0
