"""The embed step on the pinned local runner, on the hard images of the sample."""

import dataclasses
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that
from PIL import Image

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Part
from index_builder.errors import KithError
from pipelines.runners import RunnerSpec, run_pipeline
from tests.catalog_fixtures import read_dataset, vectors_of
from tests.pipeline.small_catalogue import SAMPLES
from tests.unit.records_for_tests import example, frame
from transforms import embed, failures
from transforms.decoding import DecodePolicy
from transforms.embed import EmbedImages, EmbedSpec, EmbedTask, _marks_folder, _marks_name
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import load_encoder
from transforms.in_flight import InFlightMarks
from transforms.prepare import Preparation
from transforms.preprocessing import Preprocessing
from transforms.sources.files import FilesSource
from transforms.sources.tfrecord import TFRecordSource

# What each hard image is: its format and its size as displayed, or the reason why it fails.
EMBEDDED = {
    "animated.gif": "gif",
    "cmyk.jpg": "jpeg",
    "ct_slice.dcm": "dicom",
    "exif_rotated.jpg": "jpeg",
    "gray16.png": "png",
    "one_pixel.png": "png",
    "palette_alpha.png": "png",
    "photo.tif": "tiff",
    "photo.webp": "webp",
}
FAILED = {
    "not_an_image.jpg": "unsupported_format",
    "truncated.jpg": "truncated",
    "zero_bytes.jpg": "empty",
}


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What one run of the step wrote and said."""

    parts: list[Part]
    rows: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    counters: dict[str, int]


def preparation(size: int = 224, **policy: Any) -> Preparation:
    return Preparation(DecodePolicy(**{"max_pixels": 4_000_000, **policy}), Preprocessing((size, size)))


def spec_of(source: Any, **changes: Any) -> EmbedSpec:
    spec = EmbedSpec(
        sources=(source,),
        metadata=(("category", "string"),),
        preparation=preparation(),
        encoder=EncoderSpec("efficientnet_lite0"),
        batch_size=8,
    )
    return dataclasses.replace(spec, **changes)


def run_step(folder: Path, spec: EmbedSpec) -> Embedded:
    """Runs the step over all shards of the spec's source, one output checked by Beam itself."""
    encoder = spec.encoder_fingerprint()
    shards = spec.sources[0].list_shards(0, str(folder / "listings"))
    tasks = [
        EmbedTask(shard, f"part-{number:05d}", spec.part_key(shard, encoder))
        for number, shard in enumerate(shards)
    ]
    made, failed = str(folder / "embeddings"), str(folder / "failures")

    def one_part_a_task(parts: list[Part]) -> None:
        wanted = [manifests.finished_part(made, task.part, task.key) for task in tasks]
        if sorted(parts, key=lambda part: part.name) != wanted:
            raise AssertionError(f"{parts} came out, the folder says {wanted}")

    def define(root: beam.Pipeline) -> None:
        parts = root | beam.Create(tasks) | EmbedImages(spec, made, failed)
        assert_that(parts, one_part_a_task)

    counters = run_pipeline(define, RunnerSpec())
    names, keys = [task.part for task in tasks], [task.key for task in tasks]
    parts = manifests.collect_parts(made, names, keys)
    failed_parts = manifests.collect_parts(failed, names, keys)
    return Embedded(
        list(parts),
        _read(made, "embeddings", parts),
        _read(failed, failures.KIND, failed_parts),
        counters,
    )


def _read(folder: str, kind: str, parts: tuple[Part, ...]) -> list[dict[str, Any]]:
    table = read_dataset(folder, manifests.Manifest(kind, "", {}, [], parts, {}))
    rows = table.to_pylist()
    if kind == "embeddings":
        for row, vector in zip(rows, vectors_of(table), strict=True):
            row["vector"] = vector
    return rows


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    source = FilesSource(format="files", paths=(str(SAMPLES / "hard" / "*"),), files_per_shard=5)
    return run_step(tmp_path_factory.mktemp("hard"), spec_of(source))


