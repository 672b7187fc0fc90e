"""A fast bfloat16 product for joins, by OpenVINO: it uses AMX or AVX512-BF16 where the CPU has them.

Inputs are rounded to bfloat16, sums are float32, and so is the output. The join scores exactly whatever
comes near the threshold, with the larger error bound of rounded inputs, so its result is the same.
"""

import dataclasses
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

# OpenVINO prepares its kernels for each shape, so tiles are padded to few different ones.
_PADDING = 64


@dataclasses.dataclass(frozen=True)
class Bfloat16Product:
    """index_builder.products.Product in bfloat16, in the caller's thread."""

    name: str = "openvino bfloat16"
    unit_roundoff: float = 2.0**-8

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Writes queries [m, d] times corpus [n, d] transposed to out [m, n]."""
        _compiled(queries.shape[1]).multiply(queries, corpus, out)


_THREAD = threading.local()


def _compiled(dim: int) -> "_Compiled":
    """Returns this thread's product of a dimension; two threads cannot share a request."""
    found: dict[int, _Compiled] = _THREAD.__dict__.setdefault("compiled", {})
    if dim not in found:
        found[dim] = _Compiled(dim)
    return found[dim]


class _Compiled:
    def __init__(self, dim: int) -> None:
        import openvino
        from openvino import opset13

        sides = [opset13.parameter([-1, dim], np.float32) for _ in range(2)]
        product = opset13.matmul(sides[0], sides[1], False, True)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        model = openvino.Model([product], sides)
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        self._tensor: Any = openvino.Tensor
        self._dim = dim
        self._queries = np.zeros((0, dim), dtype=np.float32)
        self._corpus = np.zeros((0, dim), dtype=np.float32)

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        self._queries = _padded(queries, self._queries)
        self._corpus = _padded(corpus, self._corpus)
        m, n = _padded_rows(len(queries)), _padded_rows(len(corpus))
        self._request.set_input_tensor(0, self._tensor(self._queries[:m], shared_memory=True))
        self._request.set_input_tensor(1, self._tensor(self._corpus[:n], shared_memory=True))
        self._request.infer()
        out[:] = self._request.get_output_tensor(0).data[: len(queries), : len(corpus)]


def _padded_rows(rows: int) -> int:
    return -(-rows // _PADDING) * _PADDING


def _padded(rows: NDArray[np.float32], buffer: NDArray[np.float32]) -> NDArray[np.float32]:
    """Copies rows to a buffer of at least the padded size; what follows them is of no account."""
    if len(buffer) < _padded_rows(len(rows)):
        buffer = np.zeros((_padded_rows(len(rows)), rows.shape[1]), dtype=np.float32)
    buffer[: len(rows)] = rows
    return buffer
