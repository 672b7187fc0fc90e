"""VGG16, ResNet50 and InceptionV3 of `keras.applications`, without their tops."""

import functools
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index_builder.errors import KithError
from transforms.encoders.family import EncoderFamily, EncoderSpec, Network
from transforms.encoders.keras_runtime import (
    import_keras,
    output_to_stderr,
    seeded_initialisation,
)
from transforms.encoders.weights_files import check_network_spec, network_weights_id

_STORAGE = "https://storage.googleapis.com/tensorflow/keras-applications"
_NO_TOP = "weights_tf_dim_ordering_tf_kernels_notop.h5"
PROBE_TIMEOUT_SEC = 5.0


@dataclass(frozen=True)
class Application:
    """One network of `keras.applications`: its module, its class and its published weights."""

    name: str
    module: str
    class_name: str
    input_size: tuple[int, int]
    min_size: int
    imagenet_url: str

    @property
    def imagenet_file(self) -> str:
        """The file name under which Keras caches the published weights."""
        return self.imagenet_url.rsplit("/", 1)[1]


def preprocess_input(application: Application) -> Any:
    """The application's own `keras.applications` normalisation of raw 0..255 images."""
    return getattr(import_keras().applications, application.module).preprocess_input


def cached_weights(application: Application) -> Path:
    """Where Keras keeps, or would keep, the downloaded ImageNet weights."""
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    return Path(home) / "models" / application.imagenet_file


def _load(application: Application, spec: EncoderSpec) -> Network:
    size = spec.input_size or application.input_size
    if spec.weights == "imagenet" and not cached_weights(application).is_file():
        _probe_download(application)
    path = spec.weights_path()
    weights = None if path is not None or spec.weights == "random" else "imagenet"
    build = getattr(import_keras().applications, application.class_name)
    with output_to_stderr(), seeded_initialisation(spec.seed):
        try:
            model = build(include_top=False, weights=weights, input_shape=(*size, 3))
        except Exception as error:  # Keras raises a bare Exception when a download fails.
            if weights is None:
                raise
            raise _no_weights(application, error) from error
    if path is not None:
        _load_weights(application, model, path)
    normalise = preprocess_input(application)
    return Network(size, normalise, lambda images: model(images, training=False))


def _load_weights(application: Application, model: Any, path: Path) -> None:
    try:
        model.load_weights(path)
    except (ValueError, OSError, KeyError) as error:
        raise KithError(
            f"{path} does not hold weights of {application.name} without its top: {error}. "
            f"Set encoder.weights to {application.imagenet_file} of keras.applications, or to a "
            ".weights.h5 file saved from this very network."
        ) from error


def _probe_download(application: Application) -> None:
    """Fails within seconds where Keras's own download, which has no time limit, would hang."""
    request = urllib.request.Request(application.imagenet_url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SEC):
            return
    except (urllib.error.URLError, OSError) as error:
        raise _no_weights(application, error) from error


def _no_weights(application: Application, error: Exception) -> KithError:
    return KithError(
        f"The ImageNet weights of {application.name} are not on this machine and could not be "
        f"downloaded from {application.imagenet_url}: {error}. On a machine with a network, "
        f"download that file and set encoder.weights to its path here (it must end in .h5); or "
        "set encoder.weights: random for a trial, or encoder.name: efficientnet_lite0, whose "
        "weights ship with Kith."
    )


def _family(application: Application) -> EncoderFamily:
    def check(spec: EncoderSpec) -> None:
        check_network_spec(spec, application.min_size)

    def weights_id(spec: EncoderSpec) -> str:
        return network_weights_id(spec, f"keras-applications:{application.name}:imagenet")

    return EncoderFamily(
        name=application.name,
        check=check,
        input_size=lambda spec: spec.input_size or application.input_size,
        preprocessing_id=lambda spec: application.name,
        weights_id=weights_id,
        load=functools.partial(_load, application),
    )


APPLICATIONS = (
    Application("vgg16", "vgg16", "VGG16", (224, 224), 32, f"{_STORAGE}/vgg16/vgg16_{_NO_TOP}"),
    Application(
        "resnet50", "resnet50", "ResNet50", (224, 224), 32, f"{_STORAGE}/resnet/resnet50_{_NO_TOP}"
    ),
    Application(
        "inception_v3",
        "inception_v3",
        "InceptionV3",
        (299, 299),
        75,
        f"{_STORAGE}/inception_v3/inception_v3_{_NO_TOP}",
    ),
)
FAMILIES = tuple(_family(application) for application in APPLICATIONS)
