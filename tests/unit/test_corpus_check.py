"""A corpus that cannot be indexed is refused in one message, before any work."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder import library
from index_builder.datasets import embeddings, manifests
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import DatasetError, KithError
from index_builder.index.spec import IndexSpec
from index_builder.scoring.metrics import Metric
from index_builder.steps.corpus_check import PartFindings, check_corpus, check_part, judge_corpus
from tests.index_fixtures import Catalogue, gaussian_catalogue, write_embeddings

DIM = 6
Rewrite = Callable[[pa.Table], pa.Table]


def corpus(folder: Path, normalize: bool = False, **rows: list[float]) -> tuple[str, list[Part]]:
    """Three parts of 100 rows; `rows` maps names like `r7` to the number that fills row 7."""
    catalogue = gaussian_catalogue(300, DIM)
    for name, numbers in rows.items():
        catalogue.vectors[int(name[1:])] = numbers
    return str(folder), write_embeddings(folder, catalogue, 3, normalize)


def rewritten(folder: str, part: Part, change: Rewrite) -> Part:
    """Changes a part's file, and its manifest entry with it, as a faulty producer would."""
    path = f"{folder}/{part.name}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    return dataclasses.replace(part, files=(manifests.describe_file(folder, f"{part.name}.parquet"),))


def refused(folder: str, parts: list[Part], metric: Metric = Metric.COSINE) -> str:
    with pytest.raises(DatasetError) as caught:
        check_corpus(folder, parts, DIM, metric)
    return str(caught.value)


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_sound_corpus_yields_its_largest_norm(
    metric: Metric, normalize: bool, tmp_path: Path
) -> None:
    folder, parts = corpus(tmp_path / "e", normalize)
    figures = check_corpus(folder, parts, DIM, metric)
    assert figures.rows == 300
    vectors = gaussian_catalogue(300, DIM).vectors.astype(np.float32)
    largest = 1.0 if normalize else np.linalg.norm(vectors.astype(np.float64), axis=1).max()
    if metric is Metric.COSINE:
        assert figures.largest_norm == 0
    else:
        assert figures.largest_norm == pytest.approx(largest, rel=1e-3 if normalize else 1e-14)
    findings = [check_part(folder, part, DIM, metric) for part in parts]
    assert judge_corpus(folder, parts, findings[::-1]) == figures


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    bad = {"r3": [np.nan] * DIM, "r150": [1, np.inf, 0, 0, 0, 0], "r160": [0, 0, 0, 0, 0, -np.inf]}
    folder, parts = corpus(tmp_path / "e", **bad)
    ids = gaussian_catalogue(300, DIM).image_ids
    for metric in Metric:
        assert refused(folder, parts, metric) == (
            f"{folder} cannot be indexed: 2 of its 3 parts are at fault. Delete their files and make "
            "the dataset again, or give another one:\n"
            f"  part-00000: 1 of its vectors is not finite (image_id {ids[3]})\n"
            f"  part-00001: 2 of its vectors are not finite (image_id {ids[150]}, {ids[160]})"
        )


def test_many_bad_vectors_are_counted_and_the_first_named(tmp_path: Path) -> None:
    folder, parts = corpus(tmp_path / "e", **{f"r{row}": [0.0] * DIM for row in range(94, 104)})
    ids = gaussian_catalogue(300, DIM).image_ids
    message = refused(folder, parts)
    named = ", ".join(ids[94:97])
    assert "part-00000: 6 of its vectors are zero, which has no direction under cosine" in message
    assert f" (image_id {named}, ...)" in message
    assert "part-00001: 4 of its vectors are zero" in message
    # The other metrics know what a zero vector is.
    for metric in (Metric.EUCLIDEAN, Metric.INNER_PRODUCT):
        assert check_corpus(folder, parts, DIM, metric).largest_norm > 1


def test_files_that_are_not_what_the_manifest_lists(tmp_path: Path) -> None:
    folder, parts = corpus(tmp_path / "e")
    paths = [Path(folder) / f"{part.name}.parquet" for part in parts]
    size = paths[1].stat().st_size
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    flipped = bytearray(paths[2].read_bytes())
    flipped[200] ^= 1
    paths[2].write_bytes(flipped)
    message = refused(folder, parts)
    assert message.startswith(f"{folder} cannot be indexed: 3 of its 3 parts are at fault. ")
    assert f"  part-00000: {paths[0]} is missing, but " in message
    cut = f"{paths[1]} has {size - 100} bytes, the manifest says {size}: it was cut off or replaced"
    assert f"  part-00001: {cut}" in message
    assert f"  part-00002: {paths[2]} does not match its checksum" in message


def test_files_that_are_listed_but_are_no_sound_parquet(tmp_path: Path) -> None:
    folder, parts = corpus(tmp_path / "e")
    listed = []
    for part, damage in zip(parts, (slice(0, -50), slice(0, 0), slice(None)), strict=True):
        path = Path(folder) / f"{part.name}.parquet"
        data = path.read_bytes()[damage]
        if part is parts[2]:
            # The pages of a column are gone, the footer is whole.
            data = data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :]
        path.write_bytes(data)
        file = manifests.describe_file(folder, path.name)
        listed.append(dataclasses.replace(part, files=(file,)))
    message = refused(folder, listed)
    for part in parts:
        assert f"  {part.name}: its file cannot be read as Parquet: " in message
    nothing = dataclasses.replace(parts[0], files=())
    assert "part-00000: Part part-00000 has no .parquet file" in refused(folder, [nothing])


def retyped(value: pa.DataType) -> Rewrite:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index("vector")
        kind = pa.list_(value, DIM)
        numbers = table["vector"].combine_chunks().flatten().cast(value)
        return table.set_column(place, "vector", pa.FixedSizeListArray.from_arrays(numbers, type=kind))

    return change


