"""Pooling: how the last feature map becomes a vector. Written in Keras, for every engine."""

from typing import Any

from index_builder.errors import KithError
from transforms.encoders.keras_runtime import import_keras

# Generalised mean: p of the trained models, and the floor that keeps the root differentiable, of
# Radenovic, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation" (2018).
_GEM_POWER = 3.0
_GEM_FLOOR = 1e-6


def pool(features: Any, pooling: str) -> Any:
    """Turns a feature map [b, h, w, c] into vectors [b, dim]; vectors [b, dim] stay as they are.

    `avg` and `max` over the positions, `gem` their generalised mean with power 3 (between the two;
    negative features count as zero), `flatten` row-major as Keras's Flatten.

    Raises:
        KithError: the network's output has another rank or an unknown size.
    """
    ops = import_keras().ops
    shape = tuple(features.shape)
    if len(shape) not in (2, 4) or None in shape[1:]:
        raise KithError(
            f"The encoder's output has shape {shape}, but must be vectors [batch, dim] or a "
            "feature map [batch, height, width, channels] of known size. Save the model without "
            "the layers that make it so, and with a fixed input size."
        )
    if len(shape) == 2:
        return features
    if pooling == "avg":
        return ops.mean(features, axis=(1, 2))
    if pooling == "max":
        return ops.max(features, axis=(1, 2))
    if pooling == "gem":
        powers = ops.power(ops.maximum(ops.cast(features, "float32"), _GEM_FLOOR), _GEM_POWER)
        return ops.power(ops.mean(powers, axis=(1, 2)), 1.0 / _GEM_POWER)
    return ops.reshape(features, (shape[0], shape[1] * shape[2] * shape[3]))
