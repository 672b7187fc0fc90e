"""A fast product in bfloat16 by the CPU's own instructions, compiled by Numba.

Inputs are rounded to bfloat16, sums are float32. The join scores exactly whatever comes near the
threshold, with the larger error bound of rounded inputs, so its result is the same bytes.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.scoring.bfloat16_kernels import (
    AMX_ROWS,
    AVX512_ROWS,
    BLOCK,
    STEP,
    amx_allowed,
    amx_block,
    avx512_allowed,
    avx512_block,
    begin_tiles,
    end_tiles,
    tile_configuration,
)
from index_builder.scoring.intrinsics import float_bits, half_to_float
from index_builder.scoring.widening import prefetch_row

# Corpus vectors that one call of a kernel takes.
_COLUMNS = 2 * BLOCK
_CACHE_LINE = 64


@dataclasses.dataclass(frozen=True)
class NativeBfloat16Product:
    """index_builder.scoring.products.Product in bfloat16: by AMX tiles, or by AVX512-BF16."""

    amx: bool
    unit_roundoff: float = 2.0**-8

    @property
    def name(self) -> str:
        """What a log calls it."""
        return "AMX bfloat16" if self.amx else "AVX512 bfloat16"

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Writes queries [m, d] times corpus [n, d] transposed to out [m, n].

        Both hold float16 numbers. For one tile: a join keeps a Bfloat16Proposer.
        """
        proposer = Bfloat16Proposer(self, len(queries), len(corpus), queries.shape[1])
        proposer.take_queries(queries.astype(np.float16), np.arange(len(queries)))
        proposer.take_corpus(corpus.astype(np.float16), np.arange(len(corpus)))
        proposer.multiply(out)


@functools.cache
def bfloat16_products() -> tuple[NativeBfloat16Product, ...]:
    """Returns the bfloat16 products that this CPU has, the best first."""
    found = [NativeBfloat16Product(amx=True)] if amx_allowed() else []
    if avx512_allowed():
        found.append(NativeBfloat16Product(amx=False))
    return tuple(found)


class Bfloat16Proposer:
    """A Proposer (see `proposers`) that rounds float16 rows straight to packed bfloat16 tiles."""

    def __init__(
        self, product: NativeBfloat16Product, most_queries: int, most_corpus: int, dim: int
    ) -> None:
        self._amx = product.amx
        self._tile = AMX_ROWS if product.amx else AVX512_ROWS
        steps = -(-dim // STEP)
        self._queries = _aligned((_padded(most_queries, self._tile), steps * STEP), np.uint16)
        blocks = _padded(most_corpus, _COLUMNS) // BLOCK
        self._corpus = _aligned((blocks, steps, BLOCK, BLOCK), np.uint32)
        self._edge = _aligned((self._tile, _COLUMNS), np.float32)
        self._configuration = tile_configuration()

    def take_queries(self, vectors: NDArray[np.float16], rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        _round_rows(vectors.view(np.uint16), rows, self._queries)

    def take_corpus(self, vectors: NDArray[np.float16], rows: NDArray[np.int64]) -> None:
        """See Proposer."""
        _pack_blocks(vectors.view(np.uint16), rows, self._corpus)

    def multiply(self, out: NDArray[np.float32]) -> None:
        """See Proposer."""
        if self._amx:
            _multiply_amx(self._queries, self._corpus, out, self._edge, self._configuration)
        else:
            _multiply_avx512(self._queries, self._corpus, out, self._edge)


def _aligned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeros that begin on a cache line: loads of a whole line are then of one."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + _CACHE_LINE, dtype=np.uint8)
    start = -buffer.ctypes.data % _CACHE_LINE
    aligned: NDArray[Any] = buffer[start : start + size].view(dtype).reshape(shape)
    return aligned


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@njit(cache=True, nogil=True, inline="always")
def _rounded(bits: int) -> np.uint16:
    """The nearest bfloat16 of a float16's bit pattern, ties to even; finite numbers only."""
    word = float_bits(half_to_float(bits))
    return np.uint16(
        (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@njit(cache=True, nogil=True)
def _round_rows(bits: NDArray[np.uint16], rows: NDArray[np.int64], out: NDArray[np.uint16]) -> None:
    """Rounds rows of float16 [n, d]; dimensions beyond d of `out` stay as they are, zero."""
    address, row_bytes = bits.ctypes.data, 2 * bits.shape[1]
    for i in range(rows.shape[0]):
        prefetch_row(address, row_bytes, rows, i)
        row = np.uint64(rows[i])
        for j in range(np.uint64(bits.shape[1])):
            out[i, j] = _rounded(bits[row, j])


@njit(cache=True, nogil=True)
def _pack_blocks(bits: NDArray[np.uint16], rows: NDArray[np.int64], out: NDArray[np.uint32]) -> None:
    """Rounds as `_round_rows`, into blocks of 16 vectors (see bfloat16_kernels)."""
    dim = bits.shape[1]
    steps = out.shape[1]
    line = np.zeros(steps * 32, dtype=np.uint16)
    pairs = line.view(np.uint32)
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(dim):
            line[j] = _rounded(bits[row, j])
        block, column = i // 16, i % 16
        for step in range(steps):
            for r in range(16):
                out[block, step, r, column] = pairs[step * 16 + r]


@njit(cache=True, nogil=True)
def _multiply_amx(
    a: NDArray[np.uint16],
    b: NDArray[np.uint32],
    out: NDArray[np.float32],
    edge: NDArray[np.float32],
    configuration: NDArray[np.uint8],
) -> None:
    steps = b.shape[1]
    m, n = out.shape
    a_stride, b_stride, c_stride = 2 * a.shape[1], 4 * 256 * steps, 4 * n
    begin_tiles(configuration.ctypes.data)
    for j in range(0, n, 32):
        right = b.ctypes.data + (j // 16) * b_stride
        for i in range(0, m, 32):
            left = a.ctypes.data + i * a_stride
            if i + 32 <= m and j + 32 <= n:
                place = out.ctypes.data + i * c_stride + 4 * j
                amx_block(left, a_stride, right, b_stride, place, c_stride, steps)
            else:
                amx_block(left, a_stride, right, b_stride, edge.ctypes.data, 128, steps)
                for row in range(min(32, m - i)):
                    for column in range(min(32, n - j)):
                        out[i + row, j + column] = edge[row, column]
    end_tiles()


@njit(cache=True, nogil=True)
def _multiply_avx512(
    a: NDArray[np.uint16], b: NDArray[np.uint32], out: NDArray[np.float32], edge: NDArray[np.float32]
) -> None:
    steps = b.shape[1]
    m, n = out.shape
    a_stride, b_stride, c_stride = 2 * a.shape[1], 4 * 256 * steps, 4 * n
    for j in range(0, n, 32):
        right = b.ctypes.data + (j // 16) * b_stride
        for i in range(0, m, 12):
            left = a.ctypes.data + i * a_stride
            if i + 12 <= m and j + 32 <= n:
                place = out.ctypes.data + i * c_stride + 4 * j
                avx512_block(left, a_stride, right, b_stride, place, c_stride, steps)
            else:
                avx512_block(left, a_stride, right, b_stride, edge.ctypes.data, 128, steps)
                for row in range(min(12, m - i)):
                    for column in range(min(32, n - j)):
                        out[i + row, j + column] = edge[row, column]
