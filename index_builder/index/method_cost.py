"""Whether codes find neighbours faster than vectors do: what a query costs by either.

Nanoseconds of one core, fitted to joins of 50,000 x 256 and 30,000 x 1280 vectors (k 21, nprobe 16 to
160, refine 10) in one run on a CPU with AVX-512; 12 % off at most there. Only their ratio counts.
A row costs less by its code than by its vector; but for every proposal there is one to be kept and one
exact score, whatever the rows looked through. So codes win where many rows are probed for each wanted.
A CPU that multiplies in bfloat16 (AMX) takes about a third of the time for the product of a pair.
"""

# A gain below this is not worth the neighbours that codes miss.
LEAST_GAIN = 1.2
# Lists that are probed are larger than the mean: a row is more often in a large list.
LIST_SKEW = 1.5


def probed_rows(rows: int, nlist: int, nprobe: int) -> float:
    """Guesses the rows in the lists that a query probes."""
    return rows * min(1.0, LIST_SKEW * nprobe / nlist) if nprobe < nlist else float(rows)


def _pair_cost(dim: int, bfloat16: bool) -> float:
    return 0.6 + (0.0105 if bfloat16 else 0.0314) * dim


def vectors_cost(probed: float, dim: int, k: int, bfloat16: bool = False) -> float:
    """Returns the nanoseconds of a query whose probed rows are scored by their vectors.

    `bfloat16` tells whether the host multiplies in it.
    """
    return 850 * k + probed * _pair_cost(dim, bfloat16)


def codes_cost(probed: float, dim: int, proposals: int) -> float:
    """Returns those of a query whose probed rows are looked through by their codes.

    Its table, the rows themselves, then what is proposed: kept, ordered and scored.
    """
    proposals = min(proposals, int(probed))
    return 5_000 + 20 * dim + probed * (1.2 + 0.008 * dim) + proposals * (180 + 0.116 * dim)


def codes_over_pairs(probed: float, dim: int, proposals: int, bfloat16: bool = False) -> float:
    """Returns the time of a search by codes, as a share of what scoring its pairs by vectors takes."""
    pairs = max(1.0, probed) * _pair_cost(dim, bfloat16)
    return codes_cost(probed, dim, proposals) / pairs
