"""The export: lists as a recommender loads them, in both formats, score for score."""

import json
import math
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Part
from index_builder.errors import DatasetError
from index_builder.search.neighbors import FILLED, NeighborsSchema
from pipelines.runners import RunnerSpec, make_pipeline, run_pipeline
from transforms.exports import (
    ExportNeighbors,
    ExportSpec,
    export_schema,
    merge_items,
    select_neighbors,
    split_items,
)
from transforms.item_rows import ItemRows

BOTH = ("parquet", "jsonl")
SCHEMA = NeighborsSchema((("brand", pa.string()), ("price", pa.float64()))).arrow()

# Three queries: two neighbours, none, and one with nulls.
LISTS: list[tuple[str, list[tuple[str, float, str | None, float | None]]]] = [
    ("q0", [("a", 0.75, "acme", 1.5), ('ü\n"b"', 0.5, None, 2.0)]),
    ("q1", []),
    ("q2", [("q0", -0.25, "beta", None)]),
]


def neighbors(lists: list[tuple[str, list[tuple[Any, ...]]]]) -> pa.Table:
    """A block of a neighbours dataset; each neighbour is (id, score, brand, price)."""
    n = len(lists)
    columns = {
        "query_id": [query for query, _ in lists],
        "neighbor_ids": [[found[0] for found in row] for _, row in lists],
        "scores": [[found[1] for found in row] for _, row in lists],
        "status": [FILLED] * n,
        "query_row": list(range(n)),
        "neighbor_rows": [[0] * len(row) for _, row in lists],
        "query_brand": ["own"] * n,
        "neighbor_brand": [[found[2] for found in row] for _, row in lists],
        "query_price": [0.0] * n,
        "neighbor_price": [[found[3] for found in row] for _, row in lists],
    }
    return pa.table(columns, schema=SCHEMA)


def test_each_query_is_a_row_with_its_list() -> None:
    table = select_neighbors(neighbors(LISTS), ExportSpec(BOTH))
    assert table.to_pylist() == [
        {"query_id": "q0", "neighbors": [{"id": "a", "score": 0.75}, {"id": 'ü\n"b"', "score": 0.5}]},
        {"query_id": "q1", "neighbors": []},
        {"query_id": "q2", "neighbors": [{"id": "q0", "score": -0.25}]},
    ]


def test_columns_of_the_neighbours_are_carried_in_the_order_asked_for() -> None:
    table = select_neighbors(neighbors(LISTS), ExportSpec(BOTH, ("price", "brand")))
    assert table.schema.equals(export_schema((("price", pa.float64()), ("brand", pa.string()))))
    rows = table.to_pylist()
    assert list(rows[0]["neighbors"][0].items()) == [
        ("id", "a"),
        ("score", 0.75),
        ("price", 1.5),
        ("brand", "acme"),
    ]
    assert rows[0]["neighbors"][1]["brand"] is None
    assert rows[2]["neighbors"][0]["price"] is None


@pytest.mark.parametrize(
    ("least", "wanted"),
    [
        (-1.0, [2, 0, 1]),
        (-0.25, [2, 0, 1]),
        (-0.2499, [2, 0, 0]),
        (0.5, [2, 0, 0]),
        (float(np.nextafter(np.float32(0.5), np.float32(1))), [1, 0, 0]),
        (0.75, [1, 0, 0]),
        (0.76, [0, 0, 0]),
    ],
)
def test_the_least_score_is_inclusive_and_empty_lists_stay(least: float, wanted: list[int]) -> None:
    table = select_neighbors(neighbors(LISTS), ExportSpec(BOTH, ("brand",), least))
    assert table["query_id"].to_pylist() == ["q0", "q1", "q2"]
    assert [len(row) for row in table["neighbors"].to_pylist()] == wanted
    if wanted[0] == 1:
        assert table["neighbors"].to_pylist()[0] == [{"id": "a", "score": 0.75, "brand": "acme"}]


def test_a_least_score_means_the_float32_that_is_written() -> None:
    score = float(np.float32(0.9))
    assert score < 0.9
    table = select_neighbors(neighbors([("q", [("a", score, None, None)])]), ExportSpec(BOTH, (), 0.9))
    assert len(table["neighbors"].to_pylist()[0]) == 1


def test_slices_and_several_chunks_are_read_right() -> None:
    spec = ExportSpec(BOTH, ("brand",), 0.0)
    whole = neighbors(LISTS * 3)
    wanted = select_neighbors(whole, spec).to_pylist()
    assert select_neighbors(whole.slice(1, 4), spec).to_pylist() == wanted[1:5]
    chunked = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 5), whole.slice(7)])
    assert select_neighbors(chunked, spec).to_pylist() == wanted
    assert select_neighbors(whole.slice(0, 0), spec).to_pylist() == []


