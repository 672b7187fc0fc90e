"""A matrix product of 8-bit integers by the CPU's vector instructions (VNNI), compiled by Numba.

VPDPBUSD multiplies four unsigned bytes by four signed ones and adds them to a sum of 32 bits. Queries
are made unsigned by adding 128 to each number, so sums begin at -128 times the sum of the corpus row.
Panels are those of `micro_kernel`, in words of four dimensions. (Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 2.)
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import call_llvm, cpu_features
from index_builder.scoring.micro_kernel import TILE_COLUMNS, TILE_ROWS, stream_panels
from index_builder.scoring.panels import LANES

_I8, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_FLOAT, LANES)
# From version 22 on LLVM's VPDPBUSD takes bytes.
_TAKES_BYTES = llvmlite.binding.llvm_version_info[0] >= 22


def has_integer_kernel() -> bool:
    """Tells whether this CPU has VNNI for vectors as wide as panels are."""
    features = cpu_features()
    return features.get("avx512vnni" if LANES == 16 else "avxvnni", False)


def _multiply_add(builder, left, right, total):
    name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
    if _TAKES_BYTES:
        numbers = ir.VectorType(_I8, 4 * LANES)
        left, right = builder.bitcast(left, numbers), builder.bitcast(right, numbers)
    return call_llvm(builder, name, _WORDS, [total, left, right])


@intrinsic(prefer_literal=True)
def _integer_tile(
    typing_context, vectors, a, b, b_stride, c, c_stride, depth, a_scales, b_scales, starts
):
    """C [TILE_ROWS, vectors * LANES] float32 = A B, scaled.

    `a` and `b` are addresses of panels, `b_stride` leads from one panel of B to the next, `c_stride`
    from a row of C to the next, in bytes; `depth` is in words. `a_scales`, `b_scales` (float32) and
    `starts` (int32, where the sums of a column begin) are addresses. `vectors` is a literal, 1 or 2.
    """
    columns = range(vectors.literal_value)

    def generate(context, builder, signature, arguments):
        _, a, b, b_stride, c, c_stride, depth, a_scales, b_scales, starts = arguments

        def load(base, offset, kind):
            place = builder.inttoptr(builder.add(base, ir.Constant(_I64, offset)), ir.PointerType())
            return builder.load(place, typ=kind, align=4)

        begin = [load(starts, 4 * LANES * column, _WORDS) for column in columns]
        sums = stream_panels(builder, _I32, begin, a, b, b_stride, depth, _multiply_add)
        scales = [load(b_scales, 4 * LANES * column, _FLOATS) for column in columns]
        everywhere = ir.Constant(_WORDS, [0] * LANES)
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        for row in range(TILE_ROWS):
            one = load(a_scales, 4 * row, _FLOAT)
            first = builder.insert_element(undefined, one, ir.Constant(_I32, 0))
            scale = builder.shuffle_vector(first, undefined, everywhere)
            for column in columns:
                total = builder.load(sums[row, column], typ=_WORDS)
                factor = builder.fmul(scale, scales[column])
                product = builder.fmul(builder.sitofp(total, _FLOATS), factor)
                offset = builder.add(
                    builder.mul(c_stride, ir.Constant(_I64, row)),
                    ir.Constant(_I64, 4 * LANES * column),
                )
                place = builder.inttoptr(builder.add(c, offset), ir.PointerType())
                builder.store(product, place, align=4)
        return context.get_dummy_value()

    return types.void(vectors, *[types.intp] * 9), generate


@njit(cache=True, nogil=True)
def multiply_integers(
    a: NDArray[np.int32],
    b: NDArray[np.int32],
    depth: int,
    a_scales: NDArray[np.float32],
    b_scales: NDArray[np.float32],
    starts: NDArray[np.int32],
    edge: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Writes the products of packed rows to out [m, n], C-contiguous.

    `a` holds panels of TILE_ROWS rows of unsigned numbers, `b` of LANES rows of signed ones, both of
    `depth` words; `b` begins on a cache line. Scales and starts are of every row of the panels, those
    that only pad them too; `edge` is scratch of [TILE_ROWS, TILE_COLUMNS].
    """
    m, n = out.shape
    stride, b_panel = 4 * n, 4 * LANES * depth
    for j in range(0, n, TILE_COLUMNS):
        right = b.ctypes.data + (j // LANES) * b_panel
        right_scales, begin = b_scales.ctypes.data + 4 * j, starts.ctypes.data + 4 * j
        for i in range(0, m, TILE_ROWS):
            left, left_scales = a.ctypes.data + 4 * i * depth, a_scales.ctypes.data + 4 * i
            rows, columns = min(TILE_ROWS, m - i), min(TILE_COLUMNS, n - j)
            if rows == TILE_ROWS and columns == TILE_COLUMNS:
                place = out.ctypes.data + i * stride + 4 * j
                _integer_tile(
                    2, left, right, b_panel, place, stride, depth, left_scales, right_scales, begin
                )
                continue
            place = edge.ctypes.data
            if columns > LANES:
                _integer_tile(
                    2, left, right, b_panel, place, 4 * TILE_COLUMNS, depth, left_scales,
                    right_scales, begin,
                )  # fmt: skip
            else:
                _integer_tile(
                    1, left, right, b_panel, place, 4 * TILE_COLUMNS, depth, left_scales,
                    right_scales, begin,
                )  # fmt: skip
            for row in range(rows):
                for column in range(columns):
                    out[i + row, j + column] = edge[row, column]
