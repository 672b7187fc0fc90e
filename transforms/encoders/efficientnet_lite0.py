"""EfficientNet-Lite0, the default encoder, with ImageNet weights that ship with Kith.

The architecture is Google's EfficientNet-Lite (no squeeze-and-excitation, ReLU6 throughout, stem
and head not scaled). Layers are created in the order in which the weights file keys them.

There are two of it, which differ in the padding of their convolutions of stride 2 and take the
same shapes of weights. `efficientnet_lite0` pads as TensorFlow's "same" does: more at the bottom
and right where the padding is odd. So Google trained it, and the shipped weights want it.
`efficientnet_lite0_pytorch` pads both sides alike, as PyTorch's own layers do: for weights that
were trained so in PyTorch; none ship.
"""

from pathlib import Path
from typing import Any

from index_builder.errors import ConfigError, KithError
from transforms.encoders.family import EncoderFamily, EncoderSpec, Network
from transforms.encoders.keras_runtime import import_keras, seeded_initialisation
from transforms.encoders.weights_files import (
    check_network_spec,
    load_weights_file,
    network_weights_id,
    sha256_of_file,
)

NAME = "efficientnet_lite0"
PYTORCH_NAME = "efficientnet_lite0_pytorch"
INPUT_SIZE = (224, 224)
MIN_SIZE = 32
CLASSES = 1000
HEAD_FILTERS = 1280

IMAGENET_WEIGHTS = Path(__file__).parent / "weights" / "efficientnet_lite0_imagenet.weights.h5"
IMAGENET_SHA256 = "ddd4b5c35cf9540eba3b4165336bf72ebb97f439adbe688a1edea99d6eb1603a"

# (repeats, filters, expansion, kernel, stride of the first block)
STAGES = (
    (1, 16, 1, 3, 1),
    (2, 24, 6, 3, 2),
    (2, 40, 6, 5, 2),
    (3, 80, 6, 3, 2),
    (3, 112, 6, 5, 1),
    (4, 192, 6, 5, 2),
    (1, 320, 6, 3, 1),
)


def preprocess_input(images: Any) -> Any:
    """Normalises raw 0..255 float32 images: (pixel - 127) / 128, as the model was trained."""
    return (images - 127.0) / 128.0


def preprocess_input_pytorch(images: Any) -> Any:
    """Normalises raw 0..255 float32 images as the published weights with even padding want it."""
    return (images / 255.0 - 0.498) / 0.502


def build_model(input_size: tuple[int, int] = INPUT_SIZE, name: str = NAME) -> Any:
    """The Keras model from normalised images [b, h, w, 3] to 1000 ImageNet logits.

    `name` decides the padding. The weights are freshly initialised. The last feature map is the
    output of layer `head`. Every layer is named, for a saved file holds the names, and its bytes
    must not depend on what a process built before.
    """
    layers = import_keras().layers
    even = name == PYTORCH_NAME
    inputs = layers.Input((*input_size, 3), name="images")
    x, padding = _pad(inputs, 3, 2, even, "stem_pad")
    x = layers.Conv2D(32, 3, strides=2, padding=padding, use_bias=False, name="stem_conv")(x)
    x = _norm_relu6(x, "stem_bn")
    block = 0
    for repeats, filters, expansion, kernel, first_stride in STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            x = _inverted_residual(x, f"b{block}", filters, expansion, kernel, stride, even)
            block += 1
    x = layers.Conv2D(HEAD_FILTERS, 1, padding="same", use_bias=False, name="head_conv")(x)
    x = _norm_relu6(x, "head_bn", name="head")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = layers.Dense(CLASSES, name="logits")(x)
    return import_keras().Model(inputs, outputs, name=name)


