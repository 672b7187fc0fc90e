"""Every engine gives the float32 vectors of Keras; bfloat16 stays as close as it was measured."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from index_builder.errors import KithError
from tests.pipeline.small_catalogue import SAMPLES
from transforms.decoding import decode_image
from transforms.encoders.engines import choice as choices
from transforms.encoders.engines.choice import EngineChoice, auto_engine, require_engine
from transforms.encoders.engines.engine import UnsupportedModelError
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import choose_engine, load_encoder
from transforms.preprocessing import Preprocessing

BATCH = 8
LITE0 = EncoderSpec("efficientnet_lite0")
needs_bfloat16 = pytest.mark.skipif(
    not choices.cpu_has_bfloat16(), reason="this CPU does not multiply bfloat16"
)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    preprocessing = Preprocessing((224, 224))
    paths = sorted((SAMPLES / "files").glob("*/*.jpg"))[: 2 * BATCH + 3]
    return np.stack([preprocessing.apply(decode_image(path.read_bytes()).pixels) for path in paths])


@pytest.fixture(scope="module")
def reference(pixels: np.ndarray) -> np.ndarray:
    """The vectors of the Keras model itself, called directly."""
    import keras

    from transforms.encoders.efficientnet_lite0 import (
        IMAGENET_WEIGHTS,
        build_model,
        preprocess_input,
    )

    whole = build_model()
    whole.load_weights(IMAGENET_WEIGHTS)
    features = keras.layers.GlobalAveragePooling2D()(whole.get_layer("head").output)
    model = keras.Model(whole.input, features)
    return np.asarray(model(preprocess_input(pixels.astype(np.float32)), training=False))


def encode(choice: EngineChoice, pixels: np.ndarray, spec: EncoderSpec = LITE0) -> np.ndarray:
    encoder = load_encoder(spec, BATCH, choice)
    return np.concatenate(
        [encoder.encode(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    )


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.einsum("ij,ij->i", one, other) / lengths


@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
def test_float32_is_that_of_keras(engine: str, pixels: np.ndarray, reference: np.ndarray) -> None:
    found = encode(EngineChoice(engine), pixels)
    assert cosines(found, reference).min() >= 0.99999
    np.testing.assert_allclose(found, reference, atol=2e-3)


@needs_bfloat16
@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
def test_bfloat16_is_close_but_not_the_same(
    engine: str, pixels: np.ndarray, reference: np.ndarray
) -> None:
    found = encode(EngineChoice(engine, "bfloat16"), pixels)
    similarity = cosines(found, reference)
    assert similarity.mean() >= 0.998
    assert similarity.min() >= 0.985
    assert similarity.max() < 1 - 1e-6
    # The other precision has not leaked into an engine of this process.
    assert cosines(encode(EngineChoice(engine), pixels), reference).min() >= 0.99999


@pytest.mark.parametrize("pooling", ["avg", "max", "gem", "flatten"])
def test_engines_pool_alike(pooling: str, pixels: np.ndarray) -> None:
    spec = EncoderSpec("efficientnet_lite0", "random", pooling, seed=4, input_size=(64, 64))
    pixels = pixels[:, :64, :64]
    found = encode(EngineChoice("openvino"), pixels, spec)
    wanted = encode(EngineChoice("tensorflow"), pixels, spec)
    assert found.shape == wanted.shape
    assert cosines(found, wanted).min() >= 0.99999


def test_gem_lies_between_the_mean_and_the_maximum(pixels: np.ndarray) -> None:
    mean, most, gem, whole = (
        encode(EngineChoice(), pixels, EncoderSpec("efficientnet_lite0", pooling=pooling))
        for pooling in ("avg", "max", "gem", "flatten")
    )
    assert (mean <= gem + 1e-3).all()
    assert (gem <= most + 1e-3).all()
    maps = whole.reshape(len(whole), 49, -1).astype(np.float64)
    np.testing.assert_allclose(gem, np.cbrt((maps**3).mean(axis=1)), rtol=1e-3, atol=2e-3)


_JAX = """
import sys
import numpy as np
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import load_encoder
pixels = np.load(sys.argv[1])
spec = EncoderSpec("efficientnet_lite0")
for precision in ("float32", "bfloat16"):
    encoder = load_encoder(spec, len(pixels), EngineChoice("jax", precision))
    np.save(sys.argv[2] + precision, encoder.encode(pixels))
"""


def test_jax_gives_the_same_in_a_process_of_its_own(
    pixels: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "pixels.npy", pixels[:BATCH])
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", _JAX, str(tmp_path / "pixels.npy"), str(tmp_path / "found-")],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exact = cosines(np.load(tmp_path / "found-float32.npy"), reference[:BATCH])
    half = cosines(np.load(tmp_path / "found-bfloat16.npy"), reference[:BATCH])
    assert exact.min() >= 0.99999
    assert 0.985 <= half.min() < 1 - 1e-6
    assert half.mean() >= 0.998


def test_keras_has_one_backend_a_process(reference: np.ndarray) -> None:
    with pytest.raises(KithError, match="Keras runs on the 'tensorflow' backend in this process"):
        load_encoder(LITE0, 1, EngineChoice("jax"))


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KithError, match=r"no openvino. Install it there \(pip install 'kith-index"):
        require_engine(EngineChoice("openvino"))
    assert auto_engine() == ("tensorflow", "neither a GPU nor openvino is here")


def test_bfloat16_is_refused_where_the_cpu_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices.cpu_has_bfloat16.cache_clear()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n")
    monkeypatch.setattr(choices, "_CPUINFO", str(tmp_path / "cpuinfo"))
    for engine in ("tensorflow", "openvino"):
        with pytest.raises(
            KithError, match="precision is bfloat16, but the CPU of this worker has none"
        ):
            require_engine(EngineChoice(engine, "bfloat16"))
        require_engine(EngineChoice(engine))
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\n")
    choices.cpu_has_bfloat16.cache_clear()
    require_engine(EngineChoice("tensorflow", "bfloat16"))
    choices.cpu_has_bfloat16.cache_clear()


def test_auto_takes_openvino_on_a_cpu() -> None:
    engine, why = auto_engine()
    assert engine == "openvino"
    assert "no GPU here" in why


def test_auto_passes_over_an_engine_that_cannot_run_the_model(tmp_path: Path) -> None:
    import tensorflow as tf

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32, name="images")])
        def serve(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"vectors": tf.reduce_mean(images, axis=(1, 2))}

    model = Model()
    tf.saved_model.save(model, str(tmp_path / "model"), signatures=model.serve)
    spec = EncoderSpec("custom", str(tmp_path / "model"), input_size=(8, 8), preprocessing="none")
    with pytest.raises(UnsupportedModelError, match="openvino, which takes networks whose variables"):
        load_encoder(spec, 2, EngineChoice("openvino"))
    assert choose_engine(spec, "float32") == ("tensorflow", "openvino cannot run this model")
