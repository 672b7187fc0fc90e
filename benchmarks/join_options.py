"""The command line of `benchmarks.join`."""

import argparse
from pathlib import Path

from benchmarks.join_runs import PEER_NAMES
from benchmarks.photographs import default_folder

SAMPLE = "sample"
SIZES = ("200000x256", "200000x1280", "1000000x256", SAMPLE)
GROWTH_SIZES = ("50000x256", "200000x256", "1000000x256")
MEMORY_SIZES = ("100000x256", "400000x256")
GRID_SIZES = (
    "5000x64",
    "20000x64",
    "20000x256",
    "50000x256",
    "200000x256",
    "200000x1280",
    "1000000x256",
)
# Recall that the methods of the grid are built for.
GOALS = (0.9, 0.99)
# Sets of more rows are measured with one seed, and short turns once.
LARGE_ROWS = 500_000
SEARCH_SECONDS, PEER_SECONDS = 30.0, 600.0
PARTS = {
    "search": "the search alone, by Kith and FAISS, and its limit",
    "vectors": "from vectors to neighbours, by Kith and FAISS",
    "beam": "kith join beside the bare library call",
    "growth": "the time of a pair at several sizes, with lists of growing and of equal length",
    "methods": "exact, list-major and compressed search at equal recall, and which one auto picks",
    "identical": "a set with identical vectors beside one without",
    "memory": "the memory of a join task at several sizes",
    "peers": "peers with environments of their own, both rows; they come last",
}
K, NPROBE = 21, 16
SEEDS = (0, 1, 2)
IDENTICAL = 0.05


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.join",
        description="Times the join beside the limit of the arithmetic and beside peers.",
        epilog="Parts: " + "; ".join(f"{name}: {what}" for name, what in PARTS.items()) + ".",
    )

    def sizes(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part not in ("", "none"))
        for part in chosen:
            rows, _, dim = part.partition("x")
            if part != SAMPLE and not (rows.isdigit() and dim.isdigit()):
                raise argparse.ArgumentTypeError(
                    f"got {part!r}, wanted sizes such as 200000x256, or {SAMPLE}"
                )
        return chosen

    def peers(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part not in ("", "none"))
        wrong = [part for part in chosen if part not in PEER_NAMES]
        if wrong:
            raise argparse.ArgumentTypeError(
                f"got {wrong[0]!r}, wanted some of {','.join(PEER_NAMES)}, or none"
            )
        return chosen

    def parts(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part not in ("", "none"))
        wrong = [part for part in chosen if part not in PARTS]
        if wrong:
            raise argparse.ArgumentTypeError(
                f"got {wrong[0]!r}, wanted some of {','.join(PARTS)}, or none"
            )
        return chosen

    def goals(text: str) -> tuple[float, ...]:
        chosen = tuple(float(part) for part in text.split(","))
        for goal in chosen:
            if not 0 < goal < 1:
                raise argparse.ArgumentTypeError(
                    f"got {goal:g}, wanted recalls between 0 and 1, such as 0.9,0.99"
                )
        return chosen

    def seeds(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser.add_argument(
        "--sizes",
        type=sizes,
        default=SIZES,
        metavar="NxD,...",
        help=f"made sets; {SAMPLE}: the sample's embeddings; default {','.join(SIZES)}",
    )
    parser.add_argument(
        "--real",
        action="append",
        default=[],
        metavar="DIR",
        help="also the vectors of an embeddings dataset; may be repeated",
    )
    parser.add_argument(
        "--only", type=parts, default=tuple(PARTS), metavar="PART,...", help="default: all parts"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="FILE",
        help="add each measurement to this file at once; what it holds already is shown, too",
    )
    parser.add_argument(
        "--seeds",
        type=seeds,
        default=SEEDS,
        metavar="A,B",
        help=f"of made sets; those of more than {LARGE_ROWS:,} rows take the first alone",
    )
    parser.add_argument("--rounds", type=int, default=1, help="for each seed")
    parser.add_argument(
        "--peers",
        type=peers,
        default=PEER_NAMES,
        metavar="A,B",
        help=f"of {','.join(PEER_NAMES)}; or none",
    )
    parser.add_argument(
        "--search-seconds",
        type=float,
        default=SEARCH_SECONDS,
        metavar="SEC",
        help="a longer search of a peer, or an exact one of the part methods, is measured on a sample "
        "of the queries, and multiplied",
    )
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=PEER_SECONDS,
        metavar="SEC",
        help="a peer with its own environment is stopped then: it takes so long at least",
    )
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--nprobe", type=int, default=NPROBE)
    parser.add_argument(
        "--identical",
        type=float,
        default=IDENTICAL,
        help="share of identical vectors in that part; 0: none",
    )
    parser.add_argument("--growth", type=sizes, default=GROWTH_SIZES, metavar="NxD,...",
                        help=f"sets of that part; default {','.join(GROWTH_SIZES)}")  # fmt: skip
    parser.add_argument("--grid", type=sizes, default=GRID_SIZES, metavar="NxD,...",
                        help=f"sets of the part methods; default {','.join(GRID_SIZES)}")  # fmt: skip
    parser.add_argument(
        "--goals",
        type=goals,
        default=GOALS,
        metavar="R,...",
        help=f"recalls of that part; default {','.join(f'{goal:g}' for goal in GOALS)}",
    )
    parser.add_argument(
        "--memory",
        type=sizes,
        default=MEMORY_SIZES,
        metavar="NxD,...",
        help=f"sets of that part; default {','.join(MEMORY_SIZES)}",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_folder(),
        help="vectors, indexes, scratch and environments of peers",
    )
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of tables")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.k < 1 or options.nprobe < 1:
        parser.error("--rounds, --k and --nprobe must be at least 1")
    if SAMPLE in (*options.grid, *options.growth, *options.memory):
        parser.error(f"--grid, --growth and --memory take sizes, not {SAMPLE}")
    return options
