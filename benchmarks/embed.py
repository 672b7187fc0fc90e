"""Times embedding beside the bare limits of this machine and beside peers (`make bench-embed`).

Everything is measured in one run, on the same photographs and cores; nothing is remembered from
another machine, and no figure is a test. Decoding, the engine, the loop and the pipeline take turns
in one process for each engine and precision, after a round that only warms up; the median counts.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.embed_parts import write_config
from benchmarks.figures import Figure, describe_machine, show_figures, show_machine, speed
from benchmarks.peer_runs import (
    PEERS,
    ROOT,
    Peer,
    SkippedError,
    make_environment,
    run_for_json,
    run_peer,
)
from benchmarks.photographs import CODINGS, DEFAULT_COUNT, DEFAULT_SHARDS, default_folder

LITE0 = "efficientnet_lite0"
ENGINES = ("tensorflow", "openvino")
PRECISIONS = ("float32", "bfloat16")
NETWORKS = ("vgg16", "resnet50", "inception_v3")
TEXTBOOK_NETWORKS = (LITE0, "vgg16")
TEXTBOOK_IMAGES = 100
SHARD_IMAGES = DEFAULT_COUNT // DEFAULT_SHARDS
# For the networks that take seconds for what Lite0 does at once.
NETWORK_IMAGES = 256
MEMORY_COUNT = 20_000
TIMEOUT_SEC = 3600


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One comparison of the run: what, against what, and how many times."""

    name: str
    value: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Compared:
    """Medians of one engine in one precision, in images a second; `load` in seconds."""

    engine: str
    precision: str
    images: int
    seconds: dict[str, float]
    load: float

    def speed(self, work: str) -> float:
        """Returns images a second of one kind of work."""
        return self.images / self.seconds[work]


@dataclasses.dataclass(frozen=True)
class Command:
    """One run of `kith embed` as a user has it: everything from the start of Python to its end."""

    images: int
    seconds: float
    stage_seconds: float
    peak_bytes: int


def serial_limit(
    compared: Sequence[Compared], decode_seconds: float, precision: str
) -> tuple[float, str]:
    """Returns the seconds of decoding alone plus those of the fastest engine alone, and that engine."""
    of = [one for one in compared if one.precision == precision]
    fastest = min(of, key=lambda one: one.seconds["engine"])
    return decode_seconds + fastest.seconds["engine"], fastest.engine


