"""Duplicate ids: found wherever the copies are, and none invented."""

import json
from collections import Counter
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Part
from index_builder.errors import DatasetError
from pipelines.runners import RunnerSpec, make_pipeline, run_pipeline
from transforms.duplicates import MOST_LISTED, FindDuplicateIds, IdPart, find_duplicates, split_ids

# As the failures dataset has them: all null where unknown, and more columns than are looked at.
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("extra", pa.int32()),
        ("source_shard", pa.string()),
        ("row", pa.int64()),
    ]
)


def write_part(folder: Path, name: str, ids: list[str | None], row_group: int = 3) -> IdPart:
    columns = {
        "image_id": ids,
        "extra": [0] * len(ids),
        "source_shard": [name] * len(ids),
        "row": list(range(len(ids))),
    }
    folder.mkdir(exist_ok=True)
    table = pa.table(columns, schema=SCHEMA)
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=row_group)
    file = manifests.describe_file(str(folder), f"{name}.parquet")
    return IdPart(str(folder), Part(name, "key", len(ids), (file,)))


def find(tmp_path: Path, parts: list[IdPart], buckets: int = 4) -> tuple[int, dict[str, list[str]]]:
    """Runs the transform; returns the count and the listed ids of all buckets."""
    folder = tmp_path / "found"

    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create(parts) | FindDuplicateIds(str(folder), buckets)

    run_pipeline(define, RunnerSpec())
    count, listed = 0, {}
    for path in folder.glob("*") if folder.exists() else ():
        document = json.loads(path.read_text())
        count += document["count"]
        listed |= document["ids"]
    return count, listed


def test_different_ids_write_nothing(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / "a", f"part-{i}", [f"{i}-{j}" for j in range(7)]) for i in range(3)]
    assert find(tmp_path, parts) == (0, {})
    assert not (tmp_path / "found").exists()


def test_copies_in_one_part_and_in_several_are_found_with_all_locations(tmp_path: Path) -> None:
    parts = [
        write_part(tmp_path / "a", "p0", ["x", "a", "b", "c", "d", "a", "e"]),
        write_part(tmp_path / "a", "p1", ["f", "x", "ü/1"]),
        write_part(tmp_path / "other", "p2", ["ü/1", "g", "x"]),
    ]
    assert find(tmp_path, parts) == (
        3,
        {
            "a": ["p0 row 1", "p0 row 5"],
            "x": ["p0 row 0", "p1 row 1", "p2 row 2"],
            "ü/1": ["p1 row 2", "p2 row 0"],
        },
    )


def test_null_ids_are_no_ids(tmp_path: Path) -> None:
    parts = [
        write_part(tmp_path / "a", "p0", [None, None, "a", None]),
        write_part(tmp_path / "a", "p1", [None, "b", ""]),
    ]
    assert find(tmp_path, parts) == (0, {})


def test_parts_without_rows_are_fine(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / "a", f"p{i}", ["x"][:i]) for i in range(2)]
    assert find(tmp_path, parts) == (0, {})
    assert find(tmp_path, [*parts, write_part(tmp_path / "a", "p2", ["x"])])[0] == 1


def test_the_paths_of_the_files_are_the_output(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / "a", "p0", ["x", "x"])]
    with make_pipeline(RunnerSpec()) as pipeline:
        found = pipeline | beam.Create(parts) | FindDuplicateIds(str(tmp_path / "found"), 1)
        assert_that(found, equal_to([str(tmp_path / "found" / "bucket-00000.json")]))


def test_all_duplicates_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    ids: list[str | None] = [f"id-{i:03d}" for i in range(MOST_LISTED + 5)]
    parts = [write_part(tmp_path / "a", name, ids) for name in ("p0", "p1")]
    count, listed = find(tmp_path, parts, buckets=1)
    assert count == MOST_LISTED + 5
    assert list(listed) == ids[:MOST_LISTED]


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    part = write_part(tmp_path / "a", "p0", ["x", "y"])
    path = tmp_path / "a" / "p0.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"p0\.parquet"):
        find(tmp_path, [part])


IDS = st.lists(
    st.lists(st.sampled_from(["", "a", "b", "ab", "ü", "日本", "\x00", None]), max_size=8), max_size=5
)


@given(IDS, st.integers(1, 5))
def test_what_is_found_is_what_a_counter_finds(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str | None]], buckets: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "parts"
    blocks: dict[int, list[bytes]] = {}
    for number, ids in enumerate(parts):
        for bucket, block in split_ids(write_part(folder, f"p{number}", ids), buckets):
            blocks.setdefault(bucket, []).append(block)
    found: dict[str, list[str]] = {}
    for bucket in blocks.values():
        more = find_duplicates(bucket)
        assert not found.keys() & more.keys(), "an id belongs to one bucket"
        assert list(more) == sorted(more)
        found |= more

    counts = Counter(i for ids in parts for i in ids if i is not None)
    places: dict[str, list[str]] = {}
    for number, ids in enumerate(parts):
        for row, image_id in enumerate(ids):
            if image_id is not None and counts[image_id] > 1:
                places.setdefault(image_id, []).append(f"p{number} row {row}")
    assert found == {image_id: sorted(where) for image_id, where in places.items()}


def test_no_vector_and_no_row_travels_alone(tmp_path: Path) -> None:
    ids: list[str | None] = [f"id-{i}" for i in range(3000)]
    part = write_part(tmp_path / "a", "p0", ids, row_group=1000)
    blocks = list(split_ids(part, 8))
    assert len(blocks) == 3 * 8
    tables = [pa.ipc.open_stream(block).read_all() for _, block in blocks]
    assert {tuple(table.column_names) for table in tables} == {("image_id", "source_shard", "row")}
    assert sum(map(len, tables)) == 3000
