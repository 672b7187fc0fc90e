"""A picture is encoded once: under two ids, in another shard, on another night, after a failure."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from index_builder.datasets import manifests
from index_builder.errors import ConfigError, FingerprintError, GateError, KithError
from pipelines.check import check_everything
from pipelines.embed_images import Embedded, embed_images
from pipelines.nightly import run_nightly
from tests.catalog_fixtures import Published, read_dataset, vectors_of
from tests.pipeline.small_catalogue import load, session, write_config
from tests.unit.images_for_tests import encode, picture
from transforms.encoders.keras_runtime import import_keras

IMAGES = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keras = import_keras()
    keras.utils.set_random_seed(7)
    network = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(16, 8, strides=8)])
    path = tmp_path_factory.mktemp("known") / "model.keras"
    network.save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of pictures, of which each tenth is the one before it under another name."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        shown = number - 1 if number % 10 == 9 else number
        (folder / f"image-{number:02d}.png").write_bytes(encode(picture(40, 50, shown), "PNG"))
    return folder


class Catalogue:
    """A folder of images in shards of eight, and the command on it."""

    def __init__(self, folder: Path, images: Path, model: Path) -> None:
        self.folder = folder
        self.images = images
        self.model = model
        self.workspace = folder / "w"

    def load(self, *overrides: str, **sections: Any) -> Any:
        source = {"format": "files", "paths": f"{self.images}/*", "files_per_shard": 8}
        encoder = {
            "name": "custom",
            "weights": str(self.model),
            "preprocessing": "tf",
            "input_size": [32, 32],
            "batch_size": 4,
            "engine": "tensorflow",
        }
        settings = {
            "images": {"sources": [source]},
            "encoder": encoder,
            "evaluate": {},
            "export": {},
            "index": {"shards": 1},
            **sections,
        }
        path = write_config(self.folder / "c.yaml", self.images, self.workspace, **settings)
        return load(path, *overrides)

    def embed(self, *overrides: str, replay: str | None = None) -> Embedded:
        return embed_images(self.load(*overrides), session(), replay)

    def publish(self, *overrides: str) -> Published:
        run_nightly(self.load(*overrides), session())
        return Published(self.workspace)


@pytest.fixture
def catalogue(tmp_path: Path, images: Path, model: Path) -> Catalogue:
    return Catalogue(tmp_path, images, model)


def rows_by_id(made: Embedded) -> dict[str, dict[str, Any]]:
    table = read_dataset(made.embeddings.folder, made.embeddings.manifest)
    rows = table.drop_columns(["vector"]).to_pylist()
    return {
        row["image_id"]: row | {"vector": v} for row, v in zip(rows, vectors_of(table), strict=True)
    }


def encoded(made: Embedded) -> int:
    return made.embeddings.counters.get("embed.images_out", 0)


def test_a_picture_under_two_ids_is_encoded_once(catalogue: Catalogue) -> None:
    made = catalogue.embed()
    books = made.books
    # Images 9, 19 and 29 are 8, 18 and 28; 8 and 9 lie in one shard, and so do the others.
    assert (books.read, books.embedded, books.reused, books.failed) == (IMAGES, IMAGES - 3, 3, 0)
    rows = rows_by_id(made)
    for number in (9, 19, 29):
        one, other = rows[f"image-{number:02d}.png"], rows[f"image-{number - 1:02d}.png"]
        assert one["vector"].tobytes() == other["vector"].tobytes()
        assert one["content_sha256"] == other["content_sha256"]
        assert one["image_id"] != other["image_id"]
    assert list(rows) == sorted(rows)
    assert len({row["vector"].tobytes() for row in rows.values()}) == IMAGES - 3


def test_another_night_encodes_new_bytes_only(catalogue: Catalogue) -> None:
    first = rows_by_id(catalogue.embed())
    catalogue.publish()
    # One picture more at the front moves every other one, so that all shards are other shards.
    (catalogue.images / "a-new.png").write_bytes(encode(picture(40, 50, 77), "PNG"))
    (catalogue.images / "image-03.png").unlink()
    (catalogue.images / "image-05.png").rename(catalogue.images / "renamed.png")
    made = catalogue.embed()
    assert (made.books.read, made.books.embedded, made.books.reused) == (IMAGES, 1, IMAGES - 1)
    assert made.embeddings.counters["embed.model_calls"] == 1
    rows = rows_by_id(made)
    assert rows["renamed.png"]["vector"].tobytes() == first["image-05.png"]["vector"].tobytes()
    for name in first.keys() & rows.keys():
        assert rows[name]["vector"].tobytes() == first[name]["vector"].tobytes()
        for column in ("content_sha256", "width", "height", "format"):
            assert rows[name][column] == first[name][column]
    # The night after, with nothing new, calls the model not once.
    catalogue.publish()
    again = catalogue.embed()
    assert (again.embeddings.state, again.books.embedded) == ("unchanged", 0)
    assert again.books.reused == IMAGES


def test_reused_vectors_are_what_encoding_would_give(catalogue: Catalogue) -> None:
    catalogue.publish()
    (catalogue.images / "a-new.png").write_bytes(encode(picture(40, 50, 77), "PNG"))
    reused = rows_by_id(catalogue.embed())
    shutil.rmtree(catalogue.workspace)
    fresh = rows_by_id(catalogue.embed())
    assert reused.keys() == fresh.keys()
    for name, row in reused.items():
        one, other = row["vector"].astype(np.float64), fresh[name]["vector"].astype(np.float64)
        assert one @ other >= 0.99999, name


@pytest.mark.parametrize("override", ["encoder.resize=pad", "encoder.pooling=max"])
def test_another_encoder_reuses_nothing(catalogue: Catalogue, override: str) -> None:
    catalogue.publish()
    assert catalogue.embed(override).books.reused == 3


def test_a_stricter_policy_is_not_passed_by(catalogue: Catalogue) -> None:
    catalogue.publish()
    # 40 x 50 pixels are known, and refused all the same.
    with pytest.raises(KithError, match=r"Every one of the 30 images failed \(too_large 30\)"):
        catalogue.embed("images.max_pixels=1999")


def test_truncated_images_do_not_come_back_through_reuse(catalogue: Catalogue) -> None:
    whole = encode(picture(64, 64, 5), "JPEG")
    (catalogue.images / "image-00.png").write_bytes(whole[: len(whole) * 4 // 5])
    lenient = catalogue.publish("images.truncated=accept")
    assert lenient.run["images"]["failed"] == 0
    made = catalogue.embed()
    assert made.books.failed_by_reason == {"truncated": 1}
    assert made.books.reused == 3


def break_images(catalogue: Catalogue) -> None:
    """Truncates one picture of the first shard and one of the third."""
    for number in (2, 17):
        data = encode(picture(64, 64, number), "JPEG")
        (catalogue.images / f"image-{number:02d}.png").write_bytes(data[: len(data) * 4 // 5])


def test_replay_tries_only_what_failed(catalogue: Catalogue) -> None:
    break_images(catalogue)
    before = catalogue.embed()
    assert before.books.failed_by_reason == {"truncated": 2}
    made = catalogue.embed("images.truncated=accept", replay=before.embeddings.folder)
    books = made.books
    assert (books.read, books.embedded, books.reused, books.failed) == (IMAGES, 2, IMAGES - 2, 0)
    assert (encoded(made), made.embeddings.counters["embed.model_calls"]) == (2, 2)
    assert made.embeddings.folder != before.embeddings.folder
    old, new = rows_by_id(before), rows_by_id(made)
    assert list(new) == sorted([*old, "image-02.png", "image-17.png"])
    for name, row in old.items():
        assert new[name]["vector"].tobytes() == row["vector"].tobytes()
    # What was there is still there, whole.
    assert manifests.load(before.embeddings.folder, "embeddings") == before.embeddings.manifest
    # The next night with the new policy finds it.
    published = catalogue.publish("images.truncated=accept")
    assert published.folder("embeddings") == Path(made.embeddings.folder)
    assert published.run["stages"]["embed"]["state"] == "unchanged"
    assert check_everything(catalogue.load(), data=True)["verified_files"] > 5


def test_replay_with_the_same_policy_makes_a_new_version(catalogue: Catalogue) -> None:
    break_images(catalogue)
    before = catalogue.embed()
    made = catalogue.embed(replay=before.embeddings.folder)
    assert made.books.failed_by_reason == {"truncated": 2}
    assert made.books.reused == IMAGES - 2
    assert made.embeddings.folder == before.embeddings.folder + "-2"
    assert made.embeddings.manifest.content == before.embeddings.manifest.content
    assert catalogue.embed().embeddings.folder == made.embeddings.folder


def test_replay_refuses_what_it_cannot_merge(catalogue: Catalogue, tmp_path: Path) -> None:
    break_images(catalogue)
    folder = catalogue.embed("images.max_pixels=5000").embeddings.folder
    with pytest.raises(ConfigError, match="which refuses more: images of the dataset would"):
        catalogue.embed("images.max_pixels=4999", replay=folder)
    with pytest.raises(FingerprintError, match="resize: the dataset has 'crop', the configuration"):
        catalogue.embed("encoder.resize=pad", replay=folder)
    with pytest.raises(ConfigError, match="wanted an embeddings dataset of the workspace"):
        catalogue.embed(replay=str(tmp_path / "elsewhere" / "embeddings" / "x"))
    (catalogue.images / "a-new.png").write_bytes(encode(picture(40, 50, 77), "PNG"))
    with pytest.raises(KithError, match="the catalogue has changed since it was made"):
        catalogue.embed(replay=folder)


def test_a_changed_previous_dataset_is_found_out(catalogue: Catalogue) -> None:
    published = catalogue.publish()
    (catalogue.images / "a-new.png").write_bytes(encode(picture(40, 50, 77), "PNG"))
    manifest = published.manifest("embeddings")
    path = published.folder("embeddings") / manifest.parts[1].file(".parquet").path
    table = pq.read_table(path)
    place = table.schema.get_field_index("content_sha256")
    field = table.schema.field(place)
    digests = [hashlib.sha256(bytes(digest)).digest() for digest in table[field.name].to_pylist()]
    path.unlink()
    pq.write_table(table.set_column(place, field, pa.array(digests, field.type)), path)
    # Its content is indexed as it is now, so nothing wrong is taken over: the pictures are encoded.
    made = catalogue.embed()
    assert made.books.embedded >= len(digests) - 1


def test_too_many_failures_stop_the_night(catalogue: Catalogue) -> None:
    published = catalogue.publish()
    pointer = published.pointer
    break_images(catalogue)
    with pytest.raises(GateError, match=r"2 of 30 images failed \(6.67%: truncated 2\), wanted"):
        catalogue.publish("embeddings.max_failed_fraction=0.05")
    with pytest.raises(GateError, match=r"2 input shards failed: images#00000 1 of 8, images#00002"):
        catalogue.publish("embeddings.max_failed_fraction_per_shard=0.1")
    assert Published(catalogue.workspace).pointer == pointer
    catalogue.publish(
        "embeddings.max_failed_fraction=0.07", "embeddings.max_failed_fraction_per_shard=0.125"
    )
    assert Published(catalogue.workspace).run["images"]["failed"] == 2
