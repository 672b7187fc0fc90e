"""Parquet files that hold images: values of every kind, row groups as shards, damaged row groups."""

import datetime
import decimal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transforms.sources.base import ImageRecord, ImageShard, UnreadableRegion
from transforms.sources.parquet import ParquetSource

IMAGES = [f"image number {i}".encode() * (i + 1) for i in range(10)]
IDS = [f"id-{i}" for i in range(10)]


def source_of(path: Path, **settings: Any) -> ParquetSource:
    return ParquetSource(format="parquet", paths=(str(path),), **settings)


def read_all(
    path: Path, metadata: dict[str, str] | None = None, **settings: Any
) -> list[ImageRecord | UnreadableRegion]:
    source = source_of(path, **settings)
    return [
        item for shard in source.list_shards(0, "unused") for item in source.read(shard, metadata or {})
    ]


def records_of(items: Sequence[ImageRecord | UnreadableRegion]) -> list[ImageRecord]:
    records = [item for item in items if isinstance(item, ImageRecord)]
    assert len(records) == len(items)
    return records


def reason_of(record: ImageRecord) -> str:
    assert record.error is not None
    assert record.data == b""
    return record.error.reason


def write(path: Path, row_group_size: int = 3, **columns: Any) -> Path:
    table = pa.table({"image": IMAGES, "image_id": IDS} | columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def group_bounds(path: Path, group: int) -> tuple[int, int]:
    """Where the pages of a row group lie: from its first byte to that of the next, or the footer."""
    metadata = pq.read_metadata(path)
    starts = [
        min(
            metadata.row_group(g).column(c).dictionary_page_offset
            or metadata.row_group(g).column(c).data_page_offset
            for c in range(metadata.num_columns)
        )
        for g in range(metadata.num_row_groups)
    ]
    end = path.stat().st_size - metadata.serialized_size - 8
    return starts[group], [*starts, end][group + 1]


def damage(path: Path, group: int) -> int:
    """Overwrites a row group and returns where it began."""
    start, stop = group_bounds(path, group)
    data = bytearray(path.read_bytes())
    data[start:stop] = b"\xa5" * (stop - start)
    path.write_bytes(bytes(data))
    return start


@pytest.mark.parametrize("row_group_size", [1, 3, 10])
@pytest.mark.parametrize("rows_per_shard", [1, 4, 6, 4096])
def test_images_are_read_in_order(tmp_path: Path, row_group_size: int, rows_per_shard: int) -> None:
    path = write(tmp_path / "shop" / "a.parquet", row_group_size, price=list(range(10)))
    records = records_of(read_all(path, {"price": "int64"}, rows_per_shard=rows_per_shard))
    assert [r.data for r in records] == IMAGES
    assert [r.image_id for r in records] == IDS
    assert [r.row for r in records] == list(range(10))
    assert [r.metadata for r in records] == [{"price": i} for i in range(10)]
    assert {(r.item_id, r.error) for r in records} == {(None, None)}


@pytest.mark.parametrize(
    ("rows_per_shard", "ranges"),
    [
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (5, [(0, 1), (1, 2), (2, 4)]),
        (6, [(0, 2), (2, 4)]),
        (9, [(0, 3), (3, 4)]),
        (10, [(0, 4)]),
    ],
)
def test_shards_are_ranges_of_row_groups(
    tmp_path: Path, rows_per_shard: int, ranges: list[tuple[int, int]]
) -> None:
    path = write(tmp_path / "shop" / "b" / "a.parquet")
    write(tmp_path / "shop" / "z.parquet", row_group_size=10)
    source = source_of(tmp_path / "shop" / "**" / "*.parquet", rows_per_shard=rows_per_shard)
    shards = source.list_shards(4, "unused")
    assert [(s.start, s.stop) for s in shards] == [*ranges, (0, 1)]
    names = [f"shop/b/a.parquet#{i:05d}" for i in range(len(ranges))]
    assert [s.name for s in shards] == [*names, "shop/z.parquet#00000"]
    assert {s.path for s in shards[:-1]} == {str(path)}
    assert {s.source for s in shards} == {4}
    assert source.list_shards(4, "unused") == shards
    write(tmp_path / "shop" / "z.parquet", row_group_size=10, price=list(range(10)))
    after = source.list_shards(4, "unused")
    assert [a.token == b.token for a, b in zip(shards, after, strict=True)] == [True] * len(ranges) + [
        False
    ]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(IMAGES, pa.binary()),
        pa.array(IMAGES, pa.large_binary()),
        pa.array([{"bytes": data, "path": "a.jpg"} for data in IMAGES]),
        pa.array([{"path": "a.jpg", "bytes": data, "more": 1} for data in IMAGES]),
        pa.array(IMAGES, pa.binary()).dictionary_encode(),
    ],
    ids=["binary", "large", "Hugging Face", "struct", "dictionary"],
)
def test_images_are_bytes_or_a_struct_with_bytes(tmp_path: Path, column: pa.Array) -> None:
    path = write(tmp_path / "a.parquet", image=column)
    assert [r.data for r in records_of(read_all(path))] == IMAGES


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, *IMAGES[1:]], pa.binary()),
        pa.array([{"bytes": None, "path": "a.jpg"}, *({"bytes": data} for data in IMAGES[1:])]),
        pa.array([None, *({"bytes": data} for data in IMAGES[1:])]),
    ],
    ids=["bytes", "bytes in a struct", "struct"],
)
def test_a_null_image_is_one_failure(tmp_path: Path, column: pa.Array) -> None:
    first, *rest = records_of(read_all(write(tmp_path / "a.parquet", image=column)))
    assert (reason_of(first), first.image_id) == ("missing_image", "id-0")
    assert [r.data for r in rest] == IMAGES[1:]