def test_a_column_that_the_neighbours_do_not_carry_is_refused() -> None:
    with pytest.raises(DatasetError) as caught:
        select_neighbors(neighbors(LISTS), ExportSpec(BOTH, ("brand", "colour")))
    assert str(caught.value) == (
        "export.columns names 'colour', but the neighbours carry only ['neighbor_ids', "
        "'neighbor_rows', 'neighbor_brand', 'neighbor_price']. Run the join again with this "
        "configuration."
    )


SCORES = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(
    st.tuples(st.text(max_size=3), SCORES, st.none() | st.text(max_size=2), st.none() | SCORES),
    max_size=4,
)


@given(st.lists(st.tuples(st.text(max_size=3), ROWS), max_size=4), st.none() | SCORES)
def test_selection_is_what_a_loop_selects(
    lists: list[tuple[str, list[tuple[Any, ...]]]], least: float | None
) -> None:
    table = select_neighbors(neighbors(lists), ExportSpec(BOTH, ("brand",), least))
    assert table.to_pylist() == [
        {
            "query_id": query,
            "neighbors": [
                {"id": i, "score": score, "brand": brand}
                for i, score, brand, _ in row
                if least is None or score >= least
            ],
        }
        for query, row in lists
    ]


def write_part(folder: Path, name: str, table: pa.Table, row_group: int = 2) -> Part:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / f"{name}.parquet", row_group_size=row_group)
    file = manifests.describe_file(str(folder), f"{name}.parquet")
    return Part(name, "neighbors-key", len(table), (file,))


def export(
    tmp_path: Path, parts: list[Part], spec: ExportSpec, key: str = "key"
) -> tuple[Path, dict[str, int]]:
    """Runs the transform; returns the folder of the export and the counters."""
    folder = tmp_path / "export"

    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create(parts) | ExportNeighbors(str(tmp_path / "n"), spec, str(folder), key)

    return folder, run_pipeline(define, RunnerSpec())


def test_both_formats_hold_the_same_rows(tmp_path: Path) -> None:
    spec = ExportSpec(BOTH, ("price",), 0.0)
    parts = [
        write_part(tmp_path / "n", "part-00000", neighbors(LISTS)),
        write_part(tmp_path / "n", "part-00001", neighbors(LISTS[::-1])),
    ]
    folder, counters = export(tmp_path, parts, spec)
    total = 0
    for part in parts:
        table = pq.read_table(folder / f"{part.name}.parquet")
        assert table.schema.equals(export_schema((("price", pa.float64()),)))
        lines = (folder / f"{part.name}.jsonl").read_text(encoding="utf-8").splitlines()
        # A newline in an id must not break a line in two.
        assert len(lines) == 3
        assert [json.loads(line) for line in lines] == table.to_pylist()
        total += sum(p.stat().st_size for p in folder.glob(f"{part.name}.*"))
    assert counters["export.queries"] == 6
    assert counters["export.pairs_out"] == 4
    assert counters["export.bytes_out"] == total


@pytest.mark.parametrize("formats", [("parquet",), ("jsonl",)])
def test_only_the_wanted_formats_are_written(tmp_path: Path, formats: tuple[str, ...]) -> None:
    folder, _ = export(
        tmp_path, [write_part(tmp_path / "n", "p", neighbors(LISTS))], ExportSpec(formats)
    )
    assert [path.name for path in folder.iterdir() if path.is_file()] == [f"p.{formats[0]}"]


