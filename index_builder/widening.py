"""From float16 codes to the float32 that products take: rows are gathered and widened in one pass."""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

# The value of every float16, by its bit pattern.
_VALUES = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)


def _hardware_converts() -> bool:
    """Tells whether this CPU converts float16 itself (F16C; every 64-bit ARM does)."""
    if llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64")):
        return True
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c", False))


HARDWARE_CONVERTS = _hardware_converts()


@intrinsic
def _half_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """float32(bits): the CPU's own conversion, which LLVM makes 8 or 16 wide."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        half = builder.bitcast(arguments[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(types.uint16), generate


@njit(cache=True, nogil=True)
def _widen_by_hardware(
    bits: NDArray[np.uint16], rows: NDArray[np.int64], out: NDArray[np.float32]
) -> None:
    for i in range(rows.shape[0]):
        source, target = bits[rows[i]], out[i]
        for j in range(target.shape[0]):
            target[j] = _half_to_float(source[j])


@njit(cache=True, nogil=True)
def _widen_by_table(
    bits: NDArray[np.uint16],
    rows: NDArray[np.int64],
    out: NDArray[np.float32],
    values: NDArray[np.float32],
) -> None:
    for i in range(rows.shape[0]):
        source, target = bits[rows[i]], out[i]
        for j in range(target.shape[0]):
            target[j] = values[source[j]]


def widen_rows(vectors: NDArray[np.float16], rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Writes some rows of `vectors` [n, d] to `out` [len(rows), d], exactly."""
    if HARDWARE_CONVERTS:
        _widen_by_hardware(vectors.view(np.uint16), rows, out)
    else:
        _widen_by_table(vectors.view(np.uint16), rows, out, _VALUES)
