"""A product for the join that rounds its inputs to bfloat16: an example of the plug-in.

OpenVINO multiplies in bfloat16 on AMX or AVX512-BF16, sums in float32 and hands out float32. The join
takes it with `JoinSpec(k, product=BFloat16Product(threads))`, and finds the same neighbours.
"""

import dataclasses
import threading

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import ConfigError
from transforms.encoders.engines.openvino_engine import import_openvino

openvino = import_openvino()

# OpenVINO compiles a kernel for every new shape; steps leave it few.
_STEP = 64


@dataclasses.dataclass(frozen=True, eq=False)
class _Scratch:
    """A thread's own arrays of one shape: rows beyond those that are asked for hold anything."""

    queries: NDArray[np.float32]
    corpus: NDArray[np.float32]
    out: NDArray[np.float32]

    @staticmethod
    def of(thread: threading.local, m: int, n: int, dim: int) -> "_Scratch":
        """Returns a thread's arrays of a shape, in memory that all shapes share."""
        sizes = (m * dim, n * dim, m * n)
        kept = thread.__dict__.get("memory")
        if kept is None or any(len(each) < size for each, size in zip(kept, sizes, strict=True)):
            old = (0, 0, 0) if kept is None else [len(each) for each in kept]
            kept = [np.zeros(max(pair), np.float32) for pair in zip(old, sizes, strict=True)]
            thread.memory = kept
        shapes = ((m, dim), (n, dim), (m, n))
        arrays = (
            each[:size].reshape(shape) for each, size, shape in zip(kept, sizes, shapes, strict=True)
        )
        return _Scratch(*arrays)


class BFloat16Product:
    """Multiplies for as many threads at once as there are streams, one core each.

    Raises ConfigError on a CPU for which OpenVINO has no bfloat16.
    """

    name = "openvino bfloat16"
    # 8 bits of significand.
    unit_roundoff = 2.0**-8

    def __init__(self, threads: int) -> None:
        self._core = openvino.Core()
        found = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in found:
            raise ConfigError(
                f"OpenVINO has no bfloat16 on this CPU, only {', '.join(found)}. Use float32."
            )
        self._config = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
        }
        self._models: dict[int, openvino.CompiledModel] = {}
        self._compiling = threading.Lock()
        self._thread = threading.local()

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Writes queries [m, d] times corpus [n, d] transposed to out [m, n], all C-contiguous."""
        (m, dim), n = queries.shape, len(corpus)
        wide = _Scratch.of(self._thread, -(-m // _STEP) * _STEP, -(-n // _STEP) * _STEP, dim)
        wide.queries[:m], wide.corpus[:n] = queries, corpus
        request = self._request(dim)
        request.set_output_tensor(openvino.Tensor(wide.out, shared_memory=True))
        request.infer([wide.queries, wide.corpus], share_inputs=True, share_outputs=True)
        out[:] = wide.out[:m, :n]

    def _request(self, dim: int) -> openvino.InferRequest:
        """Returns the calling thread's own request."""
        requests: dict[int, openvino.InferRequest] = self._thread.__dict__.setdefault("requests", {})
        if dim not in requests:
            with self._compiling:
                if dim not in self._models:
                    sides = [openvino.opset13.parameter([-1, dim], np.float32) for _ in range(2)]
                    product = openvino.opset13.matmul(*sides, False, True)
                    model = openvino.Model([product], sides)
                    self._models[dim] = self._core.compile_model(model, "CPU", self._config)
            requests[dim] = self._models[dim].create_infer_request()
        return requests[dim]