def test_scores_in_jsonl_are_the_float32_scores_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.uniform(-1, 1, 500).astype(np.float32),
            np.frombuffer(rng.bytes(4 * 500), dtype=np.float32),
            np.array([0.0, -0.0, 1.0, 0.1, 1e-45, 3.4028235e38], dtype=np.float32),
        ]
    )
    values = values[np.isfinite(values)]
    row = [(f"i{i}", float(value), None, None) for i, value in enumerate(values)]
    part = write_part(tmp_path / "n", "p", neighbors([("q", row)]))
    folder, _ = export(tmp_path, [part], ExportSpec(("jsonl",)))
    found = json.loads((folder / "p.jsonl").read_text())["neighbors"]
    read = np.array([neighbor["score"] for neighbor in found], dtype=np.float32)
    np.testing.assert_array_equal(read.view(np.int32), values.view(np.int32))
    # No digits beyond those that tell float32 numbers apart.
    assert all(neighbor["score"] == float(f"{neighbor['score']:.9g}") for neighbor in found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_jsonl_stays_json_where_metadata_is_no_number(tmp_path: Path, value: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lists: list[tuple[str, list[tuple[Any, ...]]]] = [
        ("q", [("a", 0.5, "b", value), ("c", 0.25, None, 1.5)])
    ]
    part = write_part(tmp_path / "n", "p", neighbors(lists))
    folder, _ = export(tmp_path, [part], ExportSpec(BOTH, ("price",)))
    row = json.loads((folder / "p.jsonl").read_text(), parse_constant=refuse)
    assert [neighbor["price"] for neighbor in row["neighbors"]] == [None, 1.5]


def test_the_parts_describe_what_was_written(tmp_path: Path) -> None:
    source = write_part(tmp_path / "n", "p", neighbors(LISTS))
    folder = str(tmp_path / "export")

    def check(parts: list[Part]) -> None:
        (part,) = parts
        assert (part.name, part.key, part.rows, part.properties) == ("p", "key", 3, {"pairs": 3})
        assert [file.path for file in part.files] == ["p.parquet", "p.jsonl"]
        for file in part.files:
            manifests.verify_file(folder, file)

    with make_pipeline(RunnerSpec()) as pipeline:
        found = (
            pipeline
            | beam.Create([source])
            | ExportNeighbors(str(tmp_path / "n"), ExportSpec(BOTH), folder, "key")
        )
        assert_that(found, check)


def test_a_finished_part_is_not_written_again_unless_its_key_changes(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / "n", "p", neighbors(LISTS))]
    folder, _ = export(tmp_path, parts, ExportSpec(BOTH))
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("p.*")}
    _, counters = export(tmp_path, parts, ExportSpec(BOTH))
    assert counters == {}
    again = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("p.*")}
    assert again == first
    export(tmp_path, parts, ExportSpec(BOTH, (), 0.6), key="other")
    changed = {path.name: path.read_bytes() for path in folder.glob("p.*")}
    assert changed["p.jsonl"] != first["p.jsonl"][1]


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / "n", "p", neighbors(LISTS))]
    folder, _ = export(tmp_path, parts, ExportSpec(BOTH, ("brand",)))
    first = {path.name: path.read_bytes() for path in folder.glob("p.*")}
    export(tmp_path, parts, ExportSpec(BOTH, ("brand",)), key="again")
    assert {path.name: path.read_bytes() for path in folder.glob("p.*")} == first


def test_a_part_without_queries_is_exported_with_its_schema(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / "n", "p", neighbors([]))]
    folder, counters = export(tmp_path, parts, ExportSpec(BOTH, ("brand",), 0.5))
    assert pq.read_schema(folder / "p.parquet").equals(export_schema((("brand", pa.string()),)))
    assert (folder / "p.jsonl").read_bytes() == b""
    assert counters["export.queries"] == 0


ITEM_SCHEMA = NeighborsSchema((("item_id", pa.string()), ("brand", pa.string()))).arrow()
Image = tuple[str, str, list[tuple[str, str, float, str | None]]]


def item_neighbors(rows: list[Image]) -> pa.Table:
    """A block of neighbours; a row is (image, item, neighbours as (image, item, score, brand))."""
    n = len(rows)
    columns = {
        "query_id": [image for image, _, _ in rows],
        "neighbor_ids": [[found[0] for found in row] for _, _, row in rows],
        "scores": [[found[2] for found in row] for _, _, row in rows],
        "status": [FILLED] * n,
        "query_row": list(range(n)),
        "neighbor_rows": [[0] * len(row) for _, _, row in rows],
        "query_item_id": [item for _, item, _ in rows],
        "neighbor_item_id": [[found[1] for found in row] for _, _, row in rows],
        "query_brand": ["own"] * n,
        "neighbor_brand": [[found[3] for found in row] for _, _, row in rows],
    }
    return pa.table(columns, schema=ITEM_SCHEMA)


def merged(rows: list[Image], items: ItemRows, least: float | None = None) -> list[dict[str, Any]]:
    """The rows by item, by a loop."""
    found: dict[str, list[tuple[str, str, float, str | None]]] = {}
    for _, item, neighbours in rows:
        found.setdefault(item, []).extend(neighbours)
    result = []
    for item in sorted(found, key=str.encode):
        ordered = sorted(found[item], key=lambda one: (-one[2], one[0].encode()))
        taken: list[tuple[str, str, float, str | None]] = []
        for one in ordered:
            caps = dict(items.max_per)
            full = one[3] is not None and "brand" in caps and (
                sum(other[3] == one[3] for other in taken) >= caps["brand"]
            )  # fmt: skip
            if one[1] not in {other[1] for other in taken} and not full and len(taken) < items.k:
                taken.append(one)
        kept = [one for one in taken if least is None or one[2] >= least]
        neighbors = [
            {"id": one[1], "score": one[2], "image_id": one[0], "brand": one[3]} for one in kept
        ]
        result.append({"query_id": item, "neighbors": neighbors})
    return result


