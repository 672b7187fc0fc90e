"""EfficientNet-Lite0 in PyTorch: what its ports call the tensors, and what Keras makes of them.

Two ports are known by their names:

- `flat`: one list of blocks (`_conv_stem`, `_blocks.0._depthwise_conv`, `_fc`), after
  EfficientNet-PyTorch by Luke Melas-Kyriazi. It pads as TensorFlow does; the weights that ship
  with Kith were copied from it. It is `efficientnet_lite0`.
- `staged`: blocks by stage (`stem.0`, `blocks.0.0._depthwise_conv`, `fc`), as RangiLyu's
  EfficientNet-Lite. Its convolutions of stride 2 pad both sides alike and its published weights
  were trained so: other numbers come out of the same weights with TensorFlow's padding. It is
  `efficientnet_lite0_pytorch`.

The names of `timm` are refused: it publishes weights of both paddings, one with another epsilon,
under the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import KithError
from transforms.encoders import efficientnet_lite0

NETWORKS = (efficientnet_lite0.NAME, efficientnet_lite0.PYTORCH_NAME)

# How the names of our layers end, and what both ports call those layers in a block.
_IN_BLOCK = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "dw": "_depthwise_conv",
    "dw_bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}
# From PyTorch's order of axes to Keras's.
_AXES: dict[str, tuple[int, ...]] = {
    "Conv2D": (2, 3, 1, 0),
    "DepthwiseConv2D": (2, 3, 0, 1),
    "Dense": (1, 0),
}
_SHOWN = 4


@dataclass(frozen=True)
class Port:
    """A way to name the tensors; `layers` gives the PyTorch module of each of our layers."""

    name: str
    network: str
    layers: Mapping[str, str]


def _flat() -> Port:
    layers = {"stem_conv": "_conv_stem", "stem_bn": "_bn0"}
    block = 0
    for repeats, _, expansion, _, _ in efficientnet_lite0.STAGES:
        for _ in range(repeats):
            layers |= _block(f"b{block}", f"_blocks.{block}", expansion)
            block += 1
    layers |= {"head_conv": "_conv_head", "head_bn": "_bn1", "logits": "_fc"}
    return Port("flat", efficientnet_lite0.NAME, layers)


def _staged() -> Port:
    layers = {"stem_conv": "stem.0", "stem_bn": "stem.1"}
    block = 0
    for stage, (repeats, _, expansion, _, _) in enumerate(efficientnet_lite0.STAGES):
        for repeat in range(repeats):
            layers |= _block(f"b{block}", f"blocks.{stage}.{repeat}", expansion)
            block += 1
    layers |= {"head_conv": "head.0", "head_bn": "head.1", "logits": "fc"}
    return Port("staged", efficientnet_lite0.PYTORCH_NAME, layers)


def _block(ours: str, theirs: str, expansion: int) -> dict[str, str]:
    return {
        f"{ours}_{end}": f"{theirs}.{module}"
        for end, module in _IN_BLOCK.items()
        if expansion != 1 or not end.startswith("expand")
    }


PORTS = (_flat(), _staged())


def find_port(tensors: Mapping[str, Any]) -> Port:
    """The port whose names these are.

    Raises:
        KithError: names are missing or left over; those of the nearest port are listed.
    """
    found = {name for name in tensors if not name.endswith(".num_batches_tracked")}
    port = max(PORTS, key=lambda port: len(found & set(_tensor_names(port))))
    wanted = set(_tensor_names(port))
    if found != wanted:
        raise KithError(
            f"The weights are not those of an EfficientNet-Lite0 whose tensors are named like "
            f"{port.layers['stem_conv']}.weight: missing {_listed(wanted - found)}; "
            f"unexpected {_listed(found - wanted)}. Give the state dict of such a network, with "
            "its 1000 classes."
        )
    return port


def set_weights(model: Any, port: Port, tensors: Mapping[str, NDArray[Any]]) -> int:
    """Gives our Keras model the tensors of a port, each exactly once; returns how many.

    Convolutions go from [out, in, h, w] to [h, w, in, out], depthwise ones to [h, w, in, 1] and the
    logits from [out, in] to [in, out].

    Raises:
        KithError: a tensor has another shape, no floating-point numbers, or NaN or infinite ones.
    """
    used = 0
    for layer in model.layers:
        if not layer.weights:
            continue
        names = _layer_tensors(type(layer).__name__, port.layers[layer.name])
        layer.set_weights(
            [
                _to_keras(name, tensors[name], type(layer).__name__, tuple(weight.shape))
                for name, weight in zip(names, layer.weights, strict=True)
            ]
        )
        used += len(names)
    return used


def _to_keras(
    name: str, tensor: NDArray[Any], layer: str, wanted: tuple[int, ...]
) -> NDArray[np.float32]:
    axes = _AXES[layer] if len(wanted) > 1 else (0,)
    shape = tuple(wanted[axes.index(axis)] for axis in range(len(axes)))
    if tensor.shape != shape:
        raise KithError(
            f"The tensor {name} has shape {list(tensor.shape)}, wanted {list(shape)}. These are the "
            "weights of another network, or of one with other classes than ImageNet's 1000."
        )
    if not np.issubdtype(tensor.dtype, np.floating) or not np.isfinite(tensor).all():
        raise KithError(
            f"The tensor {name} ({tensor.dtype}) holds other than finite floating-point numbers. "
            "Give weights as they were trained, neither quantised nor diverged."
        )
    return np.ascontiguousarray(tensor.transpose(axes), np.float32)


def _layer_tensors(layer: str, module: str) -> list[str]:
    """The names of a layer's tensors, in the order of Keras's own."""
    if layer == "BatchNormalization":
        ends = ["weight", "bias", "running_mean", "running_var"]
    else:
        ends = ["weight", "bias"] if layer == "Dense" else ["weight"]
    return [f"{module}.{end}" for end in ends]


def _tensor_names(port: Port) -> list[str]:
    names = []
    for ours, module in port.layers.items():
        layer = "BatchNormalization" if ours.endswith("_bn") else "Conv2D"
        names += _layer_tensors("Dense" if ours == "logits" else layer, module)
    return names


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN]) or "none"
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
