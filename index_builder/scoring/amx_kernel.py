"""A matrix product by AMX tiles, in bfloat16 or of numbers split into two of them, compiled by Numba.

The corpus comes in panels of 16 vectors (see `panels`): 16 of their words, of two dimensions each, are
the tile that TDPBF16PS takes ("a step"). Queries are plain rows. Sums are float32. (Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2.)
"""

import ctypes
import platform
import sys

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import call_llvm, cpu_features, prefetch_l2
from index_builder.scoring.panels import round_rows
from index_builder.scoring.vector_rows import RowArrays

# Vectors of a panel, and dimensions of a step.
BLOCK = 16
STEP = 32
_STEP_BYTES = BLOCK * STEP * 2

# Rows and columns of a block of C: two tiles each.
BLOCK_ROWS = 2 * BLOCK
BLOCK_COLUMNS = 2 * BLOCK

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux lets a process use tiles after it asked.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def amx_allowed() -> bool:
    """Tells whether this process may use AMX in bfloat16; asks the kernel for it."""
    features = cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16") and features.get("avx512f")):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def tile_configuration() -> NDArray[np.uint8]:
    """Returns what LDTILECFG reads: palette 1, eight tiles of 16 rows of 64 bytes."""
    configuration = np.zeros(64, dtype=np.uint8)
    configuration[0] = 1
    configuration[16:32].view(np.uint16)[:] = 64
    configuration[48:56] = 16
    return configuration


_I8, _I32, _I64, _POINTER = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.PointerType()
_VOID = ir.VoidType()


@intrinsic
def _begin_tiles(typing_context, configuration):
    """Configures this thread's tiles from an address."""

    def generate(context, builder, signature, arguments):
        call_llvm(builder, "llvm.x86.ldtilecfg", _VOID, [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _end_tiles(typing_context):
    """Gives this thread's tiles back, so that a switch of threads need not save them."""

    def generate(context, builder, signature, arguments):
        call_llvm(builder, "llvm.x86.tilerelease", _VOID, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def _amx_block(typing_context, parts, a, a_stride, a_low, b, b_stride, b_low, c, c_stride, steps):
    """C [32, 32] = A [32, 32 steps] times two packed blocks; addresses and strides in bytes.

    A's rows are bfloat16, `b_stride` leads from one block to the next, C is float32. `parts` is a
    literal: 2 where every number is the sum of two bfloat16 ones, whose lower parts lie `a_low` and
    `b_low` bytes further; then three products are summed, all but that of the two lower parts.
    """
    split = parts.literal_value == 2

    def generate(context, builder, signature, arguments):
        _, a, a_stride, a_low, b, b_stride, b_low, c, c_stride, steps = arguments

        def number(value):
            return ir.Constant(_I8, value)

        def address(base, offset):
            return builder.inttoptr(builder.add(base, offset), _POINTER)

        def load(tile, base, offset, stride):
            place = [number(tile), address(base, offset), stride]
            call_llvm(builder, "llvm.x86.tileloadd64", _VOID, place)

        def multiply(total, left, right):
            tiles = [number(total), number(left), number(right)]
            call_llvm(builder, "llvm.x86.tdpbf16ps", _VOID, tiles)

        zero = ir.Constant(_I64, 0)
        second = builder.mul(a_stride, ir.Constant(_I64, BLOCK))
        row_bytes = ir.Constant(_I64, 2 * STEP)
        for tile in range(4):
            call_llvm(builder, "llvm.x86.tilezero", _VOID, [number(tile)])
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            along_a = builder.mul(loop.index, ir.Constant(_I64, 2 * STEP))
            along_b = builder.mul(loop.index, ir.Constant(_I64, _STEP_BYTES))
            below_a, beside_b = builder.add(along_a, second), builder.add(along_b, b_stride)
            high_b = b
            if split:
                # The upper half of A meets both of B, then the upper half of B the lower one of A.
                high_b, b = b, builder.add(b, b_low)
            load(6, b, along_b, row_bytes)
            load(4, a, along_a, a_stride)
            multiply(0, 4, 6)
            load(7, b, beside_b, row_bytes)
            multiply(1, 4, 7)
            load(5, a, below_a, a_stride)
            multiply(2, 5, 6)
            multiply(3, 5, 7)
            if split:
                load(6, high_b, along_b, row_bytes)
                multiply(0, 4, 6)
                multiply(2, 5, 6)
                load(7, high_b, beside_b, row_bytes)
                multiply(1, 4, 7)
                multiply(3, 5, 7)
                low_a = builder.add(a, a_low)
                load(4, low_a, along_a, a_stride)
                multiply(0, 4, 6)
                multiply(1, 4, 7)
                load(5, low_a, below_a, a_stride)
                multiply(2, 5, 6)
                multiply(3, 5, 7)
        below = builder.mul(c_stride, ir.Constant(_I64, BLOCK))
        beside = ir.Constant(_I64, 4 * BLOCK)
        for tile, offset in enumerate((zero, beside, below, builder.add(below, beside))):
            place = [number(tile), address(c, offset), c_stride]
            call_llvm(builder, "llvm.x86.tilestored64", _VOID, place)
        return context.get_dummy_value()

    return types.void(parts, *[types.intp] * 9), generate


@njit(cache=True, nogil=True)
def multiply_tiles(
    vectors: RowArrays,
    queries: NDArray[np.int64],
    a: NDArray[np.uint16],
    b: NDArray[np.uint32],
    out: NDArray[np.float32],
    edge: NDArray[np.float32],
    configuration: NDArray[np.uint8],
) -> None:
    """Writes the products of some rows of `vectors` by packed ones to out [m, n], C-contiguous.

    The rows `queries` [m] are rounded or split a block at a time, and their blocks stay in the second
    cache: `a` [parts, BLOCK_ROWS, d padded to STEP] is scratch, zero beyond d. `b` [parts, words] holds
    panels of BLOCK vectors as deep, an even number of them; `edge` is scratch of [BLOCK_ROWS,
    BLOCK_COLUMNS].
    """
    m, n = out.shape
    steps = a.shape[2] // STEP
    a_stride, b_stride, c_stride = 2 * a.shape[2], _STEP_BYTES * steps, 4 * n
    a_low, b_low = a_stride * a.shape[1], 4 * b.shape[1]
    split = a.shape[0] == 2
    left = a.ctypes.data
    _begin_tiles(configuration.ctypes.data)
    for i in range(0, m, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, m - i)
        round_rows(vectors, queries[i : i + rows], a)
        for row in range(i + rows, min(i + rows + BLOCK_ROWS, m)):
            start = vectors.bits.ctypes.data + 2 * vectors.starts[queries[row]]
            for line in range(0, 2 * vectors.dim, 64):
                prefetch_l2(start + line)
        for j in range(0, n, BLOCK_COLUMNS):
            right = b.ctypes.data + (j // BLOCK) * b_stride
            columns = min(BLOCK_COLUMNS, n - j)
            whole = rows == BLOCK_ROWS and columns == BLOCK_COLUMNS
            place, stride = edge.ctypes.data, 4 * BLOCK_COLUMNS
            if whole:
                place, stride = out.ctypes.data + i * c_stride + 4 * j, c_stride
            if split:
                _amx_block(2, left, a_stride, a_low, right, b_stride, b_low, place, stride, steps)
            else:
                _amx_block(1, left, a_stride, 0, right, b_stride, 0, place, stride, steps)
            if not whole:
                for row in range(rows):
                    for column in range(columns):
                        out[i + row, j + column] = edge[row, column]
    _end_tiles()
