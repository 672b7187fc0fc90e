"""What a night costs by each method, from vectors to neighbours: the model behind the choice of one.

Nanoseconds of one core, fitted to the CPU time of 47 builds with their joins, of 5,000 x 64 to
200,000 x 256 and 30,000 x 1280 made vectors (`benchmarks.vectors`) in float32 and in bfloat16, and of
30 more joins with k 5 to 100, on a CPU with AVX-512 and AMX. Half of the nights are foretold within
6 %, all but one within 18 %; a search of few rows with k 100 is off by 40 %. Only ratios count: those
that `python -m benchmarks.join --only methods` measures.

- To compare all with all costs only the pairs. To look at the nearest lists costs clustering the
  vectors, ranking the lists of each, and, where a recall is promised, choosing nprobe by an exact
  search of a sample before. So lists pay for many vectors alone, later where pairs are cheap.
- A row costs less by its code than by its vector; but for every proposal there is one to be kept and
  one exact score, whatever the rows looked through. So codes win where many rows are probed for each
  wanted.
- A CPU that multiplies in bfloat16 (AMX) takes a fifth to a third of the time for a pair.
"""

import dataclasses

# A gain below this is not worth the neighbours that codes miss, and lists that are not probed.
LEAST_GAIN = 1.2
LEAST_GAIN_OF_LISTS = 1.1
# Lists that are probed are larger than the mean: a row is more often in a large list.
LIST_SKEW = 1.5
# Rounds of k-means (training.KMEANS_ITERATIONS) and queries that nprobe is chosen on (by default).
ROUNDS = 10
CALIBRATION_QUERIES = 1000
# Calibration runs on one core, the rest on all: it counts as on a host of two.
CORES = 2


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Nanoseconds of a pair: `each` and for every number. Searched, of k-means, of a row and a list."""

    searched: tuple[float, float]
    clustered: tuple[float, float]
    assigned: tuple[float, float]


_FLOAT32 = _Pairs(searched=(0.1, 0.0118), clustered=(0.2, 0.0120), assigned=(0.13, 0.0109))
_BFLOAT16 = _Pairs(searched=(0.3, 0.0021), clustered=(1.3, 0.0020), assigned=(0.03, 0.0017))

# A query: each neighbour that is kept, each number of its vector, each list that it probes.
_NEIGHBOR, _QUERY_NUMBER, _PROBE = 350.0, 7.5, 97.0
# By codes: each list, each row looked through and each number of it, each proposal and its numbers.
_CODED_PROBE, _CODED_ROW, _CODED_NUMBER = 124.0, 0.1, 0.0047
_PROPOSAL, _PROPOSAL_NUMBER = 122.0, 0.133
# K-means beside its pairs: a number of a row that is added to its centroid.
_ADDED_NUMBER = 0.7
# A list that is kept of a row, nearest first.
_RANKED_LIST = 94.0
# Calibration: a query, each of its numbers, a row that it is compared with, each number of that.
_SAMPLED, _SAMPLED_NUMBER, _COMPARED, _COMPARED_NUMBER = 127e3, 447.0, 4.8, 0.039
# Codes: learning the codewords of a number, and finding that of a row's.
_CODEWORDS_NUMBER, _ENCODED_NUMBER = 1.5e6, 11.0
# What every method does: begin; read, check, assign and write a row; each number of it.
_BEGUN, _ROW, _NUMBER = 65e6, 6300.0, 32.0


def probed_rows(rows: int, nlist: int, nprobe: int) -> float:
    """Guesses the rows in the lists that a query probes."""
    return rows * min(1.0, LIST_SKEW * nprobe / nlist) if nprobe < nlist else float(rows)


def _of(pair: tuple[float, float], dim: int) -> float:
    return pair[0] + pair[1] * dim


def _pairs(bfloat16: bool) -> _Pairs:
    return _BFLOAT16 if bfloat16 else _FLOAT32


def vectors_cost(probed: float, dim: int, k: int, nprobe: int, bfloat16: bool = False) -> float:
    """Returns the nanoseconds of a query whose probed rows are scored by their vectors.

    `bfloat16` tells whether the host multiplies in it.
    """
    pairs = probed * _of(_pairs(bfloat16).searched, dim)
    return _NEIGHBOR * k + _QUERY_NUMBER * dim + _PROBE * nprobe + pairs


def codes_cost(probed: float, dim: int, proposals: int, nprobe: int) -> float:
    """Returns those of a query whose probed rows are looked through by their codes.

    Its table, the lists, the rows themselves, then what is proposed: kept, ordered and scored.
    """
    proposals = min(proposals, int(probed))
    rows = probed * (_CODED_ROW + _CODED_NUMBER * dim)
    decided = proposals * (_PROPOSAL + _PROPOSAL_NUMBER * dim)
    return _QUERY_NUMBER * dim + _CODED_PROBE * nprobe + rows + decided


def codes_over_pairs(
    probed: float, dim: int, proposals: int, nprobe: int, bfloat16: bool = False
) -> float:
    """Returns the time of a search by codes, as a share of what scoring its pairs by vectors takes."""
    pairs = max(1.0, probed) * _of(_pairs(bfloat16).searched, dim)
    return codes_cost(probed, dim, proposals, nprobe) / pairs


@dataclasses.dataclass(frozen=True)
class Night:
    """An index of `rows` vectors that is joined with itself, on a host of a kind.

    `proposals`: by codes for a query, or None where vectors are looked at.
    """

    rows: int
    dim: int
    k: int
    bfloat16: bool
    proposals: int | None = None

    def cost(self, clustered: int, nlist: int, nprobe: int, *, calibrated: bool) -> float:
        """Returns the nanoseconds from vectors to neighbours, times the cores of a host of two.

        K-means looks at `clustered` rows; `calibrated`: nprobe is chosen on a sample before.
        """
        kind, dim = _pairs(self.bfloat16), self.dim
        listed = clustered * (nlist * _of(kind.clustered, dim) + _ADDED_NUMBER * dim)
        # Where all lists are searched they need no order.
        ranked = nprobe if nprobe < nlist else 0
        assigned = nlist * _of(kind.assigned, dim) + _RANKED_LIST * ranked
        probed = probed_rows(self.rows, nlist, nprobe)
        if self.proposals is None:
            found, codewords = vectors_cost(probed, dim, self.k, nprobe, self.bfloat16), 0.0
        else:
            found = codes_cost(probed, dim, self.proposals, nprobe) + _ENCODED_NUMBER * dim
            codewords = _CODEWORDS_NUMBER * dim
        chosen = CORES * self.calibration_cost() if calibrated else 0.0
        shared = _BEGUN + self.rows * (_ROW + _NUMBER * dim)
        return shared + ROUNDS * listed + codewords + chosen + self.rows * (assigned + found)

    def calibration_cost(self) -> float:
        """Returns the nanoseconds of choosing nprobe, on one core."""
        compared = self.rows * (_COMPARED + _COMPARED_NUMBER * self.dim)
        queries = min(self.rows, CALIBRATION_QUERIES)
        return queries * (_SAMPLED + _SAMPLED_NUMBER * self.dim + compared)
