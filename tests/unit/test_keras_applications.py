"""Every network of keras.applications: the numbers, sizes, normalisation and weights files of Keras."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from index_builder.errors import ConfigError, KithError
from tests.unit.images_for_tests import picture
from transforms.encoders.family import EncoderSpec, Network
from transforms.encoders.keras_applications import (
    APPLICATIONS,
    FAMILIES,
    IMAGENET_DEVIATIONS,
    Application,
    cached_weights,
    preprocess_input,
)
from transforms.encoders.keras_runtime import import_keras
from transforms.encoders.registry import check_encoder, encoder_names, resolve_input_size

BY_NAME = {application.name: application for application in APPLICATIONS}
LOADERS = {family.name: family.load for family in FAMILIES}

# The smallest network of each family of code, and the side of the images that it is tried on.
# efficientnet_b0 has a test of its own.
SMALLEST = {
    "vgg16": 32,
    "resnet50": 32,
    "resnet50_v2": 32,
    "inception_v3": 75,
    "inception_resnet_v2": 75,
    "xception": 71,
    "densenet121": 32,
    "mobilenet": 128,
    "mobilenet_v2": 50,
    "mobilenet_v3_small": 32,
    "efficientnet_v2_b0": 32,
    "convnext_tiny": 32,
    "nasnet_mobile": 32,
}


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Downloads":
    return Downloads(tmp_path, monkeypatch)


class Downloads:
    """Gives Keras a file of ours for the published weights, and notes which it asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KERAS_HOME", str(folder))
        monkeypatch.setattr("keras.src.utils.file_utils.get_file", self._get_file)
        self.folder = folder
        self.weights = folder / "published_notop.h5"
        self.asked: list[tuple[str, str]] = []

    def _get_file(self, name: str, origin: str, **_: Any) -> str:
        self.asked.append((name, origin))
        return str(self.weights)

    def pretend(self, application: Application, size: tuple[int, int]) -> None:
        """Puts something in the place of the cached file, so that no network is tried."""
        path = cached_weights(application, size)
        path.parent.mkdir(exist_ok=True)
        path.touch()


def build(application: Application, side: int, weights: str | None = None) -> Any:
    keras = import_keras()
    keras.utils.set_random_seed(5)
    function = getattr(keras.applications, application.class_name)
    return function(include_top=False, weights=weights, input_shape=(side, side, 3))


def pictures(side: int) -> np.ndarray:
    return np.stack([picture(side, side, seed=seed) for seed in range(2)]).astype(np.float32)


def features(network: Network, images: np.ndarray) -> np.ndarray:
    return np.asarray(network.features(network.normalise(images.copy())))


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    scale = float(np.abs(wanted).max())
    assert scale > 0
    assert wanted.std() > 0
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * scale)


def keras_message(application: Application, top: bool) -> str:
    """What Keras says of an image of one pixel: of which size it should have been."""
    function = getattr(import_keras().applications, application.class_name)
    with pytest.raises(ValueError, match="should be|at least") as caught:
        function(include_top=top, weights="imagenet" if top else None, input_shape=(1, 1, 3))
    return str(caught.value)


def keras_module(application: Application) -> Any:
    function = getattr(import_keras().applications, application.class_name)
    return sys.modules[inspect.unwrap(function).__module__]


def test_the_table_is_complete() -> None:
    ours = [application.class_name for application in APPLICATIONS]
    theirs = [name for name in dir(import_keras().applications) if name[0].isupper()]
    assert sorted(ours) == sorted(theirs)
    assert set(BY_NAME) <= set(encoder_names())
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in BY_NAME)


@pytest.mark.parametrize("application", APPLICATIONS, ids=lambda application: application.name)
def test_sizes_and_normalisation_are_those_of_keras(application: Application) -> None:
    side = application.side
    assert resolve_input_size(EncoderSpec(application.name)) == (side, side)
    if application.module == "mobilenet_v3":  # It has no size of its own but in its manual.
        assert "`(224, 224, 3)`" in inspect.getdoc(keras_module(application).MobileNetV3Small)
        assert side == 224
    else:
        assert f"should be ({side}, {side}, 3)" in keras_message(application, top=True)
    least = application.min_side
    assert f"at least {least}x{least}" in keras_message(application, top=False)
    with pytest.raises(ConfigError, match=rf"at least {least} x {least}"):
        check_encoder(EncoderSpec(application.name, input_size=(least, least - 1)))
    images = pictures(8)
    wanted = keras_module(application).preprocess_input(images.copy())
    np.testing.assert_array_equal(preprocess_input(application)(images.copy()), wanted)


@pytest.mark.parametrize("application", APPLICATIONS, ids=lambda application: application.name)
def test_weights_urls_are_made_of_keras_own_constants(application: Application) -> None:
    module = keras_module(application)
    module = getattr(module, "resnet", module)  # ResNetV2 takes the constants of ResNet.
    constants = [value for value in vars(module).values() if isinstance(value, str)]
    url = application.imagenet_url(application.input_size)
    if url in constants:
        return
    base, file = url.rsplit("/", 1)
    assert f"{base}/" in constants
    if application.module in ("mobilenet", "mobilenet_v2", "inception_resnet_v2"):
        return  # Keras makes the name in code; the test below asks for it.
    names = [f"{key}_{end}" for key in module.WEIGHTS_HASHES for end in ("notop.h5", "no_top_v2.h5")]
    names += [f"{key}_weights_tf_dim_ordering_tf_kernels_notop.h5" for key in module.WEIGHTS_HASHES]
    starts = ("", "efficientnet", "efficientnetv2", "efficientnetv2-", "weights_mobilenet_v3_")
    assert file in [start + name for start in starts for name in names]


