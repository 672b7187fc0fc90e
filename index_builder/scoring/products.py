"""Fast products that propose neighbours; the exact score decides, so which one is taken is free.

What this process has is timed once, with one thread, and the fastest is taken: the BLAS libraries that
are loaded (NumPy's and SciPy's at least), which bring different OpenBLAS builds and choose different
kernels for the same CPU, and Kith's own kernels for its vectors, its bfloat16 and its products of
8-bit integers, where it has any.
"""

import contextlib
import ctypes
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import scipy.linalg.blas  # noqa: F401 (its BLAS is one of those compared)
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from index_builder.scoring.integer_products import integer_products
from index_builder.scoring.integer_rows import MOST_DIM, mean_share
from index_builder.scoring.native_products import (
    AmxProduct,
    NativeProduct,
    bfloat16_products,
    float32_products,
)
from index_builder.scoring.vector_rows import VectorRows
from index_builder.scoring.widening import widen_rows

_LOGGER = logging.getLogger(__name__)

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
_SYMBOLS = ("cblas_sgemm", "cblas_sgemm64_", "scipy_cblas_sgemm", "scipy_cblas_sgemm64_")
# About one tile of a join.
_TIMED_SHAPE = (384, 256, 512)
_TIMED_CALLS = 8
# In bfloat16 about a fifth more pairs are scored, and its larger bound needs looking at more of them;
# with integers nearly twice as many as in float32, which at 256 dimensions takes what they save.
_WORTH_ROUNDING = 1.3
_LEAST_INTEGER_DIM = 384
# What rounding to integers may take of a vector: 0.008 of numbers that are spread normally. Where few
# numbers are far larger than the others it takes more, and too many pairs are scored.
_MOST_SHARE = 0.02
_TRIED_VECTORS = 256


class Product(Protocol):
    """Multiplies rows by rows in the caller's thread, for many threads at once.

    `unit_roundoff` is that of the type its inputs are rounded to: 2^-8 for bfloat16, 0 where float32
    holds them exactly. It must sum in float32 or better, and hand out float32.
    """

    @property
    def name(self) -> str:
        """What a log calls it."""
        ...

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding an input."""
        ...

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Writes queries [m, d] times corpus [n, d] transposed to out [m, n], all C-contiguous."""
        ...


@dataclasses.dataclass(frozen=True)
class NumpyProduct:
    """NumPy's matrix product."""

    name: str = "numpy"
    unit_roundoff: float = 0.0

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """See Product."""
        np.matmul(queries, corpus.T, out=out)