@pytest.mark.parametrize("remote", [False, True])
def test_marks_left_behind_a_finished_part_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    made, failed = f"{folder}/embeddings", f"{folder}/failures"
    source = FilesSource(format="files", paths=(str(SAMPLES / "hard" / "gray16.png"),))
    spec = spec_of(source)
    (shard,) = source.list_shards(0, str(tmp_path / "listings"))
    task = EmbedTask(shard, "part-00000", spec.part_key(shard, spec.encoder_fingerprint()))

    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create([task]) | EmbedImages(spec, made, failed)

    assert run_pipeline(define, RunnerSpec())["embed.images_in"] == 1
    # As if the process had been killed between the two.
    marks = Path(_marks_folder(failed))
    assert marks.is_relative_to(tmp_path / ("temporary" if remote else "failures"))
    assert not marks.exists()
    with InFlightMarks.open(str(marks), _marks_name(task), 2) as left:
        left.suspect(0)
    assert len(list(marks.iterdir())) == 2
    assert "embed.images_in" not in run_pipeline(define, RunnerSpec())
    assert not marks.exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_every_hard_image_is_embedded_or_fails_with_its_reason(hard: Embedded) -> None:
    assert {row["image_id"]: row["format"] for row in hard.rows} == EMBEDDED
    assert {row["image_id"]: row["reason"] for row in hard.failures} == FAILED
    assert {path.name for path in (SAMPLES / "hard").iterdir()} == EMBEDDED.keys() | FAILED.keys()
    for row in hard.failures:
        assert row["stage"] == "decode"
        assert row["source_shard"] == f"hard/{row['image_id']}"
        assert len(row["error"]) > 10


def test_rows_describe_their_images(hard: Embedded) -> None:
    for row in hard.rows:
        data = (SAMPLES / "hard" / row["image_id"]).read_bytes()
        assert row["content_sha256"] == hashlib.sha256(data).digest()
        assert row["source_shard"] == f"hard/{row['image_id']}"
        assert row["item_id"] == row["image_id"]
        assert row["row"] == 0
        assert row["category"] is None
        assert row["vector"].dtype == np.float16
        assert np.linalg.norm(row["vector"].astype(np.float64)) == pytest.approx(1, abs=2e-7)
    by_id = {row["image_id"]: row for row in hard.rows}
    assert (by_id["one_pixel.png"]["width"], by_id["one_pixel.png"]["height"]) == (1, 1)
    with Image.open(SAMPLES / "hard" / "exif_rotated.jpg") as image:
        stored = image.size
        assert image.getexif()[0x0112] in (5, 6, 7, 8)
    rotated = by_id["exif_rotated.jpg"]
    assert (rotated["height"], rotated["width"]) == stored


def test_the_same_photograph_in_two_formats_lands_close(hard: Embedded) -> None:
    by_id = {row["image_id"]: row["vector"].astype(np.float64) for row in hard.rows}
    similarity = {name: by_id["photo.tif"] @ vector for name, vector in by_id.items()}
    assert sorted(similarity, key=similarity.__getitem__)[-1] == "photo.tif"
    assert similarity["exif_rotated.jpg"] < 1


def test_counters_and_parts_agree(hard: Embedded) -> None:
    assert [part.properties["images_read"] for part in hard.parts] == [5, 5, 2]
    for part in hard.parts:
        read, failed = part.properties["images_read"], part.properties["images_failed"]
        assert read == part.rows + sum(failed.values())
        assert part.rows == part.properties["images_embedded"]
        assert part.properties["dim"] == 1280
    counters = dict(hard.counters)
    assert counters.pop("embed.milliseconds") > 0
    assert counters == {
        "embed.images_in": 12,
        "embed.images_out": 9,
        "embed.images_reused": 0,
        "embed.model_calls": 2,
        "embed.unreadable_regions": 0,
        "embed.images_failed_empty": 1,
        "embed.images_failed_truncated": 1,
        "embed.images_failed_unsupported_format": 1,
        "embed.bytes_out": sum(file.bytes for part in hard.parts for file in part.files),
    }


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "png")
    return buffer.getvalue()


