"""Sums over 4-bit codes: for a query, what its table says for each of a row's codes, added up.

A query's table has 16 numbers of 8 bits a subspace. A CPU that looks numbers up in a register adds up
many rows at once: with AVX-512 VBMI and VNNI 64 numbers an instruction, with AVX2 32. Elsewhere a plain
loop does. Sums are integers, so all of them give the same.
"""

import enum
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

# Values of a 4-bit code.
CODES = 16
# Subspaces whose tables fill 64 bytes; a table is padded to so many.
GROUP = 4
# Rows that are added up side by side.
BLOCK_ROWS = 64
# The sums of one row of an AVX2 register have 16 bits, of which a subspace takes 8: groups until they
# are widened.
_NARROW_GROUPS = 32


class Lookup(enum.Enum):
    """How numbers of a table are looked up."""

    AVX512 = "avx512"
    AVX2 = "avx2"
    PLAIN = "plain"


def supported_lookups() -> list[Lookup]:
    """Returns the ways that this CPU has, the fastest first."""
    features = llvmlite.binding.get_host_cpu_features()
    found = []
    if all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vbmi", "avx512vnni")):
        found.append(Lookup.AVX512)
    if features.get("avx2", False):
        found.append(Lookup.AVX2)
    return [*found, Lookup.PLAIN]


LOOKUP = supported_lookups()[0]