class Bench:
    """One run of all measurements; figures, ratios and what was skipped pile up in it."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.figures: list[Figure] = []
        self.ratios: list[Ratio] = []
        self.skipped: dict[str, str] = {}
        self.rounds: list[dict[str, Any]] = []
        self._options = options
        self._console = console
        self._compared: list[Compared] = []

    def run(self) -> None:
        """Measures everything that the options ask for."""
        options = self._options
        catalogue = self.catalogue(options.count)
        with chosen_shards(catalogue, options.shards) as shards:
            for engine in options.engines:
                for precision in options.precisions:
                    self._compare(shards, engine, precision)
            self._limits()
            self._kith(shards)
            self._textbook(shards)
            self._peers(shards)
        if options.networks:
            shards = self.catalogue(NETWORK_IMAGES)
            for network in options.networks:
                self._network(shards, network)
        if options.memory:
            self._memory()

    def catalogue(self, count: int) -> str:
        """Makes the catalogue where it is not yet, in a process that does not fatten this one."""
        command = [sys.executable, "-m", "benchmarks.photographs", "--count", str(count)]
        command += ["--shards", str(max(1, count // SHARD_IMAGES))]
        command += ["--coding", self._options.coding, "--folder", str(self._options.folder)]
        self._console.print(f"{count:,} photographs, from the cache or made now")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        return done.stdout.strip()

    def _compare(self, shards: str, engine: str, precision: str) -> None:
        found = self._part(
            f"{engine}, {precision}", "compare", "--shards", shards, "--network", LITE0,
            "--engine", engine, "--precision", precision, "--rounds", str(self._options.rounds),
        )  # fmt: skip
        if found is None:
            return
        seconds = {work: statistics.median(each) for work, each in found["seconds"].items()}
        load = statistics.median(found["load_seconds"])
        self._compared.append(Compared(engine, precision, found["images"], seconds, load))
        self.rounds.append({"engine": engine, "precision": precision, **found})

    def _part(self, name: str, *arguments: str) -> dict[str, Any] | None:
        """Runs one measurement of `embed_parts`; None, and a reason, where it cannot be made."""
        self._console.print(f"{name}: {arguments[0]}", markup=False)
        command = [sys.executable, "-m", "benchmarks.embed_parts", *arguments]
        try:
            return run_for_json(command, TIMEOUT_SEC)
        except SkippedError as reason:
            self._skip(name, reason)
            return None

    def _skip(self, name: str, reason: Exception) -> None:
        self.skipped[name] = str(reason)
        self._console.print(f"{name}: skipped: {reason}", style="yellow", markup=False, soft_wrap=True)

    def _limits(self) -> None:
        """Adds the bare limits: decoding alone, each engine alone, and the two in series."""
        cores = len(os.sched_getaffinity(0))
        if not self._compared:
            return
        images = self._compared[0].images
        self._figure("limits", "reduced decode alone", images, self._decode_seconds(),
                     f"{cores} threads; median of all rounds")  # fmt: skip
        for one in self._compared:
            name = f"{one.engine} alone, {one.precision}"
            self._figure("limits", name, images, one.seconds["engine"], "pixels in memory")
        for precision in self._measured_precisions():
            seconds, fastest = serial_limit(self._compared, self._decode_seconds(), precision)
            note = f"decode, then {fastest}"
            self._figure("limits", f"serial limit, {precision}", images, seconds, note)

    def _decode_seconds(self) -> float:
        return float(statistics.median(s for each in self.rounds for s in each["seconds"]["decode"]))

    def _measured_precisions(self) -> list[str]:
        return [p for p in PRECISIONS if any(one.precision == p for one in self._compared)]

    def _kith(self, shards: str) -> None:
        """Adds what Kith does with the same engines: in a loop, through Beam, and as a command."""
        for one in self._compared:
            serial, _ = serial_limit(self._compared, self._decode_seconds(), one.precision)
            limit = ("serial limit", one.images / serial)
            what = f"{one.engine}, {one.precision}"
            self.figures.append(
                Figure("Kith", f"functions in a loop, {what}", one.images, "images",
                       one.seconds["loop"], note="Parquet, no Beam").against(*limit)
            )  # fmt: skip
            beam = one.seconds["pipeline"] / one.seconds["loop"] - 1
            self.figures.append(
                Figure("Kith", f"kith embed, {what}", one.images, "images", one.seconds["pipeline"],
                       note=f"without {one.load:.1f} s of loading; {beam:+.1%} of the loop"
                       ).against(*limit)
            )  # fmt: skip
            self.ratios.append(Ratio(f"Kith / serial limit, {what}", serial / one.seconds["pipeline"]))
            self.ratios.append(Ratio(f"Beam's own cost, {what}", beam, "of the loop's time"))
            command = self._command(what, shards, one.engine, one.precision)
            if command is not None:
                note = f"start, load and exit; peak {command.peak_bytes / 2**20:,.0f} MiB"
                self._figure(
                    "Kith", f"the whole command, {what}", command.images, command.seconds, note
                )

    def _command(self, name: str, shards: str, engine: str, precision: str) -> Command | None:
        """Runs `kith embed` in a process of its own and looks at what it took."""
        self._console.print(f"{name}: kith embed")
        with tempfile.TemporaryDirectory(prefix="kith-bench-") as folder:
            config = write_config(
                os.path.join(folder, "bench.yaml"), os.path.join(folder, "workspace"),
                shards, LITE0, engine, precision,
            )  # fmt: skip
            try:
                return run_command(config, Path(folder))
            except SkippedError as reason:
                self._skip(f"kith embed, {name}", reason)
                return None

    def _textbook(self, shards: str) -> None:
        for network in self._options.textbook:
            found = self._part(
                f"textbook, {network}", "textbook", "--shards", shards, "--network", network,
                "--images", str(TEXTBOOK_IMAGES),
            )  # fmt: skip
            if found is None:
                continue
            note = "load_img, preprocess_input, predict"
            self._figure("textbook", network, found["images"], found["seconds"], note)
            if network == LITE0:
                self._against("textbook way", found["images"] / found["seconds"], PRECISIONS)

    def _against(self, name: str, per_second: float, precisions: Sequence[str]) -> None:
        """Adds Kith's fastest engine of each precision, through Beam, against something else."""
        for precision in precisions:
            of = [one for one in self._compared if one.precision == precision]
            if of:
                best = max(of, key=lambda one: one.speed("pipeline"))
                value = best.speed("pipeline") / per_second
                self.ratios.append(
                    Ratio(f"Kith / {name}, {precision}", value, f"Kith on {best.engine}")
                )

    def _peers(self, shards: str) -> None:
        wanted = [peer for peer in PEERS if peer.name in self._options.peers]
        with tempfile.TemporaryDirectory(prefix="kith-bench-") as folder:
            network = os.path.join(folder, "lite0.keras")
            if any(peer.needs_network for peer in wanted):
                self._part("Lite0 for peers", "save-network", network)
            for peer in wanted:
                try:
                    self._console.print(f"{peer.title}: its environment, from the cache or made now")
                    python = make_environment(self._options.folder, peer)
                except SkippedError as reason:
                    self._skip(peer.title, reason)
                    continue
                self._peer(python, peer, shards, network)

    def _peer(self, python: str, peer: Peer, shards: str, network: str) -> None:
        """Runs a peer in every way that it has; the fastest of a precision is what Kith is held to."""
        best: dict[str, float] = {}
        for run in peer.runs:
            if run.precision not in self._options.precisions:
                continue
            name = " ".join((peer.title, run.precision, *run.arguments[-1:]))
            self._console.print(name)
            try:
                found = run_peer(python, peer, run, shards, network)
            except SkippedError as reason:
                self._skip(name, reason)
                continue
            what = f"{peer.title}, {run.precision}"
            self._figure("peers", what, found["images"], found["seconds"], found["note"])
            rate = found["images"] / found["seconds"]
            best[run.precision] = max(best.get(run.precision, 0.0), rate)
        for precision, rate in best.items():
            name = peer.title if peer.same_network else f"{peer.title} (its own network)"
            self._against(name, rate, (precision,))

    def _network(self, shards: str, network: str) -> None:
        """Adds a slower network: each engine alone, and Kith with it, over a few images."""
        for engine in self._options.engines:
            for precision in self._options.precisions:
                what = f"{network}, {engine}, {precision}"
                found = self._part(
                    what, "compare", "--shards", shards, "--network", network,
                    "--engine", engine, "--precision", precision, "--work", "engine,pipeline",
                )  # fmt: skip
                if found is None:
                    continue
                alone, kith = (statistics.median(found["seconds"][w]) for w in ("engine", "pipeline"))
                self._figure("networks", f"{what}, alone", found["images"], alone, "pixels in memory")
                self.figures.append(
                    Figure("networks", f"{what}, kith embed", found["images"], "images", kith)
                    .against("alone", found["images"] / alone)
                )  # fmt: skip

    def _memory(self) -> None:
        """Adds the peak memory of `kith embed` for ten times as many images."""
        for engine in self._options.engines:
            for precision in self._options.precisions:
                peaks = []
                for count in (DEFAULT_COUNT, MEMORY_COUNT):
                    name = f"{engine}, {precision}"
                    shards = self.catalogue(count)
                    command = self._command(name, shards, engine, precision)
                    if command is None:
                        break
                    peaks.append(command.peak_bytes)
                    note = f"peak {command.peak_bytes / 2**20:,.0f} MiB"
                    self._figure("memory", name, command.images, command.seconds, note)
                if len(peaks) == 2:
                    note = f"{MEMORY_COUNT:,} / {DEFAULT_COUNT:,} images"
                    self.ratios.append(Ratio(f"peak memory, {name}", peaks[1] / peaks[0], note))

    def _figure(self, part: str, name: str, images: int, seconds: float, note: str) -> None:
        self.figures.append(Figure(part, name, images, "images", seconds, note=note))


