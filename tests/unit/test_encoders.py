"""Encoders: the same numbers as Keras, verified weights, clear refusals."""

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from index_builder.errors import ConfigError, KithError
from tests.unit import images_for_tests as make
from transforms.decoding import decode_image
from transforms.encoders import efficientnet_lite0
from transforms.encoders.keras_runtime import import_keras
from transforms.encoders.registry import (
    EncoderSpec,
    check_encoder,
    encoder_names,
    load_encoder,
    network_fingerprint,
    resolve_input_size,
)
from transforms.preprocessing import Preprocessing

ROOT = Path(__file__).parents[2]
SMALL = {
    "vgg16": (64, 64),
    "efficientnet_b0": (64, 32),
    "convnext_tiny": (32, 32),
}
CLASSES = {
    "vgg16": "VGG16",
    "efficientnet_b0": "EfficientNetB0",
    "convnext_tiny": "ConvNeXtTiny",
}
MODULES = {"efficientnet_b0": "efficientnet", "convnext_tiny": "convnext"}


def batch(size: tuple[int, int], count: int = 3) -> np.ndarray:
    return np.stack([make.picture(*size, seed=i) for i in range(count)])


def reference(name: str, images: np.ndarray, pooling: str | None) -> np.ndarray:
    keras = import_keras()
    keras.utils.set_random_seed(7)
    build = getattr(keras.applications, CLASSES[name])
    model = build(include_top=False, weights=None, input_shape=images.shape[1:], pooling=pooling)
    module = getattr(keras.applications, MODULES.get(name, name))
    prepared = module.preprocess_input(images.astype(np.float32))
    return np.asarray(model.predict(prepared, verbose=0)).reshape(len(images), -1)


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("vgg16", "avg"),
        ("vgg16", "flatten"),
        ("efficientnet_b0", "avg"),
        ("convnext_tiny", "max"),
    ],
)
def test_equals_keras(name: str, pooling: str) -> None:
    size = SMALL[name]
    spec = EncoderSpec(name, weights="random", pooling=pooling, seed=7, input_size=size)
    got = load_encoder(spec, batch_size=4).encode(batch(size))
    wanted = reference(name, batch(size), None if pooling == "flatten" else pooling)
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5 * float(np.abs(wanted).max()))


def test_default_sizes_are_the_networks_own() -> None:
    sizes = {
        name: resolve_input_size(EncoderSpec(name, weights="random"))
        for name in encoder_names()
        if name != "custom"
    }
    assert sizes["efficientnet_lite0"] == sizes["vgg16"] == sizes["resnet50"] == (224, 224)
    assert sizes["inception_v3"] == (299, 299)