TORN: list[Image] = [
    ("a1", "A", [("b1", "B", 0.875, "x"), ("c1", "C", 0.5, "x"), ("d1", "D", 0.25, None)]),
    ("z1", "Z", []),
    ("a2", "A", [("b2", "B", 1.0, "x"), ("e1", "E", 0.5, "y"), ("c2", "C", 0.5, "x")]),
    ("b1", "B", [("a1", "A", 0.875, "q")]),
]


def test_rows_of_items_merge_those_of_their_images() -> None:
    spec = ExportSpec(BOTH, ("brand",), items=ItemRows(3))
    assert merge_items(item_neighbors(TORN), spec).to_pylist() == [
        {
            "query_id": "A",
            "neighbors": [
                {"id": "B", "score": 1.0, "image_id": "b2", "brand": "x"},
                {"id": "C", "score": 0.5, "image_id": "c1", "brand": "x"},
                {"id": "E", "score": 0.5, "image_id": "e1", "brand": "y"},
            ],
        },
        {
            "query_id": "B",
            "neighbors": [{"id": "A", "score": 0.875, "image_id": "a1", "brand": "q"}],
        },
        {"query_id": "Z", "neighbors": []},
    ]


ITEM_PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["m", "n", "o\u00e9", "p"]), st.sampled_from([0.5, 0.25, 1.0, -0.5]), st.just(0)
    ),
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ABC"), ITEM_PAIRS), max_size=5),
    st.integers(1, 4),
    st.sampled_from([(), (("brand", 1),), (("brand", 2),)]),
    st.sampled_from([None, 0.25]),
)
def test_items_are_merged_as_a_loop_merges_them(
    drawn: list[tuple[str, list[tuple[str, float, int]]]],
    k: int,
    caps: tuple[tuple[str, int], ...],
    least: float | None,
) -> None:
    brand = {"m": "x", "n": "x", "o\u00e9": None, "p": "y"}
    rows: list[Image] = [
        (f"q{i}", item, [(f"{other}{i}{j}", other, score, brand[other])
                         for j, (other, score, _) in enumerate(found)])
        for i, (item, found) in enumerate(drawn)
    ]  # fmt: skip
    items = ItemRows(k, caps)
    spec = ExportSpec(BOTH, ("brand",), least, items)
    table = merge_items(item_neighbors(rows), spec)
    assert table.to_pylist() == merged(rows, items, least)
    assert merge_items(item_neighbors(rows[::-1]), spec).equals(table)


def export_items(tmp_path: Path, parts: list[Part], spec: ExportSpec) -> tuple[Path, dict[str, int]]:
    folder = tmp_path / "export"
    names = tuple(sorted(part.name for part in parts))

    def define(root: beam.Pipeline) -> None:
        exporter = ExportNeighbors(str(tmp_path / "n"), spec, str(folder), "key", names)
        _ = root | beam.Create(parts) | exporter

    return folder, run_pipeline(define, RunnerSpec())


def test_an_item_in_several_parts_has_one_row(tmp_path: Path) -> None:
    spec = ExportSpec(BOTH, ("brand",), items=ItemRows(3))
    parts = [
        write_part(tmp_path / "n", f"part-{number:05d}", item_neighbors(TORN[number : number + 1]), 1)
        for number in range(4)
    ]
    folder, counters = export_items(tmp_path, parts, spec)
    rows = []
    for part in parts:
        table = pq.read_table(folder / f"{part.name}.parquet")
        lines = (folder / f"{part.name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["query_id"] for line in lines] == table["query_id"].to_pylist()
        rows += table.to_pylist()
    assert sorted(rows, key=lambda row: str(row["query_id"])) == merged(TORN, ItemRows(3))
    assert counters["export.queries"] == 3
    assert counters["export.pairs_out"] == 4
    first = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    assert len(first) == 8
    # What is finished is not written again, and written again, in any order, it is the same.
    _, counters = export_items(tmp_path, parts, spec)
    assert "export.queries" not in counters
    for path in [*folder.glob("part-*"), *folder.glob("_work/*")]:
        path.unlink()
    export_items(tmp_path, parts[::-1], spec)
    assert {path.name: path.read_bytes() for path in folder.glob("part-*")} == first


def test_rows_of_items_need_the_item_to_be_carried(tmp_path: Path) -> None:
    part = write_part(tmp_path / "n", "p", neighbors(LISTS))
    spec = ExportSpec(BOTH, ("brand",), items=ItemRows(3))
    with pytest.raises(DatasetError, match="names 'item_id', but the neighbours carry only"):
        list(split_items(part, str(tmp_path / "n"), spec, ("p",)))
