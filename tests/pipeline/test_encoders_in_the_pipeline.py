"""Each encoder through the whole embed stage, against the direct Keras computation."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.embed_images import embed_images
from tests.pipeline.small_catalogue import SAMPLES, load, session, write_config
from transforms.encoders.keras_runtime import import_keras

PICTURES = sorted((SAMPLES / "files").rglob("*.jpg"))[:5]
CLASSES = {"vgg16": "VGG16", "resnet50": "ResNet50", "inception_v3": "InceptionV3"}


def embed(tmp_path: Path, **encoder: object) -> dict[str, np.ndarray]:
    """Embeds the pictures with Kith; vectors float32 by file name."""
    sources = [{"format": "files", "paths": [str(path) for path in PICTURES]}]
    config = write_config(
        tmp_path / "c.yaml", "", tmp_path / "w", images={"sources": sources}, evaluate={}, export={},
        encoder={"batch_size": 5, **encoder},
    )  # fmt: skip
    made = embed_images(load(config), session()).embeddings
    file = made.manifest.parts[0].file(".parquet").path
    table = pq.read_table(Path(made.folder) / file)
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    names = [Path(image_id).name for image_id in table["image_id"].to_pylist()]
    return dict(zip(names, vectors.astype(np.float64), strict=True))


def textbook(name: str, size: int, pooling: str | None) -> np.ndarray:
    """The few lines of every tutorial: load, preprocess, predict; unit length."""
    keras = import_keras()
    keras.utils.set_random_seed(11)
    module = getattr(keras.applications, name)
    model = getattr(keras.applications, CLASSES[name])(
        weights=None, include_top=False, input_shape=(size, size, 3), pooling=pooling
    )
    vectors = []
    for path in PICTURES:
        image = keras.utils.load_img(path, target_size=(size, size))
        batch = np.expand_dims(keras.utils.img_to_array(image), 0)
        vectors.append(model.predict(module.preprocess_input(batch), verbose=0).reshape(-1))
    wide = np.array(vectors, dtype=np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "size", "pooling", "dim"),
    [
        ("vgg16", 224, "flatten", 25_088),
        ("resnet50", 224, "avg", 2048),
        ("inception_v3", 299, "max", 2048),
    ],
)
def test_equals_the_textbook(tmp_path: Path, name: str, size: int, pooling: str, dim: int) -> None:
    found = embed(
        tmp_path, name=name, weights="random", seed=11, pooling=pooling,
        resize="stretch", interpolation="nearest",
    )  # fmt: skip
    got = np.array([found[path.name] for path in PICTURES])
    wanted = textbook(name, size, None if pooling == "flatten" else pooling)
    assert got.shape == wanted.shape == (len(PICTURES), dim)
    # Rounding to float16 moves a number by at most 2^-11 of itself, and once more to keep the length.
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-6)
    similarity, reference = got @ got.T, wanted @ wanted.T
    np.testing.assert_allclose(similarity, reference, atol=2e-5)
    gaps = np.abs(np.diff(np.sort(reference, axis=1), axis=1)).min()
    if gaps > 1e-4:
        np.testing.assert_array_equal(np.argsort(-similarity), np.argsort(-reference))


def test_lite0_equals_its_keras_model(tmp_path: Path) -> None:
    from transforms.decoding import decode_image
    from transforms.encoders import efficientnet_lite0
    from transforms.encoders.registry import EncoderSpec
    from transforms.preprocessing import Preprocessing

    found = embed(tmp_path, name="efficientnet_lite0")
    network = efficientnet_lite0.FAMILY.load(EncoderSpec("efficientnet_lite0"))
    for path in PICTURES:
        pixels = Preprocessing((224, 224)).apply(decode_image(path.read_bytes()).pixels)
        features = np.asarray(network.features((pixels[None].astype(np.float32) - 127) / 128))
        wanted = features.mean(axis=(1, 2))[0].astype(np.float64)
        assert found[path.name] @ wanted / np.linalg.norm(wanted) >= 0.99999