def test_lite0_equals_the_keras_model_and_ignores_padding() -> None:
    encoder = load_encoder(EncoderSpec("efficientnet_lite0"), batch_size=4)
    images = batch((224, 224), 3)
    vectors = encoder.encode(images)
    assert vectors.shape == (3, 1280)
    assert encoder.dim == 1280
    network = efficientnet_lite0.FAMILY.load(EncoderSpec("efficientnet_lite0"))
    tensor = network.normalise(images.astype(np.float32))
    np.testing.assert_allclose(np.asarray(tensor), (images.astype(np.float32) - 127) / 128)
    wanted = np.asarray(network.features(tensor)).mean(axis=(1, 2))
    np.testing.assert_allclose(vectors, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(encoder.encode(images[:1])[0], vectors[0], rtol=1e-5, atol=1e-6)


def test_lite0_refuses_changed_weights(tmp_path) -> None:
    original = efficientnet_lite0.IMAGENET_WEIGHTS
    copy = tmp_path / original.name
    shutil.copy(original, copy)
    efficientnet_lite0.verify_imagenet_weights(copy)
    with copy.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    with pytest.raises(KithError, match="(?i)sha-?256"):
        efficientnet_lite0.verify_imagenet_weights(copy)


def test_random_weights_repeat_in_another_process() -> None:
    code = (
        "import numpy as np, sys\n"
        "from transforms.encoders.registry import EncoderSpec, load_encoder\n"
        "spec = EncoderSpec('mobilenet', weights='random', seed=3, input_size=(32, 32))\n"
        "image = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(1, 32, 32, 3) % 251\n"
        "vectors = load_encoder(spec, 1).encode(image.astype(np.uint8))\n"
    )
    # Here after whatever ran before, there in a process that does nothing else.
    here: dict[str, np.ndarray] = {}
    exec(code, here)
    tell = "sys.stdout.write(vectors.tobytes().hex())"
    done = subprocess.run([sys.executable, "-c", code + tell], capture_output=True, check=True)
    assert here["vectors"].shape == (1, 1024)
    assert done.stdout.decode() == here["vectors"].tobytes().hex()


@pytest.mark.parametrize("kind", ["keras", "saved_model"])
def test_a_model_of_the_users_own(tmp_path, kind: str) -> None:
    keras = import_keras()
    keras.utils.set_random_seed(1)
    inputs = keras.Input((32, 32, 3))
    outputs = keras.layers.Conv2D(5, 3)(inputs)
    model = keras.Model(inputs, outputs)
    path = tmp_path / ("model.keras" if kind == "keras" else "model")
    if kind == "keras":
        model.save(path)
    else:
        model.export(path, verbose=False)
    spec = EncoderSpec("custom", weights=str(path), pooling="avg", preprocessing="tf")
    assert resolve_input_size(spec) == (32, 32)
    images = batch((32, 32))
    got = load_encoder(spec, 4).encode(images)
    wanted = np.asarray(model(images.astype(np.float32) / 127.5 - 1)).mean(axis=(1, 2))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (EncoderSpec("vgg17"), "encoder.name"),
        (EncoderSpec("vgg16", pooling="sum"), "encoder.pooling"),
        (EncoderSpec("vgg16", weights="/nowhere/vgg.weights.h5"), "encoder.weights"),
        (EncoderSpec("custom"), "encoder.weights"),
        (EncoderSpec("vgg16", preprocessing="tf"), "encoder.preprocessing"),
        (EncoderSpec("inception_v3", input_size=(20, 20)), "encoder.input_size"),
    ],
)
def test_impossible_specs_are_refused_with_the_key(spec: EncoderSpec, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_encoder(spec)


def test_missing_imagenet_weights_name_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(KithError, match="encoder.weights"):
        load_encoder(EncoderSpec("vgg16"), 1)


def test_fingerprint_follows_what_decides_the_vectors(tmp_path) -> None:
    weights = tmp_path / "w.weights.h5"
    weights.write_bytes(b"one")
    specs = [
        EncoderSpec("vgg16"),
        EncoderSpec("vgg16", pooling="max"),
        EncoderSpec("vgg16", weights="random"),
        EncoderSpec("vgg16", weights="random", seed=1),
        EncoderSpec("vgg16", weights=str(weights)),
        EncoderSpec("resnet50"),
        EncoderSpec("efficientnet_lite0"),
        EncoderSpec("efficientnet_lite0", weights=str(weights)),
        EncoderSpec("efficientnet_lite0_pytorch", weights=str(weights)),
    ]
    prints = {str(network_fingerprint(spec)) for spec in specs}
    assert len(prints) == len(specs)
    again = EncoderSpec("vgg16", weights=str(shutil.copy(weights, tmp_path / "copy.weights.h5")))
    assert str(network_fingerprint(again)) in prints
    weights.write_bytes(b"two")
    assert str(network_fingerprint(specs[4])) not in prints


def test_fingerprints_of_the_published_networks_stay() -> None:
    """They decide whether last night's vectors are reused."""
    for name in encoder_names():
        if name.startswith(("efficientnet_lite0", "custom")):
            continue
        assert network_fingerprint(EncoderSpec(name)) == {
            "encoder": name,
            "weights": f"keras-applications:{name}:imagenet",
            "pooling": "avg",
            "normalisation": name,
        }
    assert network_fingerprint(EncoderSpec("efficientnet_lite0"))["weights"] == (
        "sha256:ddd4b5c35cf9540eba3b4165336bf72ebb97f439adbe688a1edea99d6eb1603a"
    )


def test_checking_any_encoder_imports_no_keras() -> None:
    code = (
        "import sys\n"
        "from transforms.encoders.registry import (\n"
        "    EncoderSpec, check_encoder, encoder_names, network_fingerprint, resolve_input_size)\n"
        "names = [name for name in encoder_names() if name != 'custom']\n"
        "for name in names:\n"
        "    spec = EncoderSpec(name, weights='random')\n"
        "    check_encoder(spec), network_fingerprint(spec), resolve_input_size(spec)\n"
        "assert len(names) == 42, names\n"
        "assert not {'keras', 'tensorflow', 'h5py'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_example_of_the_documentation_runs() -> None:
    """The encoder of docs/adding.md, as it stands there."""
    text = (ROOT / "docs" / "adding.md").read_text("utf-8")
    name, code = re.findall(
        r"Write `transforms/encoders/(\w+)\.py`:\n\n```python\n(.*?)```", text, re.S
    )[0]
    module = types.ModuleType(name)
    exec(compile(code, "docs/adding.md", "exec"), module.__dict__)
    family = module.FAMILY
    assert family.name == name
    assert name not in encoder_names()
    spec = EncoderSpec(name, weights="random", seed=7, input_size=(64, 64))
    family.check(spec)
    assert family.weights_id(spec) == "random:7"
    network = family.load(spec)

    keras = import_keras()
    keras.utils.set_random_seed(7)
    whole = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(64, 64, 3))
    direct = keras.Model(whole.input, whole.get_layer("conv4_block6_out").output)
    images = batch((64, 64)).astype(np.float32)
    wanted = np.asarray(direct(keras.applications.resnet50.preprocess_input(images.copy())))
    got = np.asarray(network.features(network.normalise(images.copy())))
    assert got.shape == (3, 4, 4, 1024)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max()))