@pytest.mark.parametrize("name", SMALLEST)
def test_published_weights_give_what_keras_gives(name: str, downloads: Downloads) -> None:
    application, side = BY_NAME[name], SMALLEST[name]
    direct = build(application, side)
    save_as_published(direct, downloads.weights)
    images = pictures(side)
    wanted = np.asarray(direct(keras_module(application).preprocess_input(images.copy())))
    # NASNet's published weights are loaded at its own size whatever the size that is asked for.
    trained = (side, side) if application.weights_any_side else application.input_size
    downloads.pretend(application, trained)

    network = LOADERS[name](EncoderSpec(name, input_size=(side, side)))

    assert_same(features(network, images), wanted)
    assert len(network.variables) == len(direct.variables)
    assert downloads.asked == [(application.imagenet_file(trained), application.imagenet_url(trained))]


def test_convnext_holds_no_compiled_functions() -> None:
    """Keras's grouped convolutions are such functions on a CPU: slow, and nothing for OpenVINO."""
    import tensorflow as tf

    network = LOADERS["convnext_tiny"](EncoderSpec("convnext_tiny", "random", input_size=(32, 32)))
    signature = tf.TensorSpec((1, 32, 32, 3), tf.float32)
    graph = tf.function(network.features).get_concrete_function(signature).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert kinds.count("DepthwiseConv2dNative") == 18
    assert not [kind for kind in kinds if "PartitionedCall" in kind]


@pytest.mark.parametrize("name", ["published_notop.h5", "own.weights.h5"])
def test_weights_from_a_file(name: str, tmp_path: Path) -> None:
    application = BY_NAME["mobilenet"]
    direct = build(application, 64)
    path = tmp_path / name
    if name.endswith(".weights.h5"):
        direct.save_weights(path)
    else:
        save_as_published(direct, path)
    spec = EncoderSpec(application.name, weights=str(path), seed=99, input_size=(64, 64))
    images = pictures(64)
    wanted = np.asarray(direct(keras_module(application).preprocess_input(images.copy())))
    assert_same(features(LOADERS[application.name](spec), images), wanted)


def save_as_published(model: Any, path: Path) -> None:
    """Writes the older layout of HDF5, in which the weights of keras.applications are published."""
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


@pytest.mark.parametrize("published", [True, False])
def test_efficientnet_from_a_file_normalises_as_keras_does(
    published: bool, downloads: Downloads
) -> None:
    """The published file holds deviations for variances, and only Keras's own loading knows it."""
    application = BY_NAME["efficientnet_b0"]
    direct = build(application, 32)
    normalisation = next(layer for layer in direct.layers if "normalization" in layer.name)
    deviations = np.array(IMAGENET_DEVIATIONS, np.float32)
    variances = deviations if published else np.array([0.3, 0.2, 0.1], np.float32)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    normalisation.set_weights([mean, variances, *normalisation.get_weights()[2:]])
    normalisation.finalize_state()
    save_as_published(direct, downloads.weights)
    if published:
        direct = build(application, 32, weights="imagenet")
    images = pictures(32)
    wanted = np.asarray(direct(images))

    spec = EncoderSpec(application.name, str(downloads.weights), input_size=(32, 32))
    assert_same(features(LOADERS[application.name](spec), images), wanted)

    file = "efficientnetb0_notop.h5"
    asked = (file, f"https://storage.googleapis.com/keras-applications/{file}")
    assert downloads.asked == [asked] * published
    assert asked == (application.imagenet_file((32, 32)), application.imagenet_url((32, 32)))


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [
        ("mobilenet", (128, 128), 128),
        ("mobilenet", (128, 160), 224),
        ("mobilenet", (96, 96), 224),
        ("mobilenet_v2", (96, 96), 96),
        ("mobilenet_v2", (64, 64), 224),
        ("vgg16", (96, 96), None),
    ],
)
def test_mobilenets_have_weights_for_their_sizes(
    name: str, size: tuple[int, int], side: int | None
) -> None:
    application = BY_NAME[name]
    file = application.imagenet_file(size)
    assert (f"_{side}_" in file) == (side is not None)
    assert application.imagenet_url(size).endswith(f"/{file}")


@pytest.mark.parametrize(
    "name", ["published_notop.h5", "own.weights.h5", "renamed.weights.h5", "junk.weights.h5"]
)
def test_weights_of_another_network_are_refused(name: str, tmp_path: Path) -> None:
    keras = import_keras()
    path = tmp_path / name
    inputs = keras.Input((32, 32, 3))
    other = keras.Model(inputs, keras.layers.Conv2D(64, 3, name="conv1")(inputs))
    if name.startswith("junk"):
        path.write_bytes(b"junk")
    elif name.startswith("own"):
        other.save_weights(path)
    else:
        save_as_published(other, path)
    spec = EncoderSpec("mobilenet", str(path), input_size=(32, 32))
    with pytest.raises(KithError) as caught:
        LOADERS["mobilenet"](spec)
    message = str(caught.value)
    assert f"{name} does not hold weights of mobilenet: " in message
    assert "Set encoder.weights to mobilenet_1_0_224_tf_no_top.h5 of keras.applications" in message
    assert len(message) < 700