def verify_imagenet_weights(path: Path = IMAGENET_WEIGHTS) -> None:
    """Checks that the shipped weights are the published ones, by SHA-256.

    Raises:
        KithError: the file is missing or has other bytes.
    """
    if not path.is_file():
        raise KithError(
            f"The ImageNet weights of {NAME} are missing: {path} is not a file. "
            "Install Kith again, or restore the file from the repository."
        )
    digest = sha256_of_file(path)
    if digest != IMAGENET_SHA256:
        raise KithError(
            f"The ImageNet weights of {NAME} are damaged: {path} has SHA-256 {digest}, "
            f"wanted {IMAGENET_SHA256}. Install Kith again, or restore the file from the "
            "repository."
        )


def _pad(x: Any, kernel: int, stride: int, even: bool, name: str) -> tuple[Any, str]:
    """What the convolution takes, and how it pads by itself; with stride 1 both ways are one."""
    if not even or stride == 1:
        return x, "same"
    return import_keras().layers.ZeroPadding2D((kernel - 1) // 2, name=name)(x), "valid"


def _norm_relu6(x: Any, norm_name: str, name: str | None = None) -> Any:
    layers = import_keras().layers
    x = layers.BatchNormalization(epsilon=1e-3, name=norm_name)(x)
    return layers.ReLU(max_value=6, name=name or f"{norm_name}_relu")(x)


def _inverted_residual(
    x: Any, name: str, filters: int, expansion: int, kernel: int, stride: int, even: bool
) -> Any:
    layers = import_keras().layers
    inputs, in_filters = x, x.shape[-1]
    if expansion != 1:
        x = layers.Conv2D(
            in_filters * expansion, 1, padding="same", use_bias=False, name=f"{name}_expand_conv"
        )(x)
        x = _norm_relu6(x, f"{name}_expand_bn")
    x, padding = _pad(x, kernel, stride, even, f"{name}_pad")
    x = layers.DepthwiseConv2D(
        kernel, strides=stride, padding=padding, use_bias=False, name=f"{name}_dw"
    )(x)
    x = _norm_relu6(x, f"{name}_dw_bn")
    x = layers.Conv2D(filters, 1, padding="same", use_bias=False, name=f"{name}_project_conv")(x)
    x = layers.BatchNormalization(epsilon=1e-3, name=f"{name}_project_bn")(x)
    if stride == 1 and in_filters == filters:
        x = layers.Add(name=f"{name}_add")([inputs, x])
    return x


def _load(spec: EncoderSpec) -> Network:
    path = spec.weights_path()
    if spec.weights == "imagenet":
        path = IMAGENET_WEIGHTS
        verify_imagenet_weights(path)
    size = _input_size(spec)
    with seeded_initialisation(spec.seed):
        model = build_model(size, spec.name)
    if path is not None:
        remedy = (
            "Set encoder.weights to a .weights.h5 file saved from this very architecture, or "
            f"encoder.name: {NAME} and encoder.weights: imagenet."
        )
        load_weights_file(model, spec.name, path, remedy)
    features = import_keras().Model(model.input, model.get_layer("head").output)
    return Network(
        size,
        preprocess_input if spec.name == NAME else preprocess_input_pytorch,
        lambda images: features(images, training=False),
        variables=features.variables,
    )


def _input_size(spec: EncoderSpec) -> tuple[int, int]:
    return spec.input_size or INPUT_SIZE


def _check(spec: EncoderSpec) -> None:
    check_network_spec(spec, MIN_SIZE)
    if spec.name == PYTORCH_NAME and spec.weights == "imagenet":
        raise ConfigError(
            f"encoder.weights is imagenet, but no weights of {PYTORCH_NAME} ship with Kith. Set it "
            "to a file that kith convert-weights wrote, or set encoder.name: efficientnet_lite0."
        )


def _weights_id(spec: EncoderSpec) -> str:
    return network_weights_id(spec, f"sha256:{IMAGENET_SHA256}")


def _family(name: str) -> EncoderFamily:
    return EncoderFamily(
        name=name,
        check=_check,
        input_size=_input_size,
        preprocessing_id=lambda spec: spec.name,
        weights_id=_weights_id,
        load=_load,
    )


FAMILY = _family(NAME)
PYTORCH_FAMILY = _family(PYTORCH_NAME)