@dataclasses.dataclass(frozen=True)
class BlasProduct:
    """The matrix product of one BLAS library."""

    name: str
    sgemm: Callable[..., None]
    unit_roundoff: float = 0.0

    def multiply(
        self, queries: NDArray[np.float32], corpus: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """See Product."""
        (m, d), n = queries.shape, len(corpus)
        self.sgemm(
            _ROW_MAJOR, _AS_IT_IS, _TRANSPOSED, m, n, d,
            1.0, queries.ctypes.data, d, corpus.ctypes.data, d, 0.0, out.ctypes.data, n,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TimedProduct:
    """A product and its rate on this host, one thread, in flop a second."""

    product: Product
    flops: float


_MEASURING = threading.Lock()


def product_for(queries: VectorRows) -> Product:
    """Returns the product that a join of such queries takes on this host.

    That is `fastest_product`, or one of 8-bit integers where that is clearly faster still, for vectors
    that lose little by it; AMX is as fast by itself, and then nothing else is compiled or timed.
    """
    fastest, rows, dim = fastest_product(), len(queries), queries.dim
    if isinstance(fastest, AmxProduct) or not rows or not _LEAST_INTEGER_DIM <= dim <= MOST_DIM:
        return fastest
    rated = timed_integer_products()
    if not rated or rated[0].flops <= _WORTH_ROUNDING * _rate(fastest):
        return fastest
    tried = np.linspace(0, rows - 1, min(_TRIED_VECTORS, rows)).astype(np.int64)
    return rated[0].product if mean_share(queries.take(tried)) <= _MOST_SHARE else fastest


def fastest_product() -> Product:
    """Returns the float32 or bfloat16 product that is best on this host; the first call measures.

    That is the fastest float32 product, unless one in bfloat16 is so much faster that it pays to score
    the pairs exactly that its larger error lets through.
    """
    exact, rounded = timed_products()[0], timed_bfloat16_products()
    if rounded and rounded[0].flops > _WORTH_ROUNDING * exact.flops:
        return rounded[0].product
    return exact.product


def multiplies_bfloat16() -> bool:
    """Tells whether joins on this host take a product that rounds its inputs."""
    return fastest_product().unit_roundoff > 0


def _rate(product: Product) -> float:
    """Returns the rate of a product that was timed."""
    timed = (*timed_products(), *timed_bfloat16_products())
    return next(one.flops for one in timed if one.product is product)


def timed_integer_products() -> tuple[TimedProduct, ...]:
    """Returns the product of 8-bit integers of this CPU, if it has one; measured once a process."""
    with _MEASURING:
        return _time_integer_products()


def timed_bfloat16_products() -> tuple[TimedProduct, ...]:
    """Returns the best bfloat16 product of this CPU, if it has one; measured once a process."""
    with _MEASURING:
        return _time_bfloat16_products()


def timed_products() -> tuple[TimedProduct, ...]:
    """Returns the float32 products of this process, fastest first; measured once a process."""
    with _MEASURING:
        return _time_products()


@functools.cache
def _time_products() -> tuple[TimedProduct, ...]:
    return _fastest_first("float32", [*float32_products(), *_found_products()])


@functools.cache
def _time_bfloat16_products() -> tuple[TimedProduct, ...]:
    # Tiles are eight times as fast as AVX512: where they are, nothing else is compiled or timed.
    return _fastest_first("bfloat16", bfloat16_products()[:1])


@functools.cache
def _time_integer_products() -> tuple[TimedProduct, ...]:
    return _fastest_first("int8", integer_products())


def _fastest_first(kind: str, products: Sequence[Product]) -> tuple[TimedProduct, ...]:
    with single_threaded():
        rates = _rates(products)
    timed = [TimedProduct(*pair) for pair in zip(products, rates, strict=True)]
    timed.sort(key=lambda one: -one.flops)
    found = ", ".join(f"{one.product.name} {one.flops / 1e9:.0f}" for one in timed)
    _LOGGER.info("%s products, GFLOP/s a thread, fastest first: %s", kind, found or "none")
    return tuple(timed)


def _found_products() -> list[Product]:
    found: list[Product] = [NumpyProduct()]
    for library in threadpool_info():
        # Built on OpenMP (FAISS's), a BLAS takes its threads from the calling thread's own settings,
        # so it would start threads under ours.
        if library["user_api"] != "blas" or library.get("threading_layer") == "openmp":
            continue
        loaded = ctypes.CDLL(library["filepath"])
        for symbol in _SYMBOLS:
            sgemm = getattr(loaded, symbol, None)
            if sgemm is not None:
                found.append(BlasProduct(_describe(library), _declare(sgemm)))
                break
    return found


def _describe(library: dict[str, str]) -> str:
    file = os.path.basename(library["filepath"]).split("-")[0].removesuffix(".so")
    return f"{file} {library.get('version')} {library.get('architecture', '')}".strip()


def _declare(sgemm: Callable[..., None]) -> Callable[..., None]:
    """States the types of cblas_sgemm.

    Sizes go as 64 bits to libraries of 32 bits too: in registers and on the stack of x86-64 and
    AArch64 the lower half of a small number is the number.
    """
    # To the type checker it is a plain function; in truth it is a ctypes one, which has both fields.
    size, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    sgemm.argtypes = [  # type: ignore[attr-defined]
        ctypes.c_int, ctypes.c_int, ctypes.c_int, size, size, size,
        number, pointer, size, pointer, size, number, pointer, size,
    ]  # fmt: skip
    sgemm.restype = None  # type: ignore[attr-defined]
    return sgemm


def _rates(products: Sequence[Product]) -> list[float]:
    """Returns the rates of products on a tile of float16 rows: packing or widening them counts.

    They take turns, so that a moment in which the host does something else does not strike one alone.
    """
    m, n, d = _TIMED_SHAPE
    halves = VectorRows.of(np.random.default_rng(0).normal(size=(m, d)))
    calls = [_tile_call(product, halves) for product in products]
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(_TIMED_CALLS):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [2.0 * m * n * d / min(times) for times in seconds]


def _tile_call(product: Product, halves: VectorRows) -> Callable[[], None]:
    """Returns what multiplies a tile of _TIMED_SHAPE from float16 rows."""
    m, n, d = _TIMED_SHAPE
    queries, corpus = np.empty((m, d), dtype=np.float32), np.empty((n, d), dtype=np.float32)
    out, rows = np.empty((m, n), dtype=np.float32), np.arange(m)
    packing = product.open(m, n, d) if isinstance(product, NativeProduct) else None

    def call() -> None:
        if packing:
            packing.take_queries(halves, rows)
            packing.take_corpus(halves, rows[:n])
            packing.multiply(out)
        else:
            widen_rows(halves.arrays, rows, queries)
            widen_rows(halves.arrays, rows[:n], corpus)
            product.multiply(queries, corpus, out)

    return call


class _SingleThreaded:
    """How many blocks of this process want single-threaded products, and how to undo it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limits: threadpool_limits | None = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limits = threadpool_limits(1, user_api="blas")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._limits is not None:
                self._limits.restore_original_limits()


_SINGLE_THREADED = _SingleThreaded()


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Limits every BLAS to the calling thread, until the last such block of the process ends.

    The limit is one of the process, so blocks of several threads must not restore it on their own.
    """
    _SINGLE_THREADED.enter()
    try:
        yield
    finally:
        _SINGLE_THREADED.leave()
