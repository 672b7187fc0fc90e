"""Engines, precisions and scaled decoding against float32 Keras, on the whole sample."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from index_builder.spec import TransformSpec
from index_builder.transform import learn_transform
from index_builder.vectors import unit_float16
from tests.pipeline.small_catalogue import SAMPLES
from transforms.decoding import DecodePolicy, decode_image
from transforms.encoders.efficientnet_lite0 import IMAGENET_WEIGHTS, build_model, preprocess_input
from transforms.encoders.engines.choice import EngineChoice, cpu_has_bfloat16
from transforms.encoders.family import EncoderSpec
from transforms.encoders.keras_runtime import import_keras
from transforms.encoders.registry import load_encoder
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord
from transforms.sources.tfrecord import TFRecordSource

BATCH = 63
ENLARGED = 400
PREPROCESSING = Preprocessing((224, 224))


class Sample(NamedTuple):
    """The committed catalogue: encoded images, and the object that each one shows."""

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
        [image.data for image in images], np.array([image.metadata["object_id"] for image in images])
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
def reference(pixels: np.ndarray) -> np.ndarray:
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


def test_the_reference_finds_what_it_is_known_to_find(reference: np.ndarray, sample: Sample) -> None:
    assert len(sample.images) == 1890
    assert hit_rates(reference, sample.objects) == pytest.approx((0.437, 0.761), abs=0.01)


@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
def test_float32_engines_give_the_vectors_of_keras(
    engine: str, pixels: np.ndarray, reference: np.ndarray
) -> None:
    found = encoded(EngineChoice(engine), pixels)
    assert np.einsum("ij,ij->i", unit(found), unit(reference)).min() >= 0.99999


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
