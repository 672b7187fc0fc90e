"""What compiled code needs and Numba has no function for, as LLVM instructions."""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

# Products that are compared at a time.
WIDE = 16

_I32, _FLOAT = ir.IntType(32), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, WIDE)


class BFloat16(ir.Type):
    """LLVM's `bfloat`, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


def call_llvm(builder, name, result, arguments):
    """Calls a function of LLVM's, declared where it is not yet."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    declared = cgutils.get_or_insert_function(builder.module, function, name)
    return builder.call(declared, arguments)


def cpu_features() -> dict[str, bool]:
    """Returns what Numba compiles for: what this CPU has, or what Numba's own settings say."""
    if config.CPU_FEATURES is not None:
        named = str(config.CPU_FEATURES).split(",")
        return {name[1:]: name.startswith("+") for name in named if name}
    features = dict(llvmlite.binding.get_host_cpu_features())
    return features if config.ENABLE_AVX else {n: v and "avx" not in n for n, v in features.items()}


def hardware_converts() -> bool:
    """Tells whether this CPU converts float16 itself (F16C; every 64-bit ARM does)."""
    if llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64")):
        return True
    return cpu_features().get("f16c", False)


def _by_hardware(builder, bits):
    half = _like(bits.type, ir.HalfType())
    return builder.fpext(builder.bitcast(bits, half), _like(bits.type, _FLOAT))


def _by_arithmetic(builder, bits):
    """Moves exponent and fraction to their place, then corrects the bias: 2^(127 - 15).

    Exact for every finite number, subnormal ones too.
    """
    words, floats = _like(bits.type, _I32), _like(bits.type, _FLOAT)

    def every(kind, value):
        return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)

    wide = builder.zext(bits, words)
    magnitude = builder.shl(builder.and_(wide, every(words, 0x7FFF)), every(words, 13))
    number = builder.fmul(builder.bitcast(magnitude, floats), every(floats, 2.0**112))
    sign = builder.shl(builder.and_(wide, every(words, 0x8000)), every(words, 16))
    return builder.bitcast(builder.or_(builder.bitcast(number, words), sign), floats)


def _like(kind, element):
    """A vector of `element` where `kind` is a vector."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _width(kind):
    """The elements of a vector type; 1 of another type."""
    return kind.count if isinstance(kind, ir.VectorType) else 1


def _converter(convert):
    def half_to_float(typing_context, bits):
        """float32 of a float16's bit pattern, uint16; in loops LLVM makes it 8 or 16 wide."""

        def generate(context, builder, signature, arguments):
            return convert(builder, arguments[0])

        return types.float32(types.uint16), generate

    return intrinsic(half_to_float)


def _dot(convert):
    def half_dot(typing_context, a, b, count):
        """Dot product of `count` float16 numbers at two addresses; see vectors for when it is exact.

        A product of two float16 numbers has 22 bits, so float32 holds it; only the sum needs float64.
        That halves the conversions, which are what takes the time.
        """
        half, double = ir.IntType(16), ir.DoubleType()
        halves, doubles = ir.VectorType(half, WIDE), ir.VectorType(double, WIDE)

        def generate(context, builder, signature, arguments):
            a, b, count = arguments
            number = count.type

            def add_products(total, first, steps, kind, sums):
                def load(base, index):
                    offset = builder.add(first, builder.mul(index, ir.Constant(number, _width(kind))))
                    place = builder.add(base, builder.mul(offset, ir.Constant(number, 2)))
                    pointer = builder.inttoptr(place, ir.PointerType())
                    return convert(builder, builder.load(pointer, typ=kind, align=2))

                with cgutils.for_range(builder, steps, intp=number) as loop:
                    product = builder.fmul(load(a, loop.index), load(b, loop.index))
                    longer = builder.fpext(product, sums)
                    builder.store(builder.fadd(builder.load(total, typ=sums), longer), total)

            zeros = ir.Constant(doubles, [0.0] * WIDE)
            total = cgutils.alloca_once_value(builder, zeros)
            builder.store(zeros, total)
            steps = builder.udiv(count, ir.Constant(number, WIDE))
            add_products(total, ir.Constant(number, 0), steps, halves, doubles)
            kind = ir.FunctionType(double, [double, doubles])
            name = f"llvm.vector.reduce.fadd.v{WIDE}f64"
            reduce = cgutils.get_or_insert_function(builder.module, kind, name)
            # Sums are exact, so any order will do.
            summed = builder.call(
                reduce,
                [ir.Constant(double, 0.0), builder.load(total, typ=doubles)],
                fastmath=("reassoc",),
            )
            rest = cgutils.alloca_once_value(builder, summed)
            whole = builder.mul(steps, ir.Constant(number, WIDE))
            add_products(rest, whole, builder.sub(count, whole), half, double)
            return builder.load(rest, typ=double)

        return types.float64(types.intp, types.intp, types.intp), generate

    return intrinsic(half_dot)


halves_to_floats = _by_hardware if hardware_converts() else _by_arithmetic
half_to_float_by_arithmetic, half_dot_by_arithmetic = _converter(_by_arithmetic), _dot(_by_arithmetic)
half_to_float, half_dot = half_to_float_by_arithmetic, half_dot_by_arithmetic
if hardware_converts():
    half_to_float, half_dot = _converter(_by_hardware), _dot(_by_hardware)


def _prefetcher(keep, doc):
    def prefetch(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.PointerType())
            read, kept, data = (ir.Constant(_I32, value) for value in (0, keep, 1))
            function = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
            declared = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
            builder.call(declared, [pointer, read, kept, data])
            return context.get_dummy_value()

        return types.void(types.intp), generate

    prefetch.__doc__ = doc
    return intrinsic(prefetch)


prefetch = _prefetcher(3, "Asks for the cache line of an address, to be read or written soon.")
# More than the first cache holds would push out what is being read.
prefetch_l2 = _prefetcher(2, "Asks for the cache line of an address, into the second cache.")


@intrinsic
def float_bits(typing_context, number):
    """The bit pattern of a float32, uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


@intrinsic
def bits_float(typing_context, bits):
    """The float32 of a bit pattern, uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def passing_mask(typing_context, f, u, v, a, b):
    """Which of 16 products f pass f - a u >= b + v: bit i for the one at index i, uint32.

    `f`, `u` and `v` are addresses of float32 numbers.
    """

    def generate(context, builder, signature, arguments):
        f, u, v = (
            builder.load(builder.inttoptr(address, ir.PointerType()), typ=_FLOATS, align=4)
            for address in arguments[:3]
        )
        a, b = (_spread(builder, number) for number in arguments[3:])
        left = builder.fsub(f, builder.fmul(a, u))
        passes = builder.fcmp_ordered(">=", left, builder.fadd(b, v))
        return builder.zext(builder.bitcast(passes, ir.IntType(WIDE)), _I32)

    return types.uint32(types.intp, types.intp, types.intp, types.float32, types.float32), generate


def _spread(builder, number):
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, WIDE), [0] * WIDE))


@intrinsic
def trailing_zeros(typing_context, bits):
    """The index of the lowest bit that is set, of a uint32 that has one."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int32(types.uint32), generate
