"""A loaded encoder: batches of 8-bit images in, float32 vectors out, on TensorFlow."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import KithError
from transforms.encoders.family import Network
from transforms.encoders.keras_runtime import import_tensorflow


class Encoder:
    """One network, compiled once for batches of a fixed size; one caller at a time.

    `dim` is the length of a vector, `input_size` the (height, width) of the images it takes.
    """

    def __init__(self, network: Network, pooling: str, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
        self.input_size = network.input_size
        self.batch_size = batch_size
        self._function = _compile(network, pooling, batch_size)
        self.dim = int(self._function.outputs[0].shape[-1])

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encodes uint8 [b, h, w, 3] (RGB, b at most the batch size) to float32 [b, dim].

        The vectors are the network's own, neither normalised nor checked for NaN.

        Raises:
            ValueError: the images have another shape or type.
        """
        height, width = self.input_size
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)} but the encoder takes uint8 "
                f"[b, {height}, {width}, 3]."
            )
        count = len(images)
        if count > self.batch_size:
            raise ValueError(
                f"images holds {count} images but the encoder was compiled for at most "
                f"{self.batch_size}."
            )
        if count < self.batch_size:
            padding = np.zeros((self.batch_size - count, height, width, 3), np.uint8)
            images = np.concatenate([images, padding])
        outputs = self._function(import_tensorflow().constant(images))
        vectors: NDArray[np.float32] = outputs[0].numpy()
        return vectors[:count]


def _compile(network: Network, pooling: str, batch_size: int) -> Any:
    """The concrete function from uint8 [batch_size, h, w, 3] to [float32 [batch_size, dim]].

    Frozen where the network allows it: TensorFlow then folds batch normalisation into the
    convolutions, which made EfficientNet-Lite0 1.5 times faster on two cores.
    """
    tf = import_tensorflow()

    def encode(images: Any) -> Any:
        features = network.features(network.normalise(tf.cast(images, tf.float32)))
        return [tf.cast(pool(features, pooling), tf.float32)]

    signature = tf.TensorSpec((batch_size, *network.input_size, 3), tf.uint8)
    function = tf.function(encode, autograph=False).get_concrete_function(signature)
    if not network.freeze:
        return function
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    return convert_variables_to_constants_v2(function)


def pool(features: Any, pooling: str) -> Any:
    """Turns a feature map [b, h, w, c] into vectors [b, dim]; vectors [b, dim] stay as they are.

    `flatten` is row-major, as Keras's Flatten.

    Raises:
        KithError: the network's output has another rank or an unknown size.
    """
    tf = import_tensorflow()
    shape = features.shape
    if shape.rank not in (2, 4) or None in shape[1:].as_list():
        raise KithError(
            f"The encoder's output has shape {shape}, but must be vectors [batch, dim] or a "
            "feature map [batch, height, width, channels] of known size. Save the model without "
            "the layers that make it so, and with a fixed input size."
        )
    if shape.rank == 2:
        return features
    if pooling == "avg":
        return tf.reduce_mean(features, axis=(1, 2))
    if pooling == "max":
        return tf.reduce_max(features, axis=(1, 2))
    return tf.reshape(features, (shape[0], shape[1] * shape[2] * shape[3]))