@pytest.mark.parametrize("name", ["picture", "image_id", "price"])
def test_another_image_column_fails_every_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.parquet", price=list(range(10)))
    records = records_of(read_all(path, columns={"image": name}))
    assert [(r.image_id, reason_of(r)) for r in records] == [(i, "missing_image") for i in IDS]
    assert records[0].error is not None
    assert records[0].error.message.endswith("Set images.sources.columns.image.")


def test_a_file_without_any_of_the_columns_has_a_failure_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1, 2, 3]}), path)
    records = records_of(read_all(path))
    assert [(r.row, reason_of(r)) for r in records] == [(i, "missing_id") for i in range(3)]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpeg": [b"x"], "sku": [7], "product": ["p"], "Brand": ["acme"]}), path)
    columns = {
        "image": "jpeg",
        "image_id": "sku",
        "item_id": "product",
        "metadata": {"brand": "Brand"},
    }
    (record,) = records_of(read_all(path, {"brand": "string", "size": "int64"}, columns=columns))
    assert (record.image_id, record.item_id, record.data) == ("7", "p", b"x")
    assert record.metadata == {"brand": "acme", "size": None}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (pa.array([None], pa.string()), "missing_id"),
        (pa.array([""]), "missing_id"),
        (pa.array([7.0]), "bad_metadata"),
        (pa.array([True]), "bad_metadata"),
        (pa.array([["a"]]), "bad_metadata"),
        (pa.array([b"\xff"]), "bad_metadata"),
    ],
)
def test_a_row_without_a_usable_id_is_one_failure(tmp_path: Path, value: pa.Array, reason: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"], "image_id": value}), path)
    (record,) = records_of(read_all(path))
    assert (reason_of(record), record.image_id) == (reason, None)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (pa.array(["red"]), "string", "red"),
        (pa.array(["red"]).dictionary_encode(), "string", "red"),
        (pa.array(["red"], pa.large_string()), "string", "red"),
        (pa.array(["red"], pa.string_view()), "string", "red"),
        (pa.array([b"red"]), "string", "red"),
        (pa.array([7], pa.uint8()), "int64", 7),
        (pa.array([3.0]), "int64", 3),
        (pa.array([0.5], pa.float32()), "float64", 0.5),
        (pa.array([decimal.Decimal("12.50")]), "float64", 12.5),
        (pa.array([True]), "bool", True),
        (pa.array(["true"]), "bool", True),
        (pa.array([datetime.date(2026, 1, 31)]), "string", "2026-01-31"),
        (pa.array([10**18 + 1], pa.timestamp("ns")), "string", "2001-09-09 01:46:40.000000001"),
        (pa.nulls(1), "int64", None),
        (pa.array([None], pa.float64()), "float64", None),
    ],
)
def test_metadata_has_the_configured_type(
    tmp_path: Path, value: pa.Array, kind: str, wanted: object
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"], "image_id": ["a"], "c": value}), path)
    (record,) = records_of(read_all(path, {"c": kind}))
    assert record.error is None
    assert record.metadata == {"c": wanted}
    assert type(record.metadata["c"]) is type(wanted)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array(["many", "2"]), "int64"),
        (pa.array([0.5, 2]), "int64"),
        (pa.array([2**63, 2], pa.uint64()), "int64"),
        (pa.array([[1], [2]]), "string"),
        # Arrow does not look at the text that it is given here.
        (pa.array([b"\xff\xfe", b"2"]).view(pa.string()), "string"),
    ],
)
def test_metadata_of_another_type_fails_that_image_only(
    tmp_path: Path, values: pa.Array, kind: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x", b"y"], "image_id": ["a", "b"], "c": values}), path)
    first, second = records_of(read_all(path, {"c": kind}))
    assert (reason_of(first), first.image_id) == ("bad_metadata", "a")
    assert (second.error is None) == (kind != "string" or not pa.types.is_list(values.type))


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("rows_per_shard", [1, 4096])
def test_a_damaged_row_group_costs_no_other(tmp_path: Path, group: int, rows_per_shard: int) -> None:
    path = write(tmp_path / "a.parquet", price=list(range(10)))
    start = damage(path, group)
    items = read_all(path, {"price": "int64"}, rows_per_shard=rows_per_shard)
    (region,) = [item for item in items if isinstance(item, UnreadableRegion)]
    assert region.offset == start
    first, rows = 3 * group, min(3, 10 - 3 * group)
    assert region.error.startswith(
        f"Row group {group}, which begins at byte {start}, cannot be read from row {first} on "
        f"({rows} of its {rows} rows): "
    )
    records = [item for item in items if isinstance(item, ImageRecord)]
    assert [r.row for r in records] == [row for row in range(10) if row // 3 != group]
    assert [r.data for r in records] == [IMAGES[r.row] for r in records]


def test_a_page_that_does_not_match_its_checksum_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    big = [bytes([i]) * 1000 for i in range(100)]
    ids = [str(i) for i in range(100)]
    pq.write_table(
        pa.table({"image": big, "image_id": ids}), path, row_group_size=100, use_dictionary=False,
        compression="none", data_page_size=20_000, write_batch_size=1, write_page_checksum=True,
    )  # fmt: skip
    data = bytearray(path.read_bytes())
    data[data.index(bytes([50]) * 1000) + 500] ^= 1
    path.write_bytes(bytes(data))
    *records, region = read_all(path)
    assert isinstance(region, UnreadableRegion)
    # What was read before stays; the rest of the row group is one region.
    assert 16 <= len(records) <= 50
    assert [r.data for r in records_of(records)] == big[: len(records)]
    assert f"from row {len(records)} on ({100 - len(records)} of its 100 rows)" in region.error


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table", b"PAR1" * 99])
def test_a_file_without_a_footer_is_one_region(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    write(tmp_path / "b.parquet")
    region, *records = read_all(tmp_path / "*.parquet")
    assert isinstance(region, UnreadableRegion)
    assert region.source_shard == f"{tmp_path.name}/a.parquet#00000"
    assert region.offset == 0
    assert region.error.startswith("The Parquet file cannot be opened, so nothing is read from byte 0")
    assert [r.data for r in records_of(records)] == IMAGES


def test_a_truncated_file_is_one_region(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    (region,) = read_all(path)
    assert isinstance(region, UnreadableRegion)


def test_a_file_without_rows_has_no_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == []


def test_a_shard_that_is_gone_by_now_is_an_error_not_an_empty_shard(tmp_path: Path) -> None:
    shard = ImageShard(0, "a/gone", "md5:0", str(tmp_path / "gone"), 0, 1)
    with pytest.raises(FileNotFoundError):
        list(source_of(tmp_path / "gone").read(shard, {}))


def test_fetch_returns_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "c" / "a.parquet", image=pa.array([*IMAGES[:8], None, IMAGES[9]]))
    damage(path, 1)
    source = source_of(path, rows_per_shard=4)
    shards = source.list_shards(0, "unused")
    read = {
        item.row: item.data
        for shard in shards
        for item in source.read(shard, {})
        if isinstance(item, ImageRecord) and item.error is None
    }
    assert read == {i: IMAGES[i] for i in (0, 1, 2, 6, 7, 9)}
    assert source.fetch(shards[0].name, range(10)) == read
    assert source.fetch(shards[-1].name, [7, 99]) == {7: IMAGES[7]}
    path.write_bytes(b"replaced")
    assert source.fetch(shards[-1].name, [7]) == {}
    path.unlink()
    assert source.fetch(shards[-1].name, [7]) == {}
