"""Micro-panels: float16 rows gathered and interleaved, in the order in which a micro-kernel reads them.

A panel of r rows holds, for every dimension, the numbers of its r rows side by side, so that a kernel
reads both operands from front to back (K. Goto and R. van de Geijn, "Anatomy of high-performance
matrix multiplication", 2008). Its words are float32 numbers, or pairs of bfloat16 numbers (dimensions
2 w and 2 w + 1), as VDPBF16PS and TDPBF16PS take them, or four bytes, as VPDPBUSD does.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import (
    bits_float,
    cpu_features,
    float_bits,
    half_to_float,
    halves_to_floats,
    prefetch_l2,
)
from index_builder.scoring.vector_rows import RowArrays
from index_builder.scoring.widening import prefetch_row

# Words that are interleaved at a time, and of a vector register: 512 or 256 bits.
LANES = 16 if cpu_features().get("avx512f", False) else 8

_CACHE_LINE = 64

# What of a float16 number becomes bfloat16: the nearest, or what that leaves.
_NEAREST, _LOW = 0, 1

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(_I32, LANES)


def depth_of(dim: int, dims_a_word: int, multiple: int) -> int:
    """Returns the words of a row of a panel, padded to a multiple."""
    words = -(-dim // dims_a_word)
    return -(-words // multiple) * multiple


def panels_size(rows: int, panel_rows: int, depth: int) -> int:
    """Returns the words that `pack_panels` needs; the last of them are room for what it drops."""
    return -(-rows // panel_rows) * panel_rows * depth + LANES * LANES


def _round_to_bfloat16(builder, floats):
    """The bit patterns of the nearest bfloat16 numbers, ties to even; of finite numbers."""
    count = floats.type.count

    def every(value):
        return ir.Constant(ir.VectorType(_I32, count), [value] * count)

    words = builder.bitcast(floats, ir.VectorType(_I32, count))
    odd = builder.and_(builder.lshr(words, every(16)), every(1))
    rounded = builder.add(builder.add(words, every(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, every(16)), ir.VectorType(_I16, count))


def _remainder(builder, floats, rounded):
    """The bit patterns of what rounding left of float16 numbers: a bfloat16 number again.

    Their 11 bits are 8 and at most 3, one of them the sign.
    """
    count = floats.type.count
    words = ir.VectorType(_I32, count)
    sixteen = ir.Constant(words, [16] * count)
    wide = builder.bitcast(builder.shl(builder.zext(rounded, words), sixteen), floats.type)
    rest = builder.bitcast(builder.fsub(floats, wide), words)
    return builder.trunc(builder.lshr(rest, sixteen), ir.VectorType(_I16, count))


def _transpose(builder, rows):
    """Transposes LANES vectors of LANES words: at each step blocks trade their off-diagonal halves."""
    size = LANES // 2
    while size:
        for first in range(LANES):
            if first & size:
                continue
            low, high = rows[first], rows[first + size]
            left, right = [], []
            for lane in range(LANES):
                if lane & size:
                    left.append(LANES + lane - size)
                    right.append(LANES + lane)
                else:
                    left.append(lane)
                    right.append(lane + size)
            indices = ir.VectorType(_I32, LANES)
            rows[first] = builder.shuffle_vector(low, high, ir.Constant(indices, left))
            rows[first + size] = builder.shuffle_vector(low, high, ir.Constant(indices, right))
        size //= 2


@intrinsic(prefer_literal=True)
def _interleave(typing_context, kind, part, addresses, offset, out, stride):
    """Writes LANES words of LANES rows, transposed.

    `addresses` is that of LANES addresses of rows, `offset` (bytes) says where in them; word w of row i
    goes to out + w stride + 4 i. A stride below 4 LANES lets each word overwrite the end of the one
    before: rows beyond the stride are dropped. By the type of `kind` words are float32 numbers or pairs
    of bfloat16 (uint32), both made of float16 rows, or words of the rows as they are (int32). The
    literal `part` says what of a number becomes bfloat16: see `_LOW`.
    """
    pairs, as_they_are = kind == types.uint32, kind == types.int32
    halves = ir.VectorType(_I16, LANES * (2 if pairs else 1))

    def generate(context, builder, signature, arguments):
        _, _, addresses, offset, out, stride = arguments

        def at(base, shift):
            return builder.inttoptr(builder.add(base, shift), ir.PointerType())

        rows = []
        for row in range(LANES):
            place = at(addresses, ir.Constant(_I64, 8 * row))
            start = builder.load(place, typ=_I64, align=8)
            if as_they_are:
                rows.append(builder.load(at(start, offset), typ=_WORDS, align=4))
                continue
            floats = halves_to_floats(builder, builder.load(at(start, offset), typ=halves, align=2))
            words = floats
            if pairs:
                words = _round_to_bfloat16(builder, floats)
                if part.literal_value == _LOW:
                    words = _remainder(builder, floats, words)
            rows.append(builder.bitcast(words, _WORDS))
        _transpose(builder, rows)
        for word in range(LANES):
            shift = builder.mul(stride, ir.Constant(_I64, word))
            builder.store(rows[word], at(out, shift), align=4)
        return context.get_dummy_value()

    signature = types.void(kind, part, types.intp, types.intp, types.intp, types.intp)
    return signature, generate


@njit(cache=True, nogil=True)
def pack_panels(
    vectors: RowArrays,
    rows: NDArray[np.int64],
    panel_rows: int,
    depth: int,
    dims_a_word: int,
    out: NDArray[np.float32] | NDArray[np.uint32],
) -> None:
    """Packs some rows of `vectors` into panels of at most LANES rows.

    `out` [parts, words] is float32, or uint32 for pairs of bfloat16: `panels_size` words of 1 or 2
    dimensions. Of two parts the second takes what rounding to bfloat16 left. Words beyond d are zero;
    the last row stands for those that a last panel lacks.
    """
    bits, starts, dim = vectors
    count = rows.shape[0]
    wide = LANES * dims_a_word
    whole = dim - dim % wide
    base, stride = bits.ctypes.data, 4 * panel_rows
    here, ahead = np.empty(LANES, dtype=np.int64), np.empty(LANES, dtype=np.int64)
    tails = np.zeros((LANES, wide), dtype=np.uint16)
    ends = np.empty(LANES, dtype=np.int64)
    for i in range(LANES):
        ends[i] = tails.ctypes.data + 2 * wide * i
    kind = out[0, 0]
    split, low = out.shape[0] == 2, 4 * out.shape[1]
    for first in range(0, count, panel_rows):
        place = out.ctypes.data + first * 4 * depth
        for i in range(LANES):
            row = first + min(i, panel_rows - 1)
            here[i] = base + 2 * starts[rows[min(row, count - 1)]]
            ahead[i] = base + 2 * starts[rows[min(row + panel_rows, count - 1)]]
        for start in range(0, whole, wide):
            if 2 * start % _CACHE_LINE == 0:
                for i in range(panel_rows):
                    prefetch_l2(ahead[i] + 2 * start)
            _interleave(kind, _NEAREST, here.ctypes.data, 2 * start, place, stride)
            if split:
                _interleave(kind, _LOW, here.ctypes.data, 2 * start, place + low, stride)
            place += stride * LANES
        if dim > whole:
            for i in range(LANES):
                row = rows[min(first + min(i, panel_rows - 1), count - 1)]
                for j in range(dim - whole):
                    tails[i, j] = bits[starts[row] + whole + j]
            _interleave(kind, _NEAREST, ends.ctypes.data, 0, place, stride)
            if split:
                _interleave(kind, _LOW, ends.ctypes.data, 0, place + low, stride)


@njit(cache=True, nogil=True)
def interleave_words(
    words: NDArray[np.int32], count: int, panel_rows: int, depth: int, out: NDArray[np.int32]
) -> None:
    """Packs the first `count` rows of words [n, depth or more] into panels of at most LANES rows.

    Rows are as long as a multiple of LANES words; `out` has `panels_size` words. The last row stands
    for those that a last panel lacks.
    """
    base, row_bytes, stride = words.ctypes.data, 4 * words.shape[1], 4 * panel_rows
    rows = np.empty(LANES, dtype=np.int64)
    for first in range(0, count, panel_rows):
        for i in range(LANES):
            rows[i] = base + min(first + min(i, panel_rows - 1), count - 1) * row_bytes
        place = out.ctypes.data + first * 4 * depth
        for start in range(0, depth, LANES):
            _interleave(out[0], _NEAREST, rows.ctypes.data, 4 * start, place, stride)
            place += stride * LANES


@njit(cache=True, nogil=True, inline="always")
def _rounded(word: np.uint32) -> np.uint16:
    """The nearest bfloat16 of a finite float32's bit pattern, ties to even."""
    return np.uint16(
        (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@njit(cache=True, nogil=True)
def round_rows(vectors: RowArrays, rows: NDArray[np.int64], out: NDArray[np.uint16]) -> None:
    """Rounds some rows of `vectors` to bfloat16, not interleaved, to out [parts, n, d or more].

    Of two parts the second takes what rounding left. Dimensions beyond d stay as they are.
    """
    bits, starts, dim = vectors
    split = out.shape[0] == 2
    for i in range(rows.shape[0]):
        prefetch_row(vectors, rows, i)
        start = np.uint64(starts[rows[i]])
        if split:
            for j in range(np.uint64(dim)):
                number = half_to_float(bits[start + j])
                nearest = _rounded(float_bits(number))
                out[0, i, j] = nearest
                rest = number - bits_float(np.uint32(nearest) << np.uint32(16))
                out[1, i, j] = np.uint16(float_bits(rest) >> np.uint32(16))
        else:
            for j in range(np.uint64(dim)):
                out[0, i, j] = _rounded(float_bits(half_to_float(bits[start + j])))
