"""The command line of `benchmarks.join`."""

import argparse
from pathlib import Path

from benchmarks.join_runs import PEER_NAMES
from benchmarks.photographs import default_folder

SAMPLE = "sample"
SIZES = ("200000x256", "200000x1280", "1000000x256", SAMPLE)
MEMORY_SIZES = ("250000x256", "1000000x256")
K, NPROBE = 21, 16
SEEDS = (0, 1, 2)
IDENTICAL = 0.05


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.join",
        description="Times the join beside the limit of the arithmetic and beside peers.",
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
    parser.add_argument("--seeds", type=seeds, default=SEEDS, metavar="A,B")
    parser.add_argument("--rounds", type=int, default=1, help="for each seed")
    parser.add_argument(
        "--peers",
        type=peers,
        default=PEER_NAMES,
        metavar="A,B",
        help=f"of {','.join(PEER_NAMES)}; or none",
    )
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--nprobe", type=int, default=NPROBE)
    parser.add_argument(
        "--identical",
        type=float,
        default=IDENTICAL,
        help="share of identical vectors in one more set; 0: none",
    )
    parser.add_argument(
        "--memory",
        type=sizes,
        nargs="?",
        const=MEMORY_SIZES,
        default=(),
        metavar="NxD,...",
        help="also the memory of one join task at several sizes",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_folder(),
        help="vectors, scratch and environments of peers",
    )
    parser.add_argument("--json", action="store_true",
                        help="print one JSON object instead of tables")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.k < 1 or options.nprobe < 1:
        parser.error("--rounds, --k and --nprobe must be at least 1")
    return options