def test_damaged_records_cost_their_own_rows(tmp_path: Path) -> None:
    good = [
        frame(example(image_id=f"i{n}", image__encoded=png((20 * n, 0, 0)), category="c"))
        for n in range(6)
    ]
    damaged = bytearray(good[1])
    damaged[20] ^= 1
    records = [
        good[0],
        bytes(damaged),
        frame(example(image__encoded=png((1, 2, 3)))),
        frame(example(image_id="no-image")),
        frame(b"\xffno example"),
        good[2],
        good[3][: len(good[3]) // 2],
    ]
    (tmp_path / "a.tfrecord").write_bytes(b"".join(records))
    source = TFRecordSource(format="tfrecord", paths=(str(tmp_path / "*.tfrecord"),), name="s")
    found = run_step(tmp_path, spec_of(source))
    assert [(row["image_id"], row["row"], row["category"]) for row in found.rows] == [
        ("i0", 0, "c"),
        ("i2", 5, "c"),
    ]
    reasons = {(row["row"], row["reason"]) for row in found.failures}
    assert {row for row, _ in reasons} == {1, 2, 3, 4, None}
    assert (None, "unreadable_region") in reasons
    assert (2, "missing_id") in reasons
    assert (4, "not_an_example") in reasons
    (part,) = found.parts
    # The torn end is a region and no image: the books of images leave it out.
    assert part.properties["images_read"] == 6 == 2 + sum(part.properties["images_failed"].values())
    assert part.properties["unreadable_regions"] == 1
    assert found.counters["embed.images_in"] == 6


def test_a_zero_vector_is_a_failure(tmp_path: Path) -> None:
    import keras

    # ReLU of minus the brightness: zero for every image but a black one, whose bias is one.
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            keras.layers.Conv2D(
                2, 1, activation="relu", kernel_initializer=keras.initializers.Constant(-1.0),
                                bias_initializer=keras.initializers.Constant(1.0)),
        ]
    )  # fmt: skip
    model.save(tmp_path / "model.keras")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "black.png").write_bytes(png((0, 0, 0)))
    (tmp_path / "images" / "white.png").write_bytes(png((255, 255, 255)))
    source = FilesSource(format="files", paths=(str(tmp_path / "images" / "*"),))
    encoder = EncoderSpec(
        "custom", str(tmp_path / "model.keras"), "avg", 0, (4, 4), preprocessing="none"
    )
    found = run_step(tmp_path, spec_of(source, encoder=encoder, preparation=preparation(4)))
    assert [row["image_id"] for row in found.rows] == ["black.png"]
    (failure,) = found.failures
    assert (failure["image_id"], failure["stage"], failure["reason"]) == (
        "white.png",
        "encode",
        "zero_vector",
    )
    assert found.counters["embed.images_failed_zero_vector"] == 1


def test_finished_parts_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FilesSource(format="files", paths=(str(SAMPLES / "hard" / "*.png"),), files_per_shard=2)
    spec = spec_of(source)
    first = run_step(tmp_path, spec)
    loaded = []

    def counted(*arguments: Any) -> Any:
        loaded.append(arguments)
        return load_encoder(*arguments)

    monkeypatch.setattr(embed, "load_encoder", counted)
    assert run_step(tmp_path, spec).parts == first.parts
    assert not loaded
    (tmp_path / "embeddings" / "part-00001.parquet").unlink()
    again = run_step(tmp_path, spec)
    assert again.parts == first.parts
    assert again.counters["embed.images_in"] == first.parts[1].properties["images_read"]
    # One model for the process, however many shards it embeds.
    assert len(loaded) == 1


def test_a_weights_file_that_does_not_fit_stops_the_step(tmp_path: Path) -> None:
    weights = tmp_path / "w.weights.h5"
    weights.write_bytes(b"no weights")
    source = FilesSource(format="files", paths=(str(SAMPLES / "hard" / "*.png"),))
    spec = spec_of(source, encoder=EncoderSpec("resnet50", str(weights)))
    with pytest.raises(KithError, match=r"w\.weights\.h5 does not hold weights of resnet50"):
        run_step(tmp_path, spec)
