"""OpenVINO: the fastest engine on CPUs, above all in bfloat16 on those with AMX."""

import os
import queue
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.engines.engine import EncodingError, UnsupportedModelError, cpu_streams
from transforms.encoders.engines.tensorflow_engine import freeze
from transforms.encoders.family import Network

_DEVICE = "CPU"
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoEngine:
    """A network compiled by OpenVINO; see Engine.

    Every stream is a core (or a few) working on a batch of its own, so no core waits for another.
    """

    def __init__(self, compiled: Any, batch_size: int, streams: int) -> None:
        self.batch_size = batch_size
        self.dim = int(compiled.output(0).get_partial_shape()[1].get_length())
        self.streams = streams
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(compiled.create_infer_request())

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps uint8 [batch_size, h, w, 3] to float32 [batch_size, dim]."""
        request = self._requests.get()
        try:
            request.infer([images], share_inputs=True)
            vectors: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        except RuntimeError as error:
            raise EncodingError(str(error)) from error
        finally:
            self._requests.put(request)
        return vectors


def load_openvino(
    load: Callable[[], Network], pooling: str, batch_size: int, choice: EngineChoice
) -> OpenVinoEngine:
    """Converts the network's frozen TensorFlow graph and compiles it for batches of `batch_size`.

    Raises UnsupportedModelError for a model that OpenVINO cannot convert.
    """
    openvino = import_openvino()
    network = load()
    if not network.freeze:
        raise UnsupportedModelError(
            "encoder.engine is openvino, which takes networks whose variables can be folded into "
            "the graph; a SavedModel need not have that. Set encoder.engine: tensorflow."
        )
    function = freeze(network, pooling, batch_size)
    try:
        model = _convert(function.graph)
        threads = len(os.sched_getaffinity(0))
        streams = cpu_streams()
        compiled = openvino.Core().compile_model(
            model,
            _DEVICE,
            {
                "INFERENCE_PRECISION_HINT": _HINTS[choice.precision],
                "NUM_STREAMS": streams,
                "INFERENCE_NUM_THREADS": threads,
            },
        )
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"encoder.engine is openvino, which cannot compile this model: {error}. Set "
            "encoder.engine: tensorflow."
        ) from error
    return OpenVinoEngine(compiled, batch_size, streams)


def import_openvino() -> Any:
    """Imports OpenVINO without its telemetry, which would report each import to a server.

    That is done in a process forked from a thread beside other imports: it looks for the internet,
    outlives a killed worker, and now and then it waits for a lock of the imports for ever.
    """
    # With None in its place an import fails, and OpenVINO goes on without.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _convert(graph: Any) -> Any:
    """Converts a TensorFlow graph to an OpenVINO model: what `openvino.convert_model` does of it."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.tensorflow.graph_iterator import GraphIteratorTFGraph

    frontend = FrontEndManager().load_by_framework("tf")
    nodes = GraphIteratorTFGraph(graph, True)  # to be kept until the conversion is over
    loaded = frontend.load(nodes)
    return frontend.convert(loaded)
