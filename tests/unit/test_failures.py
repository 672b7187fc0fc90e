"""The failures dataset: every failed image is one row, and reasons are counted."""

from pathlib import Path

import pyarrow.parquet as pq

from transforms.failures import SCHEMA, UNREADABLE_REGION, Failure, count_reasons, write_failures

ROWS = [
    Failure("a", "shard-0", 0, "decode", "truncated", "The file ends in row 3."),
    Failure(None, "shard-0", 4, "read", "missing_id", "Feature 'image_id' holds no id."),
    Failure(None, "shard-0", None, "read", UNREADABLE_REGION, "The framing is lost at byte 7"),
    Failure("ü/b 1.png", "shard-1", 2**40, "decode", "truncated", "«Fehler»\nzweite Zeile"),
]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "part.parquet"
    write_failures(str(path), ROWS)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert [Failure(**row) for row in table.to_pylist()] == ROWS
    assert [p.name for p in path.parent.iterdir()] == ["part.parquet"]


def test_no_failures_are_a_file_with_all_columns(tmp_path: Path) -> None:
    write_failures(str(tmp_path / "none.parquet"), [])
    table = pq.read_table(tmp_path / "none.parquet")
    assert table.schema.equals(SCHEMA)
    assert len(table) == 0


def test_the_same_failures_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_failures(str(tmp_path / name), ROWS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_regions_are_not_counted_as_images() -> None:
    assert list(count_reasons(ROWS).items()) == [("missing_id", 1), ("truncated", 2)]
    assert count_reasons([]) == {}