def test_the_documentation_names_every_encoder() -> None:
    text = (ROOT / "docs" / "adding.md").read_text("utf-8")
    for first, last in re.findall(r"`(\w+\d)` to `(\w+\d)`", text):
        stem = first[:-1]
        numbers = range(int(first[-1]), int(last[-1]) + 1)
        text += "".join(f"`{stem}{number}`" for number in numbers)
    assert [name for name in encoder_names() if f"`{name}`" not in text and name != "custom"] == []


def test_vgg16_flattened_is_the_textbook_example(tmp_path) -> None:
    """The few lines of every tutorial, from the file to the ranking, against Kith's three steps."""
    keras = import_keras()
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(
            make.encode(make.picture(150 + 30 * index, 260 - 20 * index, seed=index), "PNG")
        )
    paths = sorted(tmp_path.iterdir())

    keras.utils.set_random_seed(11)
    model = keras.applications.VGG16(include_top=False, weights=None, input_shape=(224, 224, 3))
    wanted = []
    for path in paths:
        image = keras.utils.load_img(path, target_size=(224, 224))
        array = np.expand_dims(keras.utils.img_to_array(image), axis=0)
        features = model.predict(keras.applications.vgg16.preprocess_input(array), verbose=0)
        wanted.append(features.flatten())

    spec = EncoderSpec("vgg16", weights="random", pooling="flatten", seed=11)
    preprocessing = Preprocessing(resolve_input_size(spec), "stretch", "nearest")
    images = [preprocessing.apply(decode_image(path.read_bytes()).pixels) for path in paths]
    encoder = load_encoder(spec, batch_size=4)
    got = np.concatenate([encoder.encode(np.stack(images[:4])), encoder.encode(images[4][None])])

    assert encoder.dim == 25_088
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(cosines(got), cosines(np.array(wanted)), rtol=0, atol=1e-6)
    assert (ranking(got) == ranking(np.array(wanted))).all()


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


def ranking(vectors: np.ndarray) -> np.ndarray:
    return np.argsort(-cosines(vectors), axis=1, kind="stable")
