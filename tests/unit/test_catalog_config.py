"""The section `catalog.metadata`: what it says, and what is refused before any work."""

from pathlib import Path

import pytest

from index_builder.datasets.table_files import TableSpec
from index_builder.errors import ConfigError
from pipelines.config import Config
from pipelines.config_loading import load_config
from pipelines.preflight import check_inputs

IMAGES = "images: {sources: [{format: files, paths: a.png}], metadata: {brand: string}}\n"
TABLE = "catalog: {metadata: {paths: stock.csv, columns: {stock: int64, price: float64}}}\n"


def load(tmp_path: Path, text: str) -> Config:
    (tmp_path / "kith.yaml").write_text("workspace: w\n" + text)
    return load_config(str(tmp_path / "kith.yaml"))


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_no_table_unless_it_is_named(tmp_path: Path) -> None:
    assert load(tmp_path, "").table_spec() is None
    assert load(tmp_path, "catalog: {metadata: {}}").table_spec() is None


def test_a_table_reaches_the_index(tmp_path: Path) -> None:
    columns = (("stock", "int64"), ("price", "float64"))
    path = str(tmp_path / "stock.csv")
    assert load(tmp_path, TABLE).table_spec() == TableSpec((path,), "item_id", "item_id", columns)
    text = (
        "catalog: {metadata: {paths: [gs://b/*.parquet, t/x.csv], key: image_id, id_column: sku, "
        "columns: {new: bool}}}"
    )
    paths = ("gs://b/*.parquet", str(tmp_path / "t/x.csv"))
    assert load(tmp_path, text).table_spec() == TableSpec(paths, "image_id", "sku", (("new", "bool"),))


@pytest.mark.parametrize(
    "text",
    [
        "join: {rules: {same: [stock], different: [brand]}}",
        "export: {columns: [price, brand, stock]}",
        "evaluate: {truth: stock, group_by: price}",
    ],
)
def test_its_columns_are_known_to_later_stages(tmp_path: Path, text: str) -> None:
    load(tmp_path, IMAGES + TABLE + text)
    wrong = text.replace("stock", "stocks").replace("price", "prices")
    assert refusal(tmp_path, IMAGES + TABLE + wrong).endswith(
        "wanted one of the columns brand, image_id, item_id, price, row, source_shard, stock. Add it "
        "to images.metadata or catalog.metadata.columns, or correct the name."
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "key: image_id",
            "catalog.metadata.paths: missing, but other keys of the table are set. Name its files, or "
            "remove the section.",
        ),
        (
            "paths: stock.csv",
            "catalog.metadata.columns: missing. Say what to take from the table, as in "
            "columns: {stock: int64}, or remove the section.",
        ),
        (
            "paths: stock.csv, columns: {stock: int64, row: int64}",
            "catalog.metadata.columns.row: 'row' is a column that Kith writes itself, wanted a name of "
            "your own. Rename it in the table.",
        ),
        (
            "paths: stock.csv, columns: {stock: int64, brand: string}",
            "catalog.metadata.columns.brand: the images have a column 'brand' already, wanted each "
            "column from one place. Remove it here or from images.metadata.",
        ),
        (
            "paths: stock.csv, columns: {stock: int}",
            "catalog.metadata.columns.stock: got 'int', wanted",
        ),
        ("paths: stock.csv, key: sku", "catalog.metadata.key: got 'sku', wanted: "),
        (
            "paths: stock.csv, colums: {}",
            "catalog.metadata.colums: unknown key. Did you mean 'columns'?",
        ),
    ],
)
def test_a_section_that_cannot_work_is_refused(tmp_path: Path, section: str, message: str) -> None:
    assert message in refusal(tmp_path, f"{IMAGES}catalog: {{metadata: {{{section}}}}}")


def test_the_table_is_looked_at_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    config = load(tmp_path, IMAGES + TABLE)
    with pytest.raises(ConfigError, match=r"catalog\.metadata\.paths: no file matches .*stock\.csv"):
        check_inputs(config)
    (tmp_path / "stock.csv").write_text("item_id,stock\n")
    with pytest.raises(ConfigError, match=r"catalog\.metadata\.columns\.price: .*stock\.csv has 0"):
        check_inputs(config)
    assert not (tmp_path / "w").exists()
    (tmp_path / "stock.csv").write_text("item_id,stock,price\n")
    check_inputs(config)