def table_bytes(subspaces: int) -> int:
    """Returns the length of a query's table, padded to whole groups."""
    return -(-subspaces // GROUP) * GROUP * CODES


class PreparedCodes:
    """The codes of some rows in the order in which this CPU adds them up.

    `packed` uint8 [rows, ceil(subspaces / 2)]: the code of subspace 2 j is in the low four bits of byte
    j, that of 2 j + 1 in the high ones. `lookup` is by default the fastest that the CPU has.
    """

    def __init__(self, packed: NDArray[np.uint8], subspaces: int, lookup: Lookup | None = None) -> None:
        self.rows = len(packed)
        self.lookup = lookup or LOOKUP
        self.groups = -(-subspaces // GROUP)
        self.blocks = -(-self.rows // BLOCK_ROWS)
        self._codes = np.zeros(self.blocks * self.groups * _BLOCK_BYTES[self.lookup], dtype=np.uint8)
        _FILL[self.lookup](np.ascontiguousarray(packed), subspaces, self.groups, self._codes)

    def sums(
        self, tables: NDArray[np.uint8], slots: NDArray[np.int64], out: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Returns the sums of some queries, int32 [len(slots), rows], a view of `out` (1-D scratch).

        `tables` uint8 [n, table_bytes] are those of all queries, `slots` says which of them are asked.
        """
        width = self.blocks * BLOCK_ROWS
        wide = out[: len(slots) * width].reshape(len(slots), width)
        _ADD[self.lookup](self._codes, self.blocks, self.groups, tables, slots, wide)
        return wide[:, : self.rows]


def _vector(numbers: int, bits: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), numbers)


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: Any) -> ir.Value:
    return context.make_array(kind)(context, builder, array).data


def _load(builder: ir.IRBuilder, base: ir.Value, place: ir.Value, kind: ir.VectorType) -> ir.Value:
    pointer = builder.bitcast(builder.gep(base, [place]), kind.as_pointer())
    return builder.load(pointer, align=1)


def _store(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, place: ir.Value) -> None:
    pointer = builder.bitcast(builder.gep(base, [place]), value.type.as_pointer())
    builder.store(value, pointer, align=1)


def _constant(kind: ir.VectorType, number: int) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


@intrinsic
def _add_block_512(typing_context, codes, code, groups, tables, table, sums, place):
    """Adds up a block of 64 rows: 16 rows a register, with four subspaces of each side by side."""

    def generate(context, builder, signature, arguments):
        bytes64, words16 = _vector(64, 8), _vector(16, 32)
        module = builder.module
        look_up = cgutils.get_or_insert_function(
            module, ir.FunctionType(bytes64, [bytes64, bytes64]), "llvm.x86.avx512.permvar.qi.512"
        )
        # LLVM takes this older signature and turns it into that of its version.
        kind = ir.FunctionType(words16, [words16, words16, words16])
        add_up = cgutils.get_or_insert_function(module, kind, "llvm.x86.avx512.vpdpbusd.512")
        ones = builder.bitcast(_constant(bytes64, 1), words16)
        code_base = _data(context, builder, signature.args[0], arguments[0])
        table_base = _data(context, builder, signature.args[3], arguments[3])
        sum_base = _data(context, builder, signature.args[5], arguments[5])
        totals = [cgutils.alloca_once_value(builder, _constant(words16, 0)) for _ in range(4)]
        with cgutils.for_range(builder, arguments[2]) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, 64))
            numbers = _load(builder, table_base, builder.add(arguments[4], offset), bytes64)
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, 256))
            for part, total in enumerate(totals):
                at = builder.add(offset, ir.Constant(offset.type, 64 * part))
                indices = _load(builder, code_base, builder.add(arguments[1], at), bytes64)
                found = builder.bitcast(builder.call(look_up, [numbers, indices]), words16)
                added = builder.call(add_up, [builder.load(total), found, ones])
                builder.store(added, total)
        for part, total in enumerate(totals):
            at = builder.add(arguments[6], ir.Constant(arguments[6].type, 16 * part))
            _store(builder, builder.load(total), sum_base, at)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(codes, intp, intp, tables, intp, sums, intp), generate


@intrinsic
def _add_block_256(typing_context, codes, code, groups, tables, table, sums, place):
    """Adds to the sums of 32 rows: 16 rows in the low bits and 16 in the high ones, two subspaces.

    `code` and `table` are where the groups begin; at most _NARROW_GROUPS are taken.
    """

    def generate(context, builder, signature, arguments):
        bytes32, shorts16, words16 = _vector(32, 8), _vector(16, 16), _vector(16, 32)
        look_up = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(bytes32, [bytes32, bytes32]), "llvm.x86.avx2.pshuf.b"
        )
        low_bits, eight = _constant(bytes32, 15), _constant(shorts16, 8)
        four = _constant(shorts16, 4)
        code_base = _data(context, builder, signature.args[0], arguments[0])
        table_base = _data(context, builder, signature.args[3], arguments[3])
        sum_base = _data(context, builder, signature.args[5], arguments[5])
        # Of the low and the high rows: sums of whole 16-bit lanes, and of their upper bytes.
        zero = _constant(shorts16, 0)
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(2)]
        pairs = builder.mul(arguments[2], ir.Constant(arguments[2].type, 2))
        with cgutils.for_range(builder, pairs) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, 32))
            numbers = _load(builder, table_base, builder.add(arguments[4], offset), bytes32)
            packed = _load(builder, code_base, builder.add(arguments[1], offset), bytes32)
            shifted = builder.bitcast(builder.lshr(builder.bitcast(packed, shorts16), four), bytes32)
            for half, (whole, upper) in zip((packed, shifted), totals, strict=True):
                found = builder.call(look_up, [numbers, builder.and_(half, low_bits)])
                lanes = builder.bitcast(found, shorts16)
                builder.store(builder.add(builder.load(whole), lanes), whole)
                high = builder.lshr(lanes, eight)
                builder.store(builder.add(builder.load(upper), high), upper)
        for half, (whole, upper) in enumerate(totals):
            odd = builder.load(upper)
            even = builder.sub(builder.load(whole), builder.shl(odd, eight))
            # Two subspaces: the lower and the upper half of the register; then rows in their order.
            eights = ir.Constant(_vector(8, 32), list(range(8)))
            others = ir.Constant(_vector(8, 32), list(range(8, 16)))
            rows = []
            for lanes in (even, odd):
                wide = builder.zext(lanes, words16)
                rows.append(
                    builder.add(
                        builder.shuffle_vector(wide, wide, eights),
                        builder.shuffle_vector(wide, wide, others),
                    )
                )
            order = [number for row in range(8) for number in (row, 8 + row)]
            added = builder.shuffle_vector(*rows, ir.Constant(_vector(16, 32), order))
            at = builder.add(arguments[6], ir.Constant(arguments[6].type, 16 * half))
            before = _load(builder, sum_base, at, words16)
            _store(builder, builder.add(before, added), sum_base, at)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(codes, intp, intp, tables, intp, sums, intp), generate


@njit(cache=True, nogil=True)
def _code(packed: NDArray[np.uint8], row: int, subspace: int) -> int:
    return (int(np.int64(packed[row, subspace >> 1])) >> (4 * (subspace & 1))) & 15


@njit(cache=True, nogil=True)
def _fill_512(packed: NDArray[np.uint8], subspaces: int, groups: int, codes: NDArray[np.uint8]) -> None:
    """Lays out [block, group, 64 rows, 4 subspaces]: a byte is the place in the group's tables."""
    blocks = codes.shape[0] // (groups * 256) if groups else 0
    for block in range(blocks):
        for group in range(groups):
            for i in range(64):
                row = 64 * block + i
                for j in range(4):
                    subspace = 4 * group + j
                    code = 0
                    if row < packed.shape[0] and subspace < subspaces:
                        code = _code(packed, row, subspace)
                    codes[((block * groups + group) * 64 + i) * 4 + j] = 16 * j + code


@njit(cache=True, nogil=True)
def _fill_256(packed: NDArray[np.uint8], subspaces: int, groups: int, codes: NDArray[np.uint8]) -> None:
    """Lays out [32 rows, subspace, 16 bytes]: byte i has row i in its low bits, row 16 + i above."""
    for row in range(packed.shape[0]):
        block, i = row // 32, row % 32
        for subspace in range(subspaces):
            code = _code(packed, row, subspace)
            at = (block * 4 * groups + subspace) * 16 + i % 16
            codes[at] |= code << (4 * (i // 16))


@njit(cache=True, nogil=True)
def _fill_plain(
    packed: NDArray[np.uint8], subspaces: int, groups: int, codes: NDArray[np.uint8]
) -> None:
    """Lays out [row, subspace]."""
    for row in range(packed.shape[0]):
        for subspace in range(subspaces):
            codes[row * 4 * groups + subspace] = _code(packed, row, subspace)


@njit(cache=True, nogil=True)
def _add_512(
    codes: NDArray[np.uint8],
    blocks: int,
    groups: int,
    tables: NDArray[np.uint8],
    slots: NDArray[np.int64],
    sums: NDArray[np.int32],
) -> None:
    for i in range(slots.shape[0]):
        for block in range(blocks):
            _add_block_512(
                codes, block * groups * 256, groups,
                tables, slots[i] * tables.shape[1], sums, i * sums.shape[1] + block * 64,
            )  # fmt: skip


@njit(cache=True, nogil=True)
def _add_256(
    codes: NDArray[np.uint8],
    blocks: int,
    groups: int,
    tables: NDArray[np.uint8],
    slots: NDArray[np.int64],
    sums: NDArray[np.int32],
) -> None:
    for i in range(slots.shape[0]):
        sums[i] = 0
        for block in range(2 * blocks):
            for group in range(0, groups, _NARROW_GROUPS):
                _add_block_256(
                    codes, (block * groups + group) * 64, min(_NARROW_GROUPS, groups - group),
                    tables, slots[i] * tables.shape[1] + group * 64,
                    sums, i * sums.shape[1] + block * 32,
                )  # fmt: skip


@njit(cache=True, nogil=True)
def _add_plain(
    codes: NDArray[np.uint8],
    blocks: int,
    groups: int,
    tables: NDArray[np.uint8],
    slots: NDArray[np.int64],
    sums: NDArray[np.int32],
) -> None:
    subspaces = 4 * groups
    for i in range(slots.shape[0]):
        table = tables[slots[i]]
        for row in range(sums.shape[1]):
            total = 0
            for subspace in range(subspaces):
                total += table[16 * subspace + codes[row * subspaces + subspace]]
            sums[i, row] = total


_BLOCK_BYTES = {Lookup.AVX512: 256, Lookup.AVX2: 128, Lookup.PLAIN: 256}
_FILL = {Lookup.AVX512: _fill_512, Lookup.AVX2: _fill_256, Lookup.PLAIN: _fill_plain}
_ADD = {Lookup.AVX512: _add_512, Lookup.AVX2: _add_256, Lookup.PLAIN: _add_plain}
