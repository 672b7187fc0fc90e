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
from hypothesis import given
from hypothesis import strategies as st

from index_builder import manifests
from index_builder.errors import DatasetError
from index_builder.manifests import Part
from index_builder.neighbors import FILLED, NeighborsSchema
from pipelines.runners import RunnerSpec, make_pipeline, run_pipeline
from transforms.exports import ExportNeighbors, ExportSpec, export_schema, select_neighbors

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
