"""JAX: Keras on its JAX backend, compiled by XLA; the second way on a GPU.

Keras has one backend a process, so a worker that runs this engine runs no other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.engines.engine import EncodingError, OutOfMemoryError
from transforms.encoders.family import Network
from transforms.encoders.keras_runtime import compute_precision, import_keras
from transforms.encoders.pooling import pool

_STREAMS = 2


class JaxEngine:
    """A network compiled by XLA through JAX; see Engine."""

    def __init__(self, compiled: Callable[[Any], Any], batch_size: int, dim: int) -> None:
        self._compiled = compiled
        self.batch_size = batch_size
        self.dim = dim
        self.streams = _STREAMS

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps uint8 [batch_size, h, w, 3] to float32 [batch_size, dim]."""
        try:
            vectors: NDArray[np.float32] = np.asarray(self._compiled(images))
        except RuntimeError as error:  # jaxlib's XlaRuntimeError is one
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemoryError(str(error)) from error
            raise EncodingError(str(error)) from error
        return vectors


def load_jax(
    load: Callable[[], Network], pooling: str, batch_size: int, choice: EngineChoice
) -> JaxEngine:
    """Loads the network and compiles it for batches of `batch_size`.

    The weights are arguments of the compiled function, for as constants XLA would try to fold them.
    Float32 products are computed in full, without TensorFloat-32.
    """
    import jax

    keras = import_keras()
    with compute_precision(choice.precision):
        network = load()
    variables = list(network.variables)
    precision = "highest" if choice.precision == "float32" else "default"

    def encode(values: list[Any], images: Any) -> Any:
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping), jax.default_matmul_precision(precision):
            features = network.features(network.normalise(images.astype("float32")))
            return pool(features, pooling).astype("float32")

    shape = (batch_size, *network.input_size, 3)
    values = [variable.value for variable in variables]
    images = jax.ShapeDtypeStruct(shape, np.uint8)
    dim = int(jax.eval_shape(encode, values, images).shape[1])
    compiled = jax.jit(encode).lower(values, images).compile()
    return JaxEngine(lambda batch: compiled(values, batch), batch_size, dim)
