"""TensorFlow: the engine that runs everywhere. On a CPU a frozen graph, on a GPU compiled by XLA."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transforms.encoders.engines.choice import EngineChoice, visible_gpus
from transforms.encoders.engines.engine import EncodingError, OutOfMemoryError
from transforms.encoders.family import Network
from transforms.encoders.keras_runtime import compute_precision, import_tensorflow
from transforms.encoders.pooling import pool

# oneDNN's bfloat16 is an option of the process that counts when a function is called, not made.
_BFLOAT16_OPTION = "auto_mixed_precision_onednn_bfloat16"

# Transfers and the next batch's preparation overlap with the batch that the GPU works on.
_GPU_STREAMS = 2


class TensorFlowEngine:
    """A network as a TensorFlow function; see Engine.

    On a CPU one in bfloat16 and one in float32 may take turns in a process, but not run at once.
    """

    def __init__(self, function: Any, batch_size: int, streams: int, bfloat16_on_cpu: bool) -> None:
        self._function = function
        self._tensorflow = import_tensorflow()
        self._precision = _bfloat16_on_cpu if bfloat16_on_cpu else contextlib.nullcontext
        self.batch_size = batch_size
        self.dim = int(function.outputs[0].shape[-1])
        self.streams = streams

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps uint8 [batch_size, h, w, 3] to float32 [batch_size, dim]."""
        errors = self._tensorflow.errors
        try:
            with self._precision():
                outputs = self._function(self._tensorflow.constant(images))
            vectors: NDArray[np.float32] = outputs[0].numpy()
        except errors.ResourceExhaustedError as error:
            raise OutOfMemoryError(str(error)) from error
        except errors.OpError as error:
            raise EncodingError(str(error)) from error
        return vectors


def load_tensorflow(
    load: Callable[[], Network], pooling: str, batch_size: int, choice: EngineChoice
) -> TensorFlowEngine:
    """Loads a network and compiles it for batches of `batch_size`.

    On a GPU Keras computes in the wanted precision and XLA compiles the whole network, with
    TensorFloat-32 off for float32. On a CPU the graph is frozen where the network allows it
    (TensorFlow then folds batch normalisation into the convolutions, which made EfficientNet-Lite0
    1.5 times faster on two cores), and oneDNN computes in bfloat16 what it deems safe.
    """
    if not visible_gpus():
        function = freeze(load(), pooling, batch_size)
        engine = TensorFlowEngine(function, batch_size, 1, choice.precision == "bfloat16")
        engine.run(_blank(function))
        return engine
    tf = import_tensorflow()
    tf.config.experimental.enable_tensor_float_32_execution(choice.precision != "float32")
    with compute_precision(choice.precision):
        function = trace(load(), pooling, batch_size, jit_compile=True)
    engine = TensorFlowEngine(function, batch_size, _GPU_STREAMS, False)
    engine.run(_blank(function))
    return engine


def trace(network: Network, pooling: str, batch_size: int, jit_compile: bool | None = None) -> Any:
    """The concrete function from uint8 [batch_size, h, w, 3] to [float32 [batch_size, dim]]."""
    tf = import_tensorflow()

    def encode(images: Any) -> Any:
        features = network.features(network.normalise(tf.cast(images, tf.float32)))
        return [tf.cast(pool(features, pooling), tf.float32)]

    signature = tf.TensorSpec((batch_size, *network.input_size, 3), tf.uint8)
    function = tf.function(encode, autograph=False, jit_compile=jit_compile)
    return function.get_concrete_function(signature)


def freeze(network: Network, pooling: str, batch_size: int) -> Any:
    """The concrete function of `trace`, its variables folded in where the network allows it."""
    function = trace(network, pooling, batch_size)
    if not network.freeze:
        return function
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    return convert_variables_to_constants_v2(function)


def _blank(function: Any) -> NDArray[np.uint8]:
    return np.zeros(function.inputs[0].shape.as_list(), np.uint8)


@contextlib.contextmanager
def _bfloat16_on_cpu() -> Iterator[None]:
    """Lets oneDNN compute in bfloat16 what is called inside, and nothing else of the process."""
    optimizer = import_tensorflow().config.optimizer
    optimizer.set_experimental_options({_BFLOAT16_OPTION: True})
    try:
        yield
    finally:
        optimizer.set_experimental_options({_BFLOAT16_OPTION: False})
