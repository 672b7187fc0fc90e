"""Measures how fast this machine multiplies matrices: the limit of every join.

`python -m benchmarks.products --library numpy --dim 256` prints one JSON object: operations a second
(2 m n d of a product [m, d] x [d, n]) by precision, the best of a few shapes. One library a process:
their thread pools would get in each other's way.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transforms.encoders.engines.openvino_engine import import_openvino

LIBRARIES = ("numpy", "scipy", "faiss", "tensorflow", "openvino")
SECONDS = 0.7
LEAST_REPEATS = 3

Floats = NDArray[np.float32]
# One way to multiply: its name, and a function from [m, d] and [n, d] to a call that multiplies.
Way = tuple[str, Callable[[Floats, Floats], Callable[[], Any]]]


def shapes(dim: int) -> list[tuple[int, int, int]]:
    """Returns the shapes [m, n, d] that are tried: two with the d of the join, and a cube."""
    return [(4096, 4096, dim), (1024, 4096, dim), (2048, 2048, 2048)]


def best_rate(make: Callable[[Floats, Floats], Callable[[], Any]], dim: int, seconds: float) -> float:
    """Returns the most operations a second of one way, over shapes and repeats."""
    best = 0.0
    for m, n, d in shapes(dim):
        random = np.random.default_rng(0)
        call = make(*(random.standard_normal((rows, d), dtype=np.float32) for rows in (m, n)))
        call()
        spent, repeats = 0.0, 0
        while spent < seconds or repeats < LEAST_REPEATS:
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            spent, repeats = spent + took, repeats + 1
            best = max(best, 2 * m * n * d / took)
    return best


def ways(library: str, threads: int) -> Iterator[tuple[str, Way]]:
    """Yields the ways of a library, each with its precision."""
    if library == "numpy":
        yield "float32", ("one call", lambda a, b: lambda: a @ b.T)
        yield "float32", ("a call a core", lambda a, b: _call_a_core(a, b, threads))
    elif library == "scipy":
        yield "float32", ("sgemm", _scipy_product)
    elif library == "faiss":
        yield "float32", ("sgemm of LinearTransform", _faiss_product)
    elif library == "tensorflow":
        for precision in ("float32", "bfloat16"):
            yield precision, ("matmul", lambda a, b, p=precision: _tensorflow_product(a, b, p))
    elif library == "openvino":
        for precision in _openvino_precisions():
            yield precision, ("MatMul", lambda a, b, p=precision: _openvino_product(a, b, p, threads))


def _call_a_core(a: Floats, b: Floats, threads: int) -> Callable[[], Any]:
    """Multiplies with a thread for each core, every call on one core, as the join does."""
    from threadpoolctl import threadpool_limits

    pool = ThreadPoolExecutor(threads)
    parts = np.array_split(a, threads)

    def call() -> list[Floats]:
        with threadpool_limits(1, user_api="blas"):
            return list(pool.map(lambda part: part @ b.T, parts))

    return call


def _scipy_product(a: Floats, b: Floats) -> Callable[[], Any]:
    from scipy.linalg.blas import sgemm

    # Columns first, as Fortran has them, so that nothing is copied.
    return lambda: sgemm(1.0, b.T, a.T, trans_a=True).T


def _faiss_product(a: Floats, b: Floats) -> Callable[[], Any]:
    import faiss

    transform = faiss.LinearTransform(b.shape[1], len(b), False)
    faiss.copy_array_to_vector(b.ravel(), transform.A)
    transform.is_trained = True
    return lambda: transform.apply(a)


def _tensorflow_product(a: Floats, b: Floats, precision: str) -> Callable[[], Any]:
    import tensorflow as tf

    left, right = (tf.cast(tf.constant(each), precision) for each in (a, b))
    return tf.function(lambda: tf.linalg.matmul(left, right, transpose_b=True))


def _openvino_precisions() -> list[str]:
    found = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["float32", "bfloat16"] if "BF16" in found else ["float32"]


def _openvino_product(a: Floats, b: Floats, precision: str, threads: int) -> Callable[[], Any]:
    openvino = import_openvino()
    from openvino import opset13 as opset

    rows = opset.parameter(a.shape, np.float32)
    product = opset.matmul(rows, opset.constant(b), False, True)
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    request = openvino.compile_model(
        openvino.Model([product], [rows]), "CPU", config | {"PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()
    inputs = openvino.Tensor(a, shared_memory=True)

    def call(kept: Floats = a) -> Any:
        # The tensor does not own the memory of `kept`.
        return request.infer([inputs], share_inputs=True, share_outputs=True)[0]

    return call


def main(arguments: list[str] | None = None) -> None:
    """Measures one library."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each shape")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    rates: dict[str, float] = {}
    names: dict[str, str] = {}
    try:
        for precision, (name, make) in ways(options.library, options.threads):
            rate = best_rate(make, options.dim, options.seconds)
            if rate > rates.get(precision, 0.0):
                rates[precision], names[precision] = rate, name
    except ImportError as error:
        print(json.dumps({"skipped": f"is not installed: {error}"}), flush=True)
        return
    print(json.dumps({"rates": rates, "ways": names}), flush=True)


if __name__ == "__main__":
    main()
