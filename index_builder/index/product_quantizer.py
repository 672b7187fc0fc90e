"""A product quantizer of 4 bits for every four numbers: codes of rows, and tables of queries.

A vector is cut into subspaces of four numbers; the code of each is the number of its nearest of 16
codewords, which are float16. A query's table says, for every subspace and codeword, what a row with
that code costs, in 8 bits: the lower a row's sum, the likelier it is a neighbour. Everything but the
training is exact in float64 and in whole numbers, so codes and tables are the same on every machine.
"""

import dataclasses
from typing import Any

import faiss
import numpy as np
from numba import njit
from numpy.typing import NDArray

from index_builder.index.code_sums import CODES, table_bytes
from index_builder.scoring.metrics import Metric

# Numbers of a subspace: half a byte for four numbers is a sixteenth of their float16.
SUBSPACE = 4
# FAISS trains 16 codewords on no more rows than this.
_TRAINING_ROWS = 256 * CODES
_ITERATIONS = 25
# Rows that are widened to float64 at a time.
_BLOCK_ROWS = 1024
# The largest number of a table.
_LARGEST = 255.0


def subspaces_of(dim: int) -> int:
    """Returns into how many subspaces a vector is cut; the last is filled up with zeros."""
    return -(-dim // SUBSPACE)


def code_bytes(dim: int) -> int:
    """Returns the length of a row's code: two subspaces a byte."""
    return -(-subspaces_of(dim) // 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Codebooks:
    """The codewords of every subspace, float16 [subspaces, 16, 4], of vectors with `dim` numbers."""

    values: NDArray[np.float16]
    dim: int

    def __post_init__(self) -> None:
        wanted = (subspaces_of(self.dim), CODES, SUBSPACE)
        if self.values.shape != wanted or self.values.dtype != np.float16:
            raise ValueError(
                f"codebooks are {self.values.dtype} {self.values.shape}, wanted float16 {wanted} for "
                f"vectors of {self.dim} numbers"
            )

    @property
    def subspaces(self) -> int:
        """Into how many subspaces a vector is cut."""
        return len(self.values)

    def encode(self, vectors: NDArray[np.float16]) -> NDArray[np.uint8]:
        """Returns the codes of vectors [n, dim] of a norm of about 1 at most, uint8 [n, code_bytes].

        The nearest codeword counts, of equally near ones the first. Subspace 2 j is in the low four
        bits of byte j, 2 j + 1 in the high ones.
        """
        codes = np.zeros((len(vectors), code_bytes(self.dim)), dtype=np.uint8)
        numbers, lengths = self._wide()
        for start in range(0, len(vectors), _BLOCK_ROWS):
            block = self._padded(vectors[start : start + _BLOCK_ROWS])
            _encode(block, numbers, lengths, codes[start : start + _BLOCK_ROWS])
        return codes

    def tables(self, vectors: NDArray[np.float16], metric: Metric) -> NDArray[np.uint8]:
        """Returns the tables of queries [n, dim], uint8 [n, table_bytes].

        The cost of a codeword is |c|^2 - 2 q c under euclidean, else - q c, above the cheapest of its
        subspace, in units of the widest subspace's range / 255.
        """
        tables = np.zeros((len(vectors), table_bytes(self.subspaces)), dtype=np.uint8)
        numbers, lengths = self._wide()
        factor = -2.0 if metric is Metric.EUCLIDEAN else -1.0
        offsets = lengths if metric is Metric.EUCLIDEAN else np.zeros_like(lengths)
        for start in range(0, len(vectors), _BLOCK_ROWS):
            block = self._padded(vectors[start : start + _BLOCK_ROWS])
            _fill_tables(block, numbers, offsets, factor, tables[start : start + _BLOCK_ROWS])
        return tables

    def _wide(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the codewords, float64 [subspaces, 4, 16], and their squared norms."""
        wide = self.values.astype(np.float64)
        return np.ascontiguousarray(wide.transpose(0, 2, 1)), np.square(wide).sum(axis=2)

    def _padded(self, vectors: NDArray[np.float16]) -> NDArray[np.float64]:
        padded = np.zeros((len(vectors), self.subspaces * SUBSPACE))
        padded[:, : self.dim] = vectors
        return padded


def train_codebooks(vectors: NDArray[np.floating[Any]], seed: int) -> Codebooks:
    """Learns the codewords of vectors [n, dim] by FAISS's k-means, seeded, and rounds them."""
    dim, rng = vectors.shape[1], np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(vectors))[:_TRAINING_ROWS])
    subspaces = subspaces_of(dim)
    sample = np.zeros((max(len(rows), CODES), subspaces * SUBSPACE), dtype=np.float32)
    # Fewer vectors than codewords are repeated: some codewords are then never the nearest.
    sample[:, :dim] = vectors[np.resize(rows, len(sample))]
    quantizer = faiss.ProductQuantizer(subspaces * SUBSPACE, subspaces, 4)
    quantizer.cp.seed, quantizer.cp.niter = seed, _ITERATIONS
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(sample)
    found = faiss.vector_to_array(quantizer.centroids).reshape(subspaces, CODES, SUBSPACE)
    # A zero has no sign.
    return Codebooks(found.astype(np.float16) + np.float16(0), dim)


# Rows are not sliced in what follows: a slice counts a reference, in memory that threads share.
@njit(cache=True, nogil=True, forceinline=True)
def _fill_costs(
    vectors: NDArray[np.float64],
    i: int,
    numbers: NDArray[np.float64],
    offsets: NDArray[np.float64],
    factor: float,
    subspace: int,
    costs: NDArray[np.float64],
    row: int,
) -> None:
    """Writes offset + factor v c of the 16 codewords to a row: exact, so in any order."""
    first = subspace * SUBSPACE
    a, b = factor * vectors[i, first], factor * vectors[i, first + 1]
    c, d = factor * vectors[i, first + 2], factor * vectors[i, first + 3]
    for code in range(CODES):
        costs[row, code] = (
            offsets[subspace, code]
            + (a * numbers[subspace, 0, code] + b * numbers[subspace, 1, code])
            + (c * numbers[subspace, 2, code] + d * numbers[subspace, 3, code])
        )


@njit(cache=True, nogil=True)
def _encode(
    vectors: NDArray[np.float64],
    numbers: NDArray[np.float64],
    lengths: NDArray[np.float64],
    codes: NDArray[np.uint8],
) -> None:
    costs = np.empty((1, CODES))
    for i in range(vectors.shape[0]):
        for subspace in range(numbers.shape[0]):
            _fill_costs(vectors, i, numbers, lengths, -2.0, subspace, costs, 0)
            nearest = 0
            for code in range(1, CODES):
                if costs[0, code] < costs[0, nearest]:
                    nearest = code
            codes[i, subspace >> 1] |= nearest << (4 * (subspace & 1))


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_tables(
    vectors: NDArray[np.float64],
    numbers: NDArray[np.float64],
    offsets: NDArray[np.float64],
    factor: float,
    tables: NDArray[np.uint8],
) -> None:
    """Costs are exact; each is then subtracted, multiplied and rounded once, in this order."""
    subspaces = numbers.shape[0]
    costs = np.empty((subspaces, CODES))
    least = np.empty(subspaces)
    lows, highs = np.empty(CODES // 2), np.empty(CODES // 2)
    for i in range(vectors.shape[0]):
        widest = 0.0
        for subspace in range(subspaces):
            _fill_costs(vectors, i, numbers, offsets, factor, subspace, costs, subspace)
            # By halves, each of which is an instruction or two.
            for code in range(CODES // 2):
                a, b = costs[subspace, code], costs[subspace, code + CODES // 2]
                lows[code], highs[code] = (a, b) if a < b else (b, a)
            for code in range(CODES // 4):
                lows[code] = min(lows[code], lows[code + CODES // 4])
                highs[code] = max(highs[code], highs[code + CODES // 4])
            low = min(min(lows[0], lows[1]), min(lows[2], lows[3]))
            high = max(max(highs[0], highs[1]), max(highs[2], highs[3]))
            least[subspace] = low
            widest = max(widest, high - low)
        unit = _LARGEST / widest if widest > 0 else 0.0
        for subspace in range(subspaces):
            low = least[subspace]
            for code in range(CODES):
                rounded = np.int32((costs[subspace, code] - low) * unit + 0.5)
                tables[i, subspace * CODES + code] = np.uint8(rounded)
