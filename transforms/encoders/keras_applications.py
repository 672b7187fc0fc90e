"""The networks of `keras.applications`, without their tops, as Keras documents their use.

EfficientNet, EfficientNetV2, ConvNeXt and MobileNetV3 normalise inside the network; the others
by the `preprocess_input` of their module.
"""

import functools
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.errors import KithError
from transforms.encoders.family import EncoderFamily, EncoderSpec, Network
from transforms.encoders.keras_applications_table import APPLICATIONS, Application
from transforms.encoders.keras_runtime import (
    import_keras,
    output_to_stderr,
    seeded_initialisation,
)
from transforms.encoders.weights_files import (
    check_network_spec,
    load_weights_file,
    network_weights_id,
)

__all__ = ["APPLICATIONS", "FAMILIES", "Application", "cached_weights", "preprocess_input"]

PROBE_TIMEOUT_SEC = 5.0
IMAGENET_DEVIATIONS = (0.229, 0.224, 0.225)


def preprocess_input(application: Application) -> Any:
    """The application's own `keras.applications` normalisation of raw 0..255 images."""
    return getattr(import_keras().applications, application.module).preprocess_input


def cached_weights(application: Application, size: tuple[int, int]) -> Path:
    """Where Keras keeps, or would keep, the downloaded ImageNet weights for images of `size`."""
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    return Path(home) / "models" / application.imagenet_file(size)


def _load(application: Application, spec: EncoderSpec) -> Network:
    size = spec.input_size or application.input_size
    path = spec.weights_path()
    with output_to_stderr(), seeded_initialisation(spec.seed):
        if spec.weights == "imagenet":
            model = _published(application, size)
        else:
            model = _build(application, size, weights=None)
    if path is not None:
        remedy = (
            f"Set encoder.weights to {application.imagenet_file(size)} of keras.applications, "
            "which has no top, or to a .weights.h5 file saved from this very network."
        )
        load_weights_file(model, application.name, path, remedy)
        if application.module == "efficientnet":
            _finish_normalisation(model)
    if application.module == "convnext":
        model = _with_depthwise_layers(model)
    normalise = preprocess_input(application)
    return Network(
        size, normalise, lambda images: model(images, training=False), variables=model.variables
    )


def _build(application: Application, size: tuple[int, int], weights: str | None) -> Any:
    build = getattr(import_keras().applications, application.class_name)
    return build(include_top=False, weights=weights, input_shape=(*size, 3))


def _published(application: Application, size: tuple[int, int]) -> Any:
    """The network with the ImageNet weights that Keras downloads or has in its cache."""
    trained = size if application.weights_any_side else application.input_size
    if not cached_weights(application, trained).is_file():
        _probe_download(application, trained)
    try:
        model = _build(application, trained, weights="imagenet")
    except Exception as error:  # Keras raises a bare Exception when a download fails.
        raise _no_weights(application, trained, error) from error
    if trained == size:
        return model
    resized = _build(application, size, weights=None)
    resized.set_weights(model.get_weights())
    return resized


def _finish_normalisation(model: Any) -> None:
    """Gives an EfficientNet, whose weights came from a file, the normalisation of the published one.

    The published weights hold the standard deviations where the layer wants variances. Keras
    makes up for it by one more division, but only in the network that it builds for
    `weights="imagenet"`; here the variances are set right instead. Weights of other origin hold
    other numbers and stay as they are.
    """
    normalisation = next(
        layer for layer in model.layers if isinstance(layer, import_keras().layers.Normalization)
    )
    mean, variance, *count = normalisation.get_weights()
    if np.allclose(variance, IMAGENET_DEVIATIONS, rtol=1e-4, atol=0.0):
        divisors = np.sqrt(np.array(IMAGENET_DEVIATIONS, variance.dtype))
        normalisation.set_weights([mean, np.square(np.sqrt(variance) * divisors), *count])
        normalisation.finalize_state()


def _with_depthwise_layers(model: Any) -> Any:
    """The same network with a depthwise layer for each convolution in groups of one channel.

    On a CPU, Keras hands grouped convolutions to XLA, as functions within the graph that OpenVINO
    cannot convert. All other layers are shared with `model`.
    """
    keras = import_keras()
    made = {}

    def replace(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.Conv2D) or layer.groups != layer.filters:
            return layer
        made[layer.name] = keras.layers.DepthwiseConv2D(
            layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            use_bias=layer.use_bias,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        return made[layer.name]

    replaced = keras.models.clone_model(model, clone_function=replace)
    for name, layer in made.items():
        kernel, *bias = model.get_layer(name).get_weights()
        # From [h, w, 1, channels] to [h, w, channels, 1].
        layer.set_weights([kernel.transpose(0, 1, 3, 2), *bias])
    return replaced


def _probe_download(application: Application, size: tuple[int, int]) -> None:
    """Fails within seconds where Keras's own download, which has no time limit, would hang."""
    request = urllib.request.Request(application.imagenet_url(size), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SEC):
            return
    except (urllib.error.URLError, OSError) as error:
        raise _no_weights(application, size, error) from error


def _no_weights(application: Application, size: tuple[int, int], error: Exception) -> KithError:
    return KithError(
        f"The ImageNet weights of {application.name} are not on this machine and could not be "
        f"downloaded from {application.imagenet_url(size)}: {error}. On a machine with a network, "
        f"download that file and set encoder.weights to its path here (it must end in .h5); or "
        "set encoder.weights: random for a trial, or encoder.name: efficientnet_lite0, whose "
        "weights ship with Kith."
    )


def _family(application: Application) -> EncoderFamily:
    def check(spec: EncoderSpec) -> None:
        check_network_spec(spec, application.min_side)

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


FAMILIES = tuple(_family(application) for application in APPLICATIONS)
