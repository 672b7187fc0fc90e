"""The CPU's own bfloat16 products, as intrinsics for Numba: AMX tiles, and AVX512-BF16 dot products.

Both take the corpus side packed in blocks of 16 vectors: for every 32 dimensions ("a step") 16 rows of
16 pairs, row r holding dimensions 2 r and 2 r + 1 of each vector, as the instructions TDPBF16PS and
VDPBF16PS read them (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2).
Sums are float32.
"""

import ctypes
import platform
import sys

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

# Vectors of a packed block, and dimensions of a step.
BLOCK = 16
STEP = 32
_STEP_BYTES = BLOCK * STEP * 2

# Queries that one call takes.
AMX_ROWS = 32
AVX512_ROWS = 12

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux lets a process use tiles after it asked.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def amx_allowed() -> bool:
    """Tells whether this process may use AMX in bfloat16; asks the kernel for it."""
    features = llvmlite.binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def avx512_allowed() -> bool:
    """Tells whether this CPU has AVX512-BF16."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


def tile_configuration() -> NDArray[np.uint8]:
    """Returns what LDTILECFG reads: palette 1, eight tiles of 16 rows of 64 bytes."""
    configuration = np.zeros(64, dtype=np.uint8)
    configuration[0] = 1
    configuration[16:32].view(np.uint16)[:] = 64
    configuration[48:56] = 16
    return configuration


class _BFloat16(ir.Type):
    """LLVM's `bfloat`, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_I8, _I32, _I64, _POINTER = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.PointerType()
_VOID = ir.VoidType()


def _call(builder, name, result, arguments):
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    declared = cgutils.get_or_insert_function(builder.module, function, name)
    return builder.call(declared, arguments)


@intrinsic
def begin_tiles(typing_context, configuration):
    """Configures this thread's tiles from an address."""

    def generate(context, builder, signature, arguments):
        _call(builder, "llvm.x86.ldtilecfg", _VOID, [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def end_tiles(typing_context):
    """Gives this thread's tiles back, so that a switch of threads need not save them."""

    def generate(context, builder, signature, arguments):
        _call(builder, "llvm.x86.tilerelease", _VOID, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def amx_block(typing_context, a, a_stride, b, b_stride, c, c_stride, steps):
    """C [32, 32] = A [32, 32 steps] times two packed blocks; addresses and strides in bytes.

    A's rows are bfloat16, `b_stride` leads from one block to the next, C is float32.
    """

    def generate(context, builder, signature, arguments):
        a, a_stride, b, b_stride, c, c_stride, steps = arguments

        def number(value):
            return ir.Constant(_I8, value)

        def address(base, offset):
            return builder.inttoptr(builder.add(base, offset), _POINTER)

        def load(tile, base, offset, stride):
            place = [number(tile), address(base, offset), stride]
            _call(builder, "llvm.x86.tileloadd64", _VOID, place)

        zero = ir.Constant(_I64, 0)
        second = builder.mul(a_stride, ir.Constant(_I64, BLOCK))
        for tile in range(4):
            _call(builder, "llvm.x86.tilezero", _VOID, [number(tile)])
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            along_a = builder.mul(loop.index, ir.Constant(_I64, 2 * STEP))
            along_b = builder.mul(loop.index, ir.Constant(_I64, _STEP_BYTES))
            row_bytes = ir.Constant(_I64, 2 * STEP)
            load(6, b, along_b, row_bytes)
            load(4, a, along_a, a_stride)
            _call(builder, "llvm.x86.tdpbf16ps", _VOID, [number(0), number(4), number(6)])
            load(7, b, builder.add(along_b, b_stride), row_bytes)
            _call(builder, "llvm.x86.tdpbf16ps", _VOID, [number(1), number(4), number(7)])
            load(5, a, builder.add(along_a, second), a_stride)
            _call(builder, "llvm.x86.tdpbf16ps", _VOID, [number(2), number(5), number(6)])
            _call(builder, "llvm.x86.tdpbf16ps", _VOID, [number(3), number(5), number(7)])
        below = builder.mul(c_stride, ir.Constant(_I64, BLOCK))
        beside = ir.Constant(_I64, 4 * BLOCK)
        for tile, offset in enumerate((zero, beside, below, builder.add(below, beside))):
            place = [number(tile), address(c, offset), c_stride]
            _call(builder, "llvm.x86.tilestored64", _VOID, place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@intrinsic
def avx512_block(typing_context, a, a_stride, b, b_stride, c, c_stride, steps):
    """C [12, 32] = A [12, 32 steps] times two packed blocks; as `amx_block`."""
    floats = ir.VectorType(ir.FloatType(), BLOCK)
    words = ir.VectorType(_I32, BLOCK)
    pairs = ir.VectorType(_BFloat16(), 2 * BLOCK)

    def generate(context, builder, signature, arguments):
        a, a_stride, b, b_stride, c, c_stride, steps = arguments

        def address(*parts):
            total = parts[0]
            for part in parts[1:]:
                total = builder.add(total, part)
            return builder.inttoptr(total, _POINTER)

        def constant(value):
            return ir.Constant(_I64, value)

        zeros = ir.Constant(floats, [0.0] * BLOCK)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(2 * AVX512_ROWS)]
        for place in sums:
            builder.store(zeros, place)
        rows = [builder.mul(a_stride, constant(row)) for row in range(AVX512_ROWS)]
        with cgutils.for_range(builder, builder.mul(steps, constant(STEP // 2)), intp=_I64) as loop:
            along_a = builder.mul(loop.index, constant(4))
            along_b = builder.mul(loop.index, constant(4 * BLOCK))
            blocks = []
            for start in (constant(0), b_stride):
                loaded = builder.load(address(b, along_b, start), typ=words, align=4)
                blocks.append(builder.bitcast(loaded, pairs))
            for row in range(AVX512_ROWS):
                word = builder.load(address(a, along_a, rows[row]), typ=_I32, align=4)
                one = builder.insert_element(
                    ir.Constant(words, ir.Undefined), word, ir.Constant(_I32, 0)
                )
                mask = ir.Constant(ir.VectorType(_I32, BLOCK), [0] * BLOCK)
                spread = builder.shuffle_vector(one, ir.Constant(words, ir.Undefined), mask)
                both = builder.bitcast(spread, pairs)
                for side in range(2):
                    place = sums[2 * row + side]
                    before = builder.load(place, typ=floats)
                    after = _call(
                        builder,
                        "llvm.x86.avx512bf16.dpbf16ps.512",
                        floats,
                        [before, both, blocks[side]],
                    )
                    builder.store(after, place)
        for row in range(AVX512_ROWS):
            for side in range(2):
                offset = builder.add(builder.mul(c_stride, constant(row)), constant(4 * BLOCK * side))
                builder.store(
                    builder.load(sums[2 * row + side], typ=floats), address(c, offset), align=4
                )
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate
