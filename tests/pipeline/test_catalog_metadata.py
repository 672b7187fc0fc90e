"""Whole nights with a metadata table: another stock makes another index, and embeds nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from index_builder.errors import ConfigError, DatasetError
from pipelines.build_index import build_index
from pipelines.locate import find_index
from pipelines.nightly import run_nightly
from tests.catalog_fixtures import Published
from tests.pipeline.small_catalogue import (
    METADATA,
    dataset_bytes,
    load,
    session,
    write_catalogue,
    write_config,
)
from transforms.encoders.keras_runtime import import_keras

Row = tuple[int | None, float | None, str | None]


@dataclasses.dataclass(frozen=True)
class Shop:
    """A catalogue of 12 images of 4 items (and files of no item), one night old, and its table."""

    folder: Path
    config: Path
    items: list[str]

    @property
    def published(self) -> Published:
        return Published(self.folder / "w")

    def write_table(self, rows: dict[str, Row]) -> None:
        """Writes the stock, by item; None is an empty value."""
        lines = [f"{sku},{stock},{price},{brand}" for sku, (stock, price, brand) in rows.items()]
        text = "\n".join(["sku,stock,price,brand", *lines]) + "\n"
        (self.folder / "stock.csv").write_text(text.replace("None", ""))

    def run(self) -> dict[str, Any]:
        return run_nightly(load(self.config), session()).run

    def found(self) -> dict[str, list[dict[str, Any]]]:
        """The recommendations as they are loaded, by query."""
        rows = [json.loads(line) for line in self.published.jsonl().splitlines()]
        return {row["query_id"]: row["neighbors"] for row in rows}

    def item_of(self) -> dict[str, str]:
        """Items by image, from the embeddings."""
        table = self.published.table("embeddings")
        return dict(zip(table["image_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))

    def assert_recommends(self, rows: dict[str, Row]) -> None:
        """Every image has one image of each other item of its brand, with the values of the table."""
        items = self.item_of()
        brands = {image: rows.get(item, (None, None, None))[2] for image, item in items.items()}
        found = self.found()
        assert found.keys() == items.keys()
        for query, neighbors in found.items():
            wanted = {
                item
                for image, item in items.items()
                if brands[query] is not None and brands[image] == brands[query] and item != items[query]
            }
            assert sorted(items[neighbor["id"]] for neighbor in neighbors) == sorted(wanted)
            for neighbor in neighbors:
                row = (neighbor["stock"], neighbor["price"], neighbor["brand"])
                assert row == rows[items[neighbor["id"]]]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    keras = import_keras()
    data = write_catalogue(tmp_path / "data", shards=2, images=12)
    for name in ("ct_slice.dcm", "photo.tif", "photo.webp"):
        (data / "hard" / name).unlink()
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(40, 8, strides=4)])
    model.save(tmp_path / "model.keras")
    config = write_config(
        tmp_path / "c.yaml",
        data,
        tmp_path / "w",
        images={
            "sources": [
                {
                    "format": "tfrecord",
                    "paths": f"{data}/catalog/*.tfrecord",
                    "features": {"item_id": "object_id"},
                },
                {"format": "files", "paths": f"{data}/hard/*"},
            ],
            "metadata": METADATA,
        },
        catalog={
            "metadata": {
                "paths": "stock*.csv",
                "id_column": "sku",
                "columns": {"stock": "int64", "price": "float64", "brand": "string"},
            }
        },
        encoder={
            "name": "custom",
            "weights": str(tmp_path / "model.keras"),
            "preprocessing": "tf",
            "input_size": [32, 32],
        },
        index={"shards": 2, "nlist": 3, "nprobe": 3},
        join={"k": 12, "rules": {"same": ["brand"]}},
        evaluate={"group_by": "brand", "sample": 20},
        export={"columns": ["stock", "price", "brand"]},
    )
    return Shop(tmp_path, config, _object_ids(data))


def _object_ids(data: Path) -> list[str]:
    import tensorflow as tf

    files = sorted(str(file) for file in (data / "catalog").glob("*.tfrecord"))
    records = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(files)]
    ids = {record.features.feature["object_id"].bytes_list.value[0] for record in records}
    return sorted(name.decode() for name in ids)


def test_a_change_of_stock_embeds_nothing(shop: Shop) -> None:
    a, b, c, d = shop.items
    first: dict[str, Row] = {
        a: (5, 1.5, "ACME"),
        b: (0, 2.0, "ACME"),
        c: (1, 9.0, "B"),
        d: (2, 9.5, "B"),
    }
    shop.write_table({**first, "unknown": (1, 1.0, "ACME")})
    run = shop.run()
    shop.assert_recommends(first)
    images = run["images"]["embedded"]
    figures = {"matched": 12, "unmatched": images - 12, "table_rows": 5, "ignored": 1}
    assert images > 12
    assert run["index"]["metadata"] == figures
    index = shop.published.manifest("index")
    assert index.properties["metadata"] == figures
    names = [field["name"] for field in index.schema]
    # Columns are in the order of the configuration, which this test writes sorted.
    added = [*sorted(METADATA), "brand", "price", "stock", "probes", "squared_norm"]
    assert names == ["image_id", "item_id", "source_shard", "row", *added]
    counters = run["stages"]["build"]["counters"]
    assert counters["build.metadata_matched"] == 12
    assert counters["build.metadata_unmatched"] == images - 12
    before = dataset_bytes(shop.folder / "w")

    # Night 2: b is back in stock and B's now, d is sold out of the table.
    second: dict[str, Row] = {a: (4, None, "B"), b: (7, 2.5, "B"), c: (1, 9.0, "B")}
    shop.write_table(second)
    run = shop.run()
    states = {name: stage["state"] for name, stage in run["stages"].items()}
    assert states == {
        "embed": "unchanged", "build": "made", "join": "made", "evaluate": "made", "export": "made",
    }  # fmt: skip
    assert (run["images"]["embedded"], run["images"]["reused"]) == (0, images)
    shop.assert_recommends(second)
    folder = str(shop.published.folder("index"))
    rows = [row for file in Path(folder).glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    of_d = [row for row in rows if row["item_id"] == d]
    assert [(row["stock"], row["price"], row["brand"]) for row in of_d] == [(None, None, None)] * 3
    assert run["index"]["metadata"] == {
        "matched": 9, "unmatched": images - 9, "table_rows": 3, "ignored": 0,
    }  # fmt: skip
    after = dataset_bytes(shop.folder / "w")
    assert {name: after[name] for name in before} == before

    # Night 3: nothing changed; the table under another name is the same table.
    (shop.folder / "stock.csv").rename(shop.folder / "stock-2.csv")
    run = shop.run()
    assert {stage["state"] for stage in run["stages"].values()} == {"unchanged"}
    assert find_index(load(shop.config)) == folder
    # Night 4: what nobody sees is indexed again, and goes no further.
    with (shop.folder / "stock-2.csv").open("a") as file:
        file.write("unknown,1,1,B\n")
    states = {name: stage["state"] for name, stage in shop.run()["stages"].items()}
    assert states == {
        "embed": "unchanged", "build": "made", "join": "unchanged", "evaluate": "unchanged",
        "export": "unchanged",
    }  # fmt: skip


def test_a_wrong_table_stops_the_night_and_is_named(shop: Shop) -> None:
    a, b, *_ = shop.items
    with pytest.raises(ConfigError, match=r"catalog\.metadata\.paths: no file matches"):
        shop.run()
    assert not (shop.folder / "w").exists()
    shop.write_table({a: (1, 1.0, "A"), b: (2, 2.0, "A")})
    file = shop.folder / "stock.csv"
    good = file.read_text()
    file.write_text(f"{good}{a},2,2,A\n")
    with pytest.raises(DatasetError) as caught:
        shop.run()
    assert str(caught.value) == (
        f"The sku {a!r} is in the table of catalog.metadata more than once: {file} row 0 and {file} "
        "row 2 (counted from 0), wanted each id once. Remove one of the rows."
    )
    file.write_text(good.replace("2.0", "two"))
    with pytest.raises(DatasetError, match=f"row 1 .*: sku {b!r} has price 'two', wanted float64"):
        shop.run()
    file.write_text(good)
    run = shop.run()
    assert run["stages"]["embed"]["state"] == "unchanged"
    # Datasets made elsewhere have columns of which the configuration does not know.
    config = load(shop.config, "images={}", "evaluate={}", "export={}", "join={}",
                  "catalog.metadata.columns={name: string}")  # fmt: skip
    file.write_text("sku,name\n")
    with pytest.raises(ConfigError, match=r"columns\.name: the images have a column 'name' already"):
        build_index(config, session(), str(shop.published.folder("embeddings")))
