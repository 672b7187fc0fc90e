"""The whole sample: a new user's run, and engines, precisions and scaled decoding against Keras.

The run is OpenVINO's pass over the sample in float32, too.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from index_builder.index.goals import TransformSpec
from index_builder.index.transform import learn_transform
from index_builder.scoring.vectors import unit_float16
from pipelines.nightly import run_nightly
from tests.catalog_fixtures import Published, vectors_of
from tests.pipeline.small_catalogue import SAMPLES, load, session
from transforms.decoding import DecodePolicy, decode_image
from transforms.encoders.efficientnet_lite0 import IMAGENET_WEIGHTS, build_model, preprocess_input
from transforms.encoders.engines.choice import EngineChoice, cpu_has_bfloat16
from transforms.encoders.family import EncoderSpec
from transforms.encoders.keras_runtime import import_keras
from transforms.encoders.registry import load_encoder
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord
from transforms.sources.tfrecord import TFRecordSource

ROOT = Path(__file__).parents[2]
BATCH = 63
ENLARGED = 400
PREPROCESSING = Preprocessing((224, 224))


class Sample(NamedTuple):
    """The committed catalogue: ids, encoded images, and the object that each one shows."""

    ids: list[str | None]
    images: list[bytes]
    objects: np.ndarray


@pytest.fixture(scope="module")
def sample() -> Sample:
    paths = (str(SAMPLES / "catalog" / "*.tfrecord"),)
    source = TFRecordSource(format="tfrecord", paths=paths)
    shards = source.list_shards(0, "")
    records = [r for shard in shards for r in source.read(shard, {"object_id": "string"})]
    images = [record for record in records if isinstance(record, ImageRecord)]
    return Sample(
        [image.image_id for image in images],
        [image.data for image in images],
        np.array([image.metadata["object_id"] for image in images]),
    )


def on_threads(work: Callable[[bytes], np.ndarray], images: list[bytes]) -> np.ndarray:
    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(work, images)))


def prepared(images: list[bytes], scaled: bool) -> np.ndarray:
    policy = DecodePolicy(scaled=scaled)

    def one(data: bytes) -> np.ndarray:
        image = decode_image(data, policy, PREPROCESSING.needed_size)
        return PREPROCESSING.apply(image.pixels, (image.width, image.height))

    return on_threads(one, images)


@pytest.fixture(scope="module")
def pixels(sample: Sample) -> np.ndarray:
    return prepared(sample.images, scaled=True)


@pytest.fixture(scope="module")
def of_keras(pixels: np.ndarray) -> np.ndarray:
    """The vectors of the Keras model itself, in float32."""
    keras = import_keras()
    whole = build_model()
    whole.load_weights(IMAGENET_WEIGHTS)
    features = keras.layers.GlobalAveragePooling2D()(whole.get_layer("head").output)
    model = keras.Model(whole.input, features)
    batches = (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
    return np.concatenate([model.predict_on_batch(preprocess_input(np.float32(b))) for b in batches])


def encoded(choice: EngineChoice, pixels: np.ndarray) -> np.ndarray:
    encoder = load_encoder(EncoderSpec("efficientnet_lite0"), BATCH, choice)
    batches = [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]
    with ThreadPoolExecutor(encoder.streams) as pool:
        return np.concatenate(list(pool.map(encoder.encode, batches)))


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def hit_rates(vectors: np.ndarray, objects: np.ndarray) -> tuple[float, float]:
    """R@1 and R@10 of another drawing of the same object, by exact search over all images."""
    scores = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(scores, -np.inf)
    best = np.argsort(-scores, axis=1)[:, :10]
    hits = objects[best] == objects[:, None]
    return float(hits[:, 0].mean()), float(hits.any(axis=1).mean())


def indexed(vectors: np.ndarray) -> np.ndarray:
    """The vectors as the sample's index compares them: PCA to 256 dimensions, half whitened."""
    narrow = unit_float16(vectors)[0]
    return learn_transform(TransformSpec("pca", 256, -0.25), narrow).apply(narrow)


