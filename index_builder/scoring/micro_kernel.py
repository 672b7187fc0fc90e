"""A matrix product of packed micro-panels by the CPU's vector instructions, compiled by Numba.

A micro-tile of C stays in registers while its two panels stream past: every word of A is broadcast and
multiplied into vectors of B, by FMA for float32 and by VDPBF16PS for pairs of bfloat16. Depth is cut
so that two panels of B stay in the first cache (Goto and van de Geijn, 2008). BLAS libraries do the
same, and pack again for each call; here rows come from float16 and are packed once.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from index_builder.scoring.intrinsics import BFloat16, call_llvm, cpu_features
from index_builder.scoring.panels import LANES

# Rows of a micro-tile; it is two vectors wide. 24 of 32 registers hold it, or 12 of 16.
TILE_ROWS = 12 if LANES == 16 else 6
TILE_COLUMNS = 2 * LANES
# Parts of a micro-tile that are multiplied where a product ends in the middle of one.
_THIRD, _TWO_THIRDS, _HALF = TILE_ROWS // 3, 2 * TILE_ROWS // 3, LANES // 2
# Words of a row that one round of a loop takes; panels are as deep as a multiple of it.
UNROLL = 4
# Words of a panel that are multiplied before the next panel's turn comes: two of B are 40 kB.
_MOST_DEPTH = 320

_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def has_float32_kernel() -> bool:
    """Tells whether this CPU has what the kernel is written for: AVX-512, or AVX2 with FMA."""
    features = cpu_features()
    return all(features.get(name, False) for name in ("avx2", "fma", "f16c"))


def has_bfloat16_kernel() -> bool:
    """Tells whether this CPU has AVX512-BF16."""
    return LANES == 16 and cpu_features().get("avx512bf16", False)


def stream_panels(builder, word, begin, a, b, b_stride, depth, multiply_add, rows=TILE_ROWS):
    """Emits the loop of a micro-tile; returns where its sums are, by row and column of vectors.

    `word` is the type of a word of the panels at addresses `a` and `b`, of `depth` words, a multiple of
    UNROLL; `b_stride` leads from one panel of B to the next. The sums of a column begin with the vector
    `begin[column]`, as long as LANES or shorter: then the first lanes of a panel are multiplied.
    `multiply_add(builder, left, right, total)` makes new sums of vectors of words; `rows` are the first
    of a panel of A.
    """
    lanes = begin[0].type.count
    words = ir.VectorType(word, lanes)
    undefined = ir.Constant(words, ir.Undefined)
    everywhere = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    columns = range(len(begin))

    def constant(value):
        return ir.Constant(_I64, value)

    def load(base, offset, kind, align):
        place = builder.inttoptr(builder.add(base, offset), ir.PointerType())
        return builder.load(place, typ=kind, align=align)

    panels = [builder.mul(b_stride, constant(column)) for column in columns]
    tile = [(row, column) for row in range(rows) for column in columns]
    sums = {place: cgutils.alloca_once(builder, begin[place[1]].type) for place in tile}
    for place in tile:
        builder.store(begin[place[1]], sums[place])
    with cgutils.for_range(builder, builder.udiv(depth, constant(UNROLL)), intp=_I64) as loop:
        from_a = builder.add(a, builder.mul(loop.index, constant(4 * TILE_ROWS * UNROLL)))
        from_b = builder.add(b, builder.mul(loop.index, constant(4 * LANES * UNROLL)))
        for step in range(UNROLL):
            along = constant(4 * LANES * step)
            right = [load(from_b, builder.add(along, panel), words, 4 * lanes) for panel in panels]
            for row in range(rows):
                one = load(from_a, constant(4 * (step * TILE_ROWS + row)), word, 4)
                first = builder.insert_element(undefined, one, ir.Constant(_I32, 0))
                left = builder.shuffle_vector(first, undefined, everywhere)
                for column in columns:
                    total = builder.load(sums[row, column], typ=begin[column].type)
                    total = multiply_add(builder, left, right[column], total)
                    builder.store(total, sums[row, column])
    return sums


@intrinsic(prefer_literal=True)
def _micro_tile(typing_context, kind, rows, columns, a, b, b_stride, c, c_stride, depth, add):
    """C [rows, columns] = A B, or += where `add` is not zero.

    `a` and `b` are addresses of panels, `b_stride` leads from one panel of B to the next, `c_stride`
    from a row of C to the next, in bytes; `depth` is a multiple of UNROLL. By the type of `kind` words
    are float32, or pairs of bfloat16 (uint32). `rows` is a literal of at most TILE_ROWS, `columns` one
    of TILE_COLUMNS, LANES and half of LANES.
    """
    pairs = kind == types.uint32
    lanes = min(columns.literal_value, LANES)
    vectors = range(columns.literal_value // lanes)
    floats = ir.VectorType(_FLOAT, lanes)
    numbers = ir.VectorType(BFloat16(), 2 * lanes)

    def multiply_add(builder, left, right, total):
        if not pairs:
            return call_llvm(builder, f"llvm.fma.v{lanes}f32", floats, [left, right, total])
        arguments = [total, builder.bitcast(left, numbers), builder.bitcast(right, numbers)]
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
        return call_llvm(builder, name, floats, arguments)

    def generate(context, builder, signature, arguments):
        _, _, _, a, b, b_stride, c, c_stride, depth, add = arguments

        def constant(value):
            return ir.Constant(_I64, value)

        def address(row, vector):
            offset = builder.add(builder.mul(c_stride, constant(row)), constant(4 * lanes * vector))
            return builder.inttoptr(builder.add(c, offset), ir.PointerType())

        zeros = ir.Constant(floats, [0.0] * lanes)
        begin = [zeros for _ in vectors]
        word = _I32 if pairs else _FLOAT
        count = rows.literal_value
        sums = stream_panels(builder, word, begin, a, b, b_stride, depth, multiply_add, count)
        places = {place: address(*place) for place in sums}
        with builder.if_then(builder.icmp_signed("!=", add, constant(0))):
            for place, total in sums.items():
                before = builder.load(places[place], typ=floats, align=4)
                builder.store(builder.fadd(builder.load(total, typ=floats), before), total)
        for place, total in sums.items():
            builder.store(builder.load(total, typ=floats), places[place], align=4)
        return context.get_dummy_value()

    signature = types.void(kind, rows, columns, *[types.intp] * 7)
    return signature, generate


@njit(cache=True, nogil=True)
def multiply_panels(
    a: NDArray[np.float32] | NDArray[np.uint32],
    b: NDArray[np.float32] | NDArray[np.uint32],
    depth: int,
    edge: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Writes the products of packed rows to out [m, n], C-contiguous.

    `a` holds panels of TILE_ROWS rows, `b` of LANES, both of `depth` words (see `pack_panels`); `b`
    begins on a cache line, as does `edge`, scratch of [TILE_ROWS, TILE_COLUMNS]. Less of a panel than
    all of it is multiplied where a third or two of its rows, or half of its lanes, are enough.
    """
    m, n = out.shape
    kind = a[0]
    stride, edge_stride, place = 4 * n, 4 * TILE_COLUMNS, edge.ctypes.data
    cuts = -(-depth // _MOST_DEPTH)
    most = -(-depth // (cuts * UNROLL)) * UNROLL
    b_panel = 4 * LANES * depth
    for k in range(0, depth, most):
        deep = min(most, depth - k)
        j = 0
        while j < n:
            right = b.ctypes.data + (j // LANES) * b_panel + 4 * LANES * k
            # What is left over by whole vectors goes with them where it takes more than half of one.
            wide = TILE_COLUMNS if n - j > LANES + _HALF else LANES
            columns = min(wide, n - j)
            for i in range(0, m, TILE_ROWS):
                left = a.ctypes.data + 4 * i * depth + 4 * TILE_ROWS * k
                rows = min(TILE_ROWS, m - i)
                if rows == TILE_ROWS and columns == TILE_COLUMNS:
                    whole = out.ctypes.data + i * stride + 4 * j
                    _micro_tile(
                        kind, TILE_ROWS, TILE_COLUMNS, left, right, b_panel, whole, stride, deep, k
                    )
                    continue
                if k > 0:
                    for row in range(rows):
                        for column in range(columns):
                            edge[row, column] = out[i + row, j + column]
                if columns <= _HALF:
                    _micro_tile(
                        kind, TILE_ROWS, _HALF, left, right, b_panel, place, edge_stride, deep, k
                    )
                elif columns <= LANES:
                    _micro_tile(
                        kind, TILE_ROWS, LANES, left, right, b_panel, place, edge_stride, deep, k
                    )
                elif rows <= _THIRD:
                    _micro_tile(
                        kind, _THIRD, TILE_COLUMNS, left, right, b_panel, place, edge_stride, deep, k
                    )
                elif rows <= _TWO_THIRDS:
                    _micro_tile(
                        kind,
                        _TWO_THIRDS,
                        TILE_COLUMNS,
                        left,
                        right,
                        b_panel,
                        place,
                        edge_stride,
                        deep,
                        k,
                    )
                else:
                    _micro_tile(
                        kind, TILE_ROWS, TILE_COLUMNS, left, right, b_panel, place, edge_stride, deep, k
                    )
                for row in range(rows):
                    for column in range(columns):
                        out[i + row, j + column] = edge[row, column]
            j += columns