def shorter(table: pa.Table) -> pa.Table:
    place = table.column_names.index("vector")
    numbers = table["vector"].combine_chunks().flatten()
    return table.slice(0, 100).set_column(
        place, "vector", pa.FixedSizeListArray.from_arrays(numbers[: 100 * (DIM - 1)], DIM - 1)
    )


def with_null(table: pa.Table) -> pa.Table:
    rows = table["vector"].to_pylist()
    rows[40][2] = rows[41][0] = None
    place = table.column_names.index("vector")
    return table.set_column(place, "vector", pa.array(rows, pa.list_(pa.float32(), DIM)))


IDS_40 = gaussian_catalogue(300, DIM).image_ids[140:142]


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (retyped(pa.float16()), "its vectors are fixed_size_list<element: halffloat>[6], those of"),
        (retyped(pa.float64()), "its vectors are fixed_size_list<element: double>[6], wanted fixed"),
        (shorter, "its vectors have dim 5, the manifest says 6"),
        (lambda table: table.slice(0, 99), "it has 99 rows, the manifest says 100"),
        (lambda table: table.drop_columns(["vector"]), "it has no column vector, only image_id, "),
        (lambda table: table.drop_columns(["image_id"]), "it has no column image_id, only item_id, "),
        (
            lambda table: table.drop_columns(["brand"]),
            "its columns are not those of part-00000 (the first difference: brand string)",
        ),
        (
            with_null,
            f"2 of its vectors are incomplete, with a null (image_id {IDS_40[0]}, {IDS_40[1]})",
        ),
    ],
)
@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.EUCLIDEAN])
def test_parts_that_do_not_fit_the_others(
    change: Rewrite, clause: str, metric: Metric, tmp_path: Path
) -> None:
    folder, parts = corpus(tmp_path / "e")
    parts[1] = rewritten(folder, parts[1], change)
    message = refused(folder, parts, metric)
    assert "1 of its 3 parts is at fault" in message
    assert f"  part-00001: {clause}" in message


def test_a_part_without_rows_is_no_fault_but_has_columns(tmp_path: Path) -> None:
    folder = str(tmp_path / "e")
    parts = write_embeddings(tmp_path / "e", Catalogue(np.ones((1, DIM)), ["one"]), 2)
    assert [part.rows for part in parts] == [0, 1]
    assert check_corpus(folder, parts, DIM, Metric.EUCLIDEAN).rows == 1
    parts[0] = rewritten(folder, parts[0], lambda table: table.drop_columns(["size"]))
    assert "part-00001: its columns are not those of part-00000" in refused(folder, parts)


def test_lengths_that_no_scale_fits(tmp_path: Path) -> None:
    folder, parts = corpus(tmp_path / "e", r5=[1e20, 0, 0, 0, 0, 0])
    assert refused(folder, parts, Metric.EUCLIDEAN).startswith(
        "The longest vector has a norm of 1e+20,"
    )
    assert check_corpus(folder, parts, DIM, Metric.COSINE).rows == 300


def test_a_long_list_of_parts_is_cut() -> None:
    parts = [Part(f"part-{number:05d}", "key", 1, ()) for number in range(9)]
    findings = [PartFindings(part.name, "", (), 0.0, ("is bad",)) for part in parts]
    with pytest.raises(DatasetError) as caught:
        judge_corpus("e", parts, findings)
    assert str(caught.value).splitlines()[1:] == [
        *(f"  part-{number:05d}: is bad" for number in range(5)),
        "  and 4 more parts",
    ]


def fill(row: int, number: float) -> Rewrite:
    """Fills a row's vector with one number."""

    def change(table: pa.Table) -> pa.Table:
        vectors = np.array(embeddings.list_matrix(table["vector"]))
        vectors[row] = number
        place = table.schema.get_field_index("vector")
        return table.set_column(place, table.schema.field(place), embeddings.list_array(vectors))

    return change


def repeat_an_id(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 1), table.slice(0, len(table) - 1)])


def shorten(table: pa.Table) -> pa.Table:
    vectors = embeddings.list_matrix(table["vector"])[:, : DIM - 1]
    place = table.schema.get_field_index("vector")
    return table.set_column(place, "vector", embeddings.list_array(vectors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fill(7, np.nan), "part-00001: 1 of its vectors is not finite"),
        (fill(7, np.inf), "part-00001: 1 of its vectors is not finite"),
        (fill(7, 0), "part-00001: 1 of its vectors is zero, which has no direction"),
        (shorten, "part-00001: its vectors have dim 5, the manifest says 6"),
        (repeat_an_id, "1 image ids occur more than once"),
        (None, r"part-00001\.parquet is missing"),
    ],
    ids=["nan", "inf", "zero", "dim", "duplicate id", "missing part"],
)
def test_a_build_refuses_a_bad_corpus_and_leaves_nothing(
    change: Rewrite | None, message: str, tmp_path: Path
) -> None:
    folder, parts = corpus(tmp_path / "e")
    if change is not None:
        parts[1] = rewritten(folder, parts[1], change)
    schema = pq.read_schema(f"{folder}/{parts[0].name}.parquet")
    described = embeddings.describe_schema(schema)
    manifests.commit(
        folder, Manifest(embeddings.KIND, "f" * 64, {}, described, tuple(parts), {"dim": DIM})
    )
    if change is None:
        Path(folder, "part-00001.parquet").unlink()
    with pytest.raises(KithError, match=message):
        library.build(folder, str(tmp_path / "index"), IndexSpec(nlist=4))
    assert not (tmp_path / "index").exists()