def assert_retrieves_as_well(found: np.ndarray, wanted: np.ndarray, objects: np.ndarray) -> None:
    """Equal within 0.01 in the space of the index, and nowhere worse by more in the encoder's own."""
    pairs = zip(hit_rates(indexed(found), objects), hit_rates(indexed(wanted), objects), strict=True)
    assert all(abs(got - reference) <= 0.01 for got, reference in pairs)
    pairs = zip(hit_rates(found, objects), hit_rates(wanted, objects), strict=True)
    assert all(got >= reference - 0.01 for got, reference in pairs)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """What the default configuration publishes of the sample."""
    workspace = tmp_path_factory.mktemp("night") / "w"
    run_nightly(load(ROOT / "configs" / "local.yaml", f"workspace={workspace}"), session())
    return Published(workspace)


@pytest.fixture(scope="module")
def reference(night: Published, sample: Sample) -> np.ndarray:
    """The vectors of that run, by OpenVINO in float32, in the order of the sample.

    They are of unit length and in float16, which moves a cosine by less than 1e-6.
    """
    encoder = night.manifest("embeddings").properties["encoder"]
    assert (encoder["engine"], encoder["precision"]) == ("openvino", "float32")
    table = night.table("embeddings")
    found = dict(zip(table["image_id"].to_pylist(), vectors_of(table), strict=True))
    return np.stack([found[image_id] for image_id in sample.ids])


def test_a_new_users_run_finds_other_drawings_of_the_same_object(night: Published) -> None:
    run = night.run
    assert run["images"]["read"] == 1902
    assert run["images"]["failed_by_reason"] == {"empty": 1, "truncated": 1, "unsupported_format": 1}
    assert run["index"]["shards"] == 4
    assert run["truth"]["queries"] == 1890
    assert run["truth"]["hit_rate_at_1"] >= 0.43
    assert run["truth"]["hit_rate_at_k"] >= 0.78
    assert run["recall"]["lower_bound"] >= 0.95
    assert run["join"]["pairs"] == run["join"]["queries"] * 20


def test_the_reference_finds_what_it_is_known_to_find(reference: np.ndarray, sample: Sample) -> None:
    assert len(sample.images) == 1890
    assert hit_rates(reference, sample.objects) == pytest.approx((0.437, 0.761), abs=0.01)


def test_openvino_in_float32_gives_the_vectors_of_keras(
    reference: np.ndarray, of_keras: np.ndarray
) -> None:
    assert np.einsum("ij,ij->i", unit(reference), unit(of_keras)).min() >= 0.99999


def test_tensorflow_in_float32_gives_the_vectors_of_keras(
    pixels: np.ndarray, of_keras: np.ndarray
) -> None:
    # One less than whole batches, so that the last one is filled up.
    found = encoded(EngineChoice("tensorflow"), pixels[:-1])
    assert len(found) % BATCH == BATCH - 1
    assert np.einsum("ij,ij->i", unit(found), unit(of_keras[:-1])).min() >= 0.99999


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
def test_bfloat16_stays_close_and_retrieves_as_well(
    engine: str, pixels: np.ndarray, reference: np.ndarray, sample: Sample
) -> None:
    found = encoded(EngineChoice(engine, "bfloat16"), pixels)
    similarity = np.einsum("ij,ij->i", unit(found), unit(reference))
    assert similarity.mean() >= 0.998
    assert similarity.min() >= 0.985
    assert similarity.max() < 1 - 1e-6, "this was computed in float32"
    assert_retrieves_as_well(found, reference, sample.objects)


def test_scaled_decoding_retrieves_as_well(sample: Sample, tmp_path: Path) -> None:
    # The sample is smaller than the encoder's input, so it is enlarged first; a third of it will do.
    objects = np.unique(sample.objects)[::3]
    chosen = np.flatnonzero(np.isin(sample.objects, objects))

    def enlarge(data: bytes) -> bytes:
        file = io.BytesIO()
        size = (ENLARGED, ENLARGED)
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return file.getvalue()

    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(enlarge, [sample.images[place] for place in chosen]))
    scaled, full = prepared(images, scaled=True), prepared(images, scaled=False)
    assert (scaled != full).any(axis=(1, 2, 3)).mean() > 0.9
    fast, slow = encoded(EngineChoice("openvino"), scaled), encoded(EngineChoice("openvino"), full)
    assert np.einsum("ij,ij->i", unit(fast), unit(slow)).mean() >= 0.985
    assert_retrieves_as_well(fast, slow, sample.objects[chosen])