@contextlib.contextmanager
def chosen_shards(catalogue: str, count: int) -> Iterator[str]:
    """Makes a folder that holds the first shards of a catalogue, for whoever takes a folder."""
    paths = sorted(Path(catalogue).glob("*.tfrecord"))[:count]
    with tempfile.TemporaryDirectory(prefix="shards-", dir=Path(catalogue).parent) as folder:
        for path in paths:
            (Path(folder) / path.name).hardlink_to(path)
        yield folder


def run_command(config: str, folder: Path) -> Command:
    """Runs `kith embed` and returns its time and peak memory (`ru_maxrss` of that process).

    Raises SkippedError with what it printed when it fails.
    """
    command = [sys.executable, "-m", "pipelines.cli", "embed", "--config", config, "--json"]
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise SkippedError(f"kith embed failed: {errors.read().strip()[-2000:]}")
        result = json.loads(out.read())
    # Linux counts kibibytes.
    peak = usage.ru_maxrss * 1024
    return Command(result["images"]["read"], seconds, result["seconds"], peak)


def show(machine: dict[str, Any], bench: Bench, console: Console) -> None:
    """Prints the figures, then the ratios, then what was skipped."""
    show_machine(machine, console)
    show_figures(bench.figures, console)
    table = Table("ratio", "value", "note")
    for ratio in bench.ratios:
        table.add_row(
            ratio.name, f"{ratio.value:.3f}" if ratio.value < 10 else speed(ratio.value), ratio.note
        )
    console.print(table)
    for name, reason in bench.skipped.items():
        console.print(f"skipped: {name}: {reason}", markup=False)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed", description=__doc__)
    names = tuple(peer.name for peer in PEERS)

    def listed(of: Sequence[str]) -> dict[str, Any]:
        def read(text: str) -> tuple[str, ...]:
            chosen = tuple(part for part in text.split(",") if part not in ("", "none"))
            wrong = [part for part in chosen if part not in of]
            if wrong:
                raise argparse.ArgumentTypeError(
                    f"got {wrong[0]!r}, wanted some of {','.join(of)}, or none"
                )
            return chosen

        return {
            "type": read,
            "default": tuple(of),
            "metavar": "A,B",
            "help": f"of {','.join(of)}; or none",
        }

    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="photographs to make")
    parser.add_argument(
        "--coding",
        choices=CODINGS,
        default=CODINGS[0],
        help="of the photographs; turns: half progressive",
    )
    parser.add_argument(
        "--shards", type=int, default=DEFAULT_SHARDS,
        help=f"take only so many of the {DEFAULT_SHARDS} shards, for a trial",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count; 1: no warm-up either")
    parser.add_argument("--engines", **listed(ENGINES))
    parser.add_argument("--precisions", **listed(PRECISIONS))
    parser.add_argument("--textbook", **listed(TEXTBOOK_NETWORKS))
    parser.add_argument("--peers", **listed(names))
    parser.add_argument("--networks", **listed(NETWORKS))
    parser.add_argument(
        "--memory", action="store_true", help=f"also the memory of {MEMORY_COUNT:,} images (long)"
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="photographs and environments of peers"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not 1 <= options.shards <= DEFAULT_SHARDS:
        parser.error(f"--rounds must be at least 1 and --shards 1 to {DEFAULT_SHARDS}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    bench = Bench(options, Console(stderr=True))
    bench.run()
    machine = describe_machine()
    if options.json:
        found = {
            "machine": machine,
            "figures": [figure.to_json() for figure in bench.figures],
            "ratios": [dataclasses.asdict(ratio) for ratio in bench.ratios],
            "rounds": bench.rounds,
            "skipped": bench.skipped,
        }
        print(json.dumps(found))
    else:
        show(machine, bench, Console(width=150, soft_wrap=True))


if __name__ == "__main__":
    main()
