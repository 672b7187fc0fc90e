"""A user's own model, a `.keras` file or a SavedModel folder, as an encoder."""

import json
import zipfile
from pathlib import Path
from typing import Any

from index_builder.errors import ConfigError, KithError
from transforms.encoders import efficientnet_lite0, keras_applications
from transforms.encoders.family import EncoderFamily, EncoderSpec, Network
from transforms.encoders.keras_runtime import (
    import_keras,
    import_tensorflow,
    output_to_stderr,
)
from transforms.encoders.weights_files import check_weights_path, file_weights_id

NAME = "custom"
SIGNATURE = "serving_default"

# The modes of keras.applications.imagenet_utils.preprocess_input.
KERAS_MODES = ("tf", "torch", "caffe")
APPLICATIONS = {application.name: application for application in keras_applications.APPLICATIONS}
PREPROCESSINGS = (
    "none",
    *KERAS_MODES,
    efficientnet_lite0.NAME,
    efficientnet_lite0.PYTORCH_NAME,
    *APPLICATIONS,
)


def normaliser(preprocessing: str) -> Any:
    """The function from raw 0..255 float32 RGB images [b, h, w, 3] to the model's input."""
    if preprocessing == "none":
        return lambda images: images
    if preprocessing == efficientnet_lite0.NAME:
        return efficientnet_lite0.preprocess_input
    if preprocessing == efficientnet_lite0.PYTORCH_NAME:
        return efficientnet_lite0.preprocess_input_pytorch
    if preprocessing in APPLICATIONS:
        return keras_applications.preprocess_input(APPLICATIONS[preprocessing])
    preprocess_input = import_keras().applications.imagenet_utils.preprocess_input
    return lambda images: preprocess_input(images, mode=preprocessing)


def _check(spec: EncoderSpec) -> None:
    if spec.weights_path() is None:
        raise ConfigError(
            f"encoder.name is custom and encoder.weights is {spec.weights!r}, but a custom "
            "encoder is a model of your own. Set encoder.weights to a .keras file or to a "
            "SavedModel folder."
        )
    path = check_weights_path(spec)
    is_saved_model = path.is_dir() and (path / "saved_model.pb").is_file()
    if not is_saved_model and (path.is_dir() or path.suffix != ".keras"):
        raise ConfigError(
            f"encoder.weights is {spec.weights!r}, but a custom encoder is a .keras file or a "
            "SavedModel folder (one with saved_model.pb in it). Save the model with "
            "model.save('name.keras') or model.export('folder')."
        )
    if spec.preprocessing not in PREPROCESSINGS:
        raise ConfigError(
            f"encoder.preprocessing is {spec.preprocessing!r}, but a custom encoder needs the "
            f"normalisation that it was trained with. Set one of: {', '.join(PREPROCESSINGS)}."
        )
    if spec.input_size is not None and min(spec.input_size) < 1:
        raise ConfigError(
            f"encoder.input_size is {list(spec.input_size)}. Set [height, width], both at least 1."
        )


def _input_size(spec: EncoderSpec) -> tuple[int, int]:
    path = Path(spec.weights).expanduser()
    if path.is_dir():
        return spec.input_size or _settle_size(spec, _saved_model(path).inputs[0].shape.as_list())
    return _settle_size(spec, _keras_file_input_shape(path))


