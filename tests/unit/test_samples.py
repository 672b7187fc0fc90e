"""The committed sample images: hashes, counts, columns, licences and pixels."""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError
from pydantic import TypeAdapter

from transforms.sources.base import ImageRecord, ImageSource
from transforms.sources.registry import AnySource

SAMPLES = Path(__file__).parents[2] / "samples"
COLUMNS = {
    "image_id",
    "object_id",
    "name",
    "category",
    "subcategory",
    "drawing",
    "source_package",
    "source_path",
    "licence",
    "copyright",
    "modifications",
    "sha256",
}
LICENCE_OF_DRAWING = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent3d": "MIT"}
FORMAT_SLICE = ("1f415", "1f353", "26bd", "1f3b8")
OBJECTS_OF_CATEGORY = {
    "Objects": 193,
    "Animals & Nature": 156,
    "Food & Drink": 127,
    "Travel & Places": 101,
    "Activities": 53,
}
# The slices in other formats: the folder, which is the name of the format, and the file.
FORMATS = {
    "webdataset": "webdataset/images-000000.tar",
    "parquet": "parquet/images.parquet",
    "table": "table/images.csv",
}
HARD = {
    "truncated.jpg",
    "not_an_image.jpg",
    "zero_bytes.jpg",
    "cmyk.jpg",
    "exif_rotated.jpg",
    "gray16.png",
    "palette_alpha.png",
    "animated.gif",
    "photo.webp",
    "photo.tif",
    "ct_slice.dcm",
    "one_pixel.png",
}


def read_shard(path: Path) -> list[dict[str, bytes]]:
    """The records of one shard, one value a feature."""
    import tensorflow as tf

    records = []
    for serialized in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        features = tf.train.Example.FromString(serialized).features.feature
        assert all(len(feature.bytes_list.value) == 1 for feature in features.values())
        records.append({name: value.bytes_list.value[0] for name, value in features.items()})
    return records


@pytest.fixture(scope="module")
def shards() -> list[list[dict[str, bytes]]]:
    """Every shard of the catalogue, in order."""
    paths = sorted((SAMPLES / "catalog").iterdir())
    assert [path.name for path in paths] == [
        f"images-{shard:05d}-of-00006.tfrecord" for shard in range(6)
    ]
    return [read_shard(path) for path in paths]


@pytest.fixture(scope="module")
def records(shards: list[list[dict[str, bytes]]]) -> list[dict[str, bytes]]:
    """Every record of the catalogue."""
    return [record for shard in shards for record in shard]