def _keras_file_input_shape(path: Path) -> list[int | None] | None:
    """The input shape that a .keras file states, read without Keras; None where it states none."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise ConfigError(
            f"encoder.weights is {str(path)!r}, but it is no .keras file: {error}. "
            "Save the model again with model.save('name.keras')."
        ) from error
    layers = config.get("config", {}).get("layers") or []
    shapes = [layer.get("config", {}).get("batch_shape") for layer in layers]
    stated = [shape for shape in shapes if shape]
    shape: list[int | None] | None = stated[0] if stated else None
    return shape or config.get("build_config", {}).get("input_shape")


def _settle_size(spec: EncoderSpec, shape: list[int | None] | None) -> tuple[int, int]:
    """The (height, width) on which the model's input shape [b, h, w, 3] and the spec agree."""
    if shape is not None and (len(shape) != 4 or shape[3] not in (3, None)):
        raise ConfigError(
            f"encoder.weights is {spec.weights!r}, whose input has shape {shape}, but an encoder "
            "takes RGB images [batch, height, width, 3]. Save a model with such an input."
        )
    height, width = (shape[1], shape[2]) if shape is not None else (None, None)
    if spec.input_size is None:
        if height is None or width is None:
            raise ConfigError(
                f"encoder.input_size is not set, and the model {spec.weights!r} does not fix its "
                "input size. Set encoder.input_size: [height, width]."
            )
        return height, width
    if (height or spec.input_size[0], width or spec.input_size[1]) != spec.input_size:
        raise ConfigError(
            f"encoder.input_size is {list(spec.input_size)}, but the model {spec.weights!r} takes "
            f"{[height, width]}. Remove encoder.input_size."
        )
    return spec.input_size


def _load(spec: EncoderSpec) -> Network:
    path = Path(spec.weights).expanduser()
    size = _input_size(spec)
    assert spec.preprocessing is not None  # _check has refused None.
    normalise = normaliser(spec.preprocessing)
    if path.is_dir():
        return Network(size, normalise, _saved_model_features(path), freeze=False)
    model = _keras_model(path)
    return Network(
        size, normalise, lambda images: model(images, training=False), variables=model.variables
    )


def _keras_model(path: Path) -> Any:
    keras = import_keras()
    with output_to_stderr():
        try:
            model = keras.saving.load_model(path, compile=False)
        except (ValueError, TypeError, OSError, KeyError) as error:
            raise KithError(
                f"The model {path} cannot be loaded: {error}. Save it with this Keras "
                f"({keras.__version__}), of built-in layers only, or export it as a "
                "SavedModel."
            ) from error
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise KithError(
            f"The model {path} has {len(model.inputs)} inputs and {len(model.outputs)} outputs, "
            "but an encoder has one of each. Save a model from its image input to the layer "
            "that is to be the vector."
        )
    wanted = keras.config.dtype_policy()
    if wanted.compute_dtype != "float32":
        for layer in model._flatten_layers(include_self=False):  # the file names float32 for each
            layer.dtype_policy = wanted
    return model


def _saved_model(path: Path) -> Any:
    """The serving function of a SavedModel: one image input, one output."""
    tf = import_tensorflow()
    try:
        loaded = tf.saved_model.load(str(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise KithError(
            f"The SavedModel {path} cannot be loaded: {error}. Export it again with "
            "model.export('folder')."
        ) from error
    if SIGNATURE not in loaded.signatures:
        raise KithError(
            f"The SavedModel {path} has the signatures {sorted(loaded.signatures)}, but not "
            f"{SIGNATURE!r}. Export it with model.export('folder')."
        )
    function = loaded.signatures[SIGNATURE]
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1 or len(function.structured_outputs) != 1:
        raise KithError(
            f"The SavedModel {path} has the inputs {sorted(inputs)} and the outputs "
            f"{sorted(function.structured_outputs)}, but an encoder has one of each. "
            "Export a model from its image input to the layer that is to be the vector."
        )
    function.kith_keep_alive = loaded  # The signature holds its variables only weakly.
    return function


def _saved_model_features(path: Path) -> Any:
    function = _saved_model(path)
    (input_name,) = function.structured_input_signature[1]
    (output_name,) = function.structured_outputs
    return lambda images: function(**{input_name: images})[output_name]


FAMILY = EncoderFamily(
    name=NAME,
    check=_check,
    input_size=_input_size,
    preprocessing_id=lambda spec: str(spec.preprocessing),
    weights_id=lambda spec: file_weights_id(Path(spec.weights).expanduser()),
    load=_load,
)