@pytest.fixture(scope="module")
def build_catalog() -> ModuleType:
    """The build script, loaded by path: `samples` is no package."""
    spec = importlib.util.spec_from_file_location("build_catalog", SAMPLES / "build_catalog.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass with postponed annotations looks its module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "build_catalog", module)
        spec.loader.exec_module(module)
    return module


def test_checksums_cover_every_file_and_hold() -> None:
    lines = (SAMPLES / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = {path: digest for digest, path in (line.split("  ") for line in lines)}
    present = {
        path.relative_to(SAMPLES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("catalog", "files", "hard", *FORMATS)
        for path in (SAMPLES / folder).rglob("*")
        if path.is_file()
    }
    assert listed == present
    assert len(listed) == 6 + 30 + 12 + 3
    assert sum((SAMPLES / path).stat().st_size for path in FORMATS.values()) < 150_000


def test_shards_are_even_and_mixed(shards: list[list[dict[str, bytes]]]) -> None:
    assert [len(shard) for shard in shards] == [315] * 6
    for shard in shards:
        assert {record["category"].decode() for record in shard} == set(OBJECTS_OF_CATEGORY)
        drawings = collections.Counter(record["drawing"] for record in shard)
        assert min(drawings.values()) > 315 / 3 * 0.75


def test_every_record_has_every_column(records: list[dict[str, bytes]]) -> None:
    assert len(records) == 1890
    for record in records:
        assert set(record) == COLUMNS | {"image/encoded"}
        assert all(record[column].decode("utf-8").strip() for column in COLUMNS)


def test_image_ids_are_unique_and_name_drawing_and_object(
    records: list[dict[str, bytes]],
) -> None:
    assert len({record["image_id"] for record in records}) == 1890
    for record in records:
        assert record["image_id"] == record["drawing"] + b"-" + record["object_id"]


def test_each_object_has_three_different_drawings(records: list[dict[str, bytes]]) -> None:
    by_object = collections.defaultdict(list)
    for record in records:
        by_object[record["object_id"]].append(record)
    assert len(by_object) == 630
    for drawings in by_object.values():
        assert sorted(r["drawing"].decode() for r in drawings) == sorted(LICENCE_OF_DRAWING)
        for column in ("name", "category", "subcategory"):
            assert len({r[column] for r in drawings}) == 1
    assert len({record["sha256"] for record in records}) == 1890


def test_objects_of_each_category(records: list[dict[str, bytes]]) -> None:
    categories = {record["object_id"]: record["category"].decode() for record in records}
    assert collections.Counter(categories.values()) == OBJECTS_OF_CATEGORY


def test_licence_and_credit_follow_the_maker(records: list[dict[str, bytes]]) -> None:
    notice = (SAMPLES.parent / "NOTICE").read_text(encoding="utf-8")
    for record in records:
        assert record["licence"].decode() == LICENCE_OF_DRAWING[record["drawing"].decode()]
    for credit in {record["copyright"].decode() for record in records}:
        assert credit.removesuffix(".") in notice
    for package in {record["source_package"].decode() for record in records}:
        assert package.split(" ", 1)[1] in notice


def test_licence_texts_are_shipped() -> None:
    texts = {path.name: path.read_text("utf-8") for path in (SAMPLES / "LICENSES").iterdir()}
    assert "Apache License, Version 2.0" in texts["Apache-2.0.txt"]
    assert "Section 8 – Interpretation." in texts["CC-BY-4.0.txt"]
    assert "Copyright (c) Microsoft Corporation." in texts["MIT-fluent-emoji.txt"]
    assert "Cal Henderson" in texts["MIT-emoji-datasource.txt"]
    assert "pydicom contributors" in texts["pydicom.txt"]
    assert "CC0 1.0 Universal" in texts["CC0-1.0.txt"]


def test_sha256_is_that_of_the_jpeg(records: list[dict[str, bytes]]) -> None:
    for record in records:
        digest = hashlib.sha256(record["image/encoded"]).hexdigest()
        assert record["sha256"].decode() == digest, record["image_id"]


def test_pictures_are_whole_on_white(records: list[dict[str, bytes]]) -> None:
    for record in records:
        image = Image.open(io.BytesIO(record["image/encoded"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (160, 160))
        pixels = np.asarray(image)
        # White at the rim but for JPEG ringing: nothing is cropped, no transparency became black.
        border = np.concatenate(
            [pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(), pixels[:, -4:].ravel()]
        )
        assert border.min() > 200, record["image_id"]
        assert border.mean() > 252, record["image_id"]
        assert (pixels < 230).any(axis=2).mean() > 0.05, record["image_id"]


def test_plain_files_are_records_of_the_catalogue(records: list[dict[str, bytes]]) -> None:
    by_id = {record["image_id"].decode(): record for record in records}
    paths = sorted((SAMPLES / "files").rglob("*.jpg"))
    for path in paths:
        record = by_id[path.stem]
        assert path.read_bytes() == record["image/encoded"]
        slug = record["category"].decode().lower().replace("&", "and").replace(" ", "-")
        assert path.parent.name == slug
    categories = collections.Counter(path.parent.name for path in paths)
    assert set(categories.values()) == {6}
    assert len(categories) == 5
    objects = collections.Counter(path.stem.split("-", 1)[1] for path in paths)
    assert set(objects.values()) == {3}
    assert len(objects) == 10


@pytest.mark.parametrize("name", FORMATS)
def test_slices_in_other_formats_are_records_of_the_catalogue(
    records: list[dict[str, bytes]], name: str, tmp_path: Path
) -> None:
    by_id = {record["image_id"].decode(): record for record in records}
    names = ("object_id", "name", "category", "drawing", "licence", "copyright", "sha256")
    source: ImageSource = TypeAdapter(AnySource).validate_python(
        {"format": name, "paths": str(SAMPLES / FORMATS[name])}
    )
    found = [
        item
        for shard in source.list_shards(0, str(tmp_path))
        for item in source.read(shard, dict.fromkeys(names, "string"))
    ]
    assert len(found) == 12
    for item in found:
        assert isinstance(item, ImageRecord)
        assert item.error is None
        assert item.image_id is not None
        record = by_id[item.image_id]
        assert item.data == record["image/encoded"]
        assert item.metadata == {column: record[column].decode() for column in names}
    assert {item.image_id for item in found if isinstance(item, ImageRecord)} == {
        f"{drawing}-{code}" for drawing in LICENCE_OF_DRAWING for code in FORMAT_SLICE
    }


def test_slices_in_other_formats_are_written_again_with_the_same_bytes(
    build_catalog: ModuleType, tmp_path: Path
) -> None:
    build_catalog.write_formats(build_catalog.read_catalog(SAMPLES / "catalog"), tmp_path)
    # Parquet names the version that wrote it; the other two are the same everywhere.
    for name in ("webdataset", "table"):
        assert (tmp_path / FORMATS[name]).read_bytes() == (SAMPLES / FORMATS[name]).read_bytes()
    tables = [pq.read_table(folder / FORMATS["parquet"]) for folder in (tmp_path, SAMPLES)]
    assert tables[0].equals(tables[1])
    assert pq.read_metadata(SAMPLES / FORMATS["parquet"]).num_row_groups == 2


def test_hard_images_are_what_their_names_say() -> None:
    folder = SAMPLES / "hard"
    assert {path.name for path in folder.iterdir()} == HARD
    assert (folder / "zero_bytes.jpg").stat().st_size == 0
    with pytest.raises(UnidentifiedImageError):
        Image.open(folder / "not_an_image.jpg")
    with Image.open(folder / "truncated.jpg") as image, pytest.raises(OSError, match="truncated"):
        image.load()
    for name, kind, mode in [
        ("cmyk.jpg", "JPEG", "CMYK"),
        ("exif_rotated.jpg", "JPEG", "RGB"),
        ("gray16.png", "PNG", "I;16"),
        ("palette_alpha.png", "PNG", "P"),
        ("animated.gif", "GIF", "P"),
        ("photo.webp", "WEBP", "RGB"),
        ("photo.tif", "TIFF", "RGB"),
        ("one_pixel.png", "PNG", "RGB"),
    ]:
        with Image.open(folder / name) as image:
            image.load()
            assert (image.format, image.mode) == (kind, mode), name
            assert max(image.size) <= 256
    with Image.open(folder / "cmyk.jpg") as image:
        assert "adobe" in image.info
    with Image.open(folder / "exif_rotated.jpg") as image:
        assert image.getexif()[0x0112] == 6
        assert image.height > image.width
    with Image.open(folder / "gray16.png") as image:
        assert len(np.unique(np.asarray(image))) > 256
    with Image.open(folder / "palette_alpha.png") as image:
        lowest, highest = image.convert("RGBA").getchannel("A").getextrema()
        assert (lowest, highest) == (0, 255)
    with Image.open(folder / "animated.gif") as image:
        assert getattr(image, "n_frames", 1) == 3
    with Image.open(folder / "photo.tif") as image:
        assert image.getexif()[258] == (16, 16, 16)
    with Image.open(folder / "one_pixel.png") as image:
        assert image.size == (1, 1)
    dicom = (folder / "ct_slice.dcm").read_bytes()
    assert dicom[128:132] == b"DICM"
    assert dicom[:4] == b"II*\0"


def png(pixels: np.ndarray) -> bytes:
    """Encodes RGBA pixels, uint8 [height, width, 4]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_drawing_is_trimmed_centred_and_composited(build_catalog: ModuleType) -> None:
    pixels = np.zeros((100, 60, 4), np.uint8)
    pixels[70:90, 40:50] = (255, 0, 0, 255)  # 20 x 10, in a corner
    pixels[0, 0] = (0, 0, 0, 8)  # all but invisible: trimmed away
    jpeg = build_catalog.draw_on_white(png(pixels))
    image = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
    rows, columns = np.nonzero(image[:, :, 1] < 128)
    assert (rows.min(), rows.max()) == (6, 152)
    assert abs((columns.min() + columns.max()) / 2 - 79.5) <= 1
    assert abs(columns.max() - columns.min() + 1 - 74) <= 1
    assert image[80, 80] == pytest.approx([254, 0, 0], abs=4)
    assert image[0, 0] == pytest.approx([255, 255, 255], abs=1)


def test_an_empty_picture_is_refused(build_catalog: ModuleType) -> None:
    pixels = np.full((9, 9, 4), 255, np.uint8)
    pixels[:, :, 3] = 8
    with pytest.raises(build_catalog.BuildError, match="no visible pixel"):
        build_catalog.draw_on_white(png(pixels))


def test_another_version_of_a_package_is_refused(build_catalog: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "drawings", "version": "2.0.0"}')
    with pytest.raises(build_catalog.BuildError, match=r"holds drawings 2.0.0, wanted drawings 1.0"):
        build_catalog.require_npm(tmp_path, "drawings", "1.0")
