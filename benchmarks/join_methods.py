"""The grid of `benchmarks.join`: the three methods of search at equal recall, and which `auto` picks.

For a size and a recall, `kith build` makes an index with all choices left to it. The method that it
picks is measured with that index; the others get one each, held to the same recall:

- exact: all of 64 lists.
- list-major: `auto`'s nlist, and the nprobe that calibration chooses for the recall.
- compressed: the same lists, nprobe as calibration chooses it where codes miss some, too, and the
  fewest proposals that reach the recall.

All of them multiply as `kith join` does on this host. A method that misses the recall is measured, but
is not the best one. What counts is a night, from vectors to neighbours: the build of each, choosing its
nprobe where it has to be, and the search. Search alone is shown beside it: a method that searches in
less time has taken more before.
"""

import dataclasses
from typing import Any

from benchmarks.embed import Ratio
from benchmarks.join_figures import WHOLE, Run
from benchmarks.join_session import SHORT_TURNS, Session
from benchmarks.join_sets import TINY_ROWS
from index_builder.index.goals import Method

EXACT, LIST_MAJOR, COMPRESSED = (
    method.value for method in (Method.EXACT, Method.LIST_MAJOR, Method.COMPRESSED)
)
EXACT_LISTS = 64
# What takes longer than this has one turn.
LONG_SEC = 10.0


@dataclasses.dataclass(frozen=True)
class Way:
    """A method made ready for a set.

    `tiny` is an index of a few rows with the same encoding, made of `tiny_set`. `choices` are the
    settings of the index with nothing left open, `calibrate_sec` what choosing its nprobe took;
    `refine` are its proposals, where they are not the index's own.
    """

    index: str
    tiny: str
    tiny_set: str
    choices: dict[str, Any]
    calibrate_sec: float = 0.0
    refine: int | None = None


def judge_pick(picked: str, runs: dict[str, list[Run]], goal: float) -> tuple[float, str]:
    """Compares the picked method with the fastest of those that reach a recall.

    The fastest run of each counts, which the machine disturbed least. Returns the seconds of the picked
    one over the best's, and what was found in words.
    """
    seconds = {method: min(run.seconds for run in each) for method, each in runs.items()}
    recalls = {method: each[-1].recall or 0.0 for method, each in runs.items()}
    held = [method for method in runs if recalls[method] >= goal or method == picked]
    best = min(held, key=lambda method: seconds[method])
    told = []
    for method in runs:
        missed = ", too low" * (recalls[method] < goal)
        told.append(f"{method} {seconds[method]:.2f} s at {recalls[method]:.4f}{missed}")
    note = f"auto picks {picked}, best is {best}: {'; '.join(told)}"
    return seconds[picked] / seconds[best], note


def measure_methods(session: Session) -> None:
    """Measures every size of the grid at every recall."""
    for size in session.options.grid:
        for goal in session.options.goals:
            with session.skipping(f"methods, {size}, recall {goal:g}"):
                _measure_size(session, size, goal)


def _measure_size(session: Session, size: str, goal: float) -> None:
    seed = session.options.seeds[0]
    about = session.sets.vectors(size, seed)
    picked, ways = _make_ready(session, about, seed, goal)
    name, row = about["name"], f"recall {goal:g}"
    whole = f"{row}, {WHOLE}"
    for turn in range(SHORT_TURNS):
        for method, way in ways.items():
            known = session.log.of(name, row, method)
            if len(known) <= turn and not (known and known[0].seconds > LONG_SEC):
                found = _search(session, about, method, way)
                found["note"] += ", picked by auto" * (method == picked)
                session.add(about, seed, row, method, found)
                nights = session.log.of(name, whole, method)
                if not (nights and nights[0].seconds > LONG_SEC):
                    stages = _build(session, about, way) | found["stages"]
                    session.add(about, seed, whole, method, found | {"stages": stages})
    for each in (whole, row):
        runs = {method: session.log.of(name, each, method) for method in ways}
        if all(runs.values()):
            ratio, note = judge_pick(picked, runs, goal)
            text = f"{name}, {each}: picked by auto / the best method"
            session.log.add_ratio(Ratio(text, ratio, note))


def _make_ready(
    session: Session, about: dict[str, Any], seed: int, goal: float
) -> tuple[str, dict[str, Way]]:
    """Builds the indexes of all methods; returns the method that `auto` picks, and the ways."""
    k, sets = session.options.k, session.sets
    auto = sets.build(about, {"seed": seed}, k, goal)
    found = session.part("describe", "--index", auto)
    picked = str(found["method"])
    # An index that searches all lists has few: the other methods have theirs trained.
    plain = {"seed": seed, "nprobe": 1, "encoding": "float16"}
    lists = sets.build(about, plain, k) if picked == EXACT else auto
    nlist = session.part("describe", "--index", lists)["nlist"]
    given = ["--data", about["folder"], "--target", str(goal)]
    calibrated = session.part("calibrate", *given, "--index", lists, "--seed", str(seed))
    nprobes, calibrate_sec = calibrated["nprobes"], calibrated["stages"]["calibrate"]
    every = min(EXACT_LISTS, nlist)
    chosen = {
        EXACT: {"nlist": every, "nprobe": every, "encoding": "float16"},
        LIST_MAJOR: {"nlist": nlist, "nprobe": nprobes[LIST_MAJOR], "encoding": "float16"},
        COMPRESSED: {"nlist": nlist, "nprobe": nprobes[COMPRESSED], "encoding": "compressed"},
    }
    chosen[picked] |= {"nlist": found["nlist"], "nprobe": found["nprobe"]}
    ways = {}
    for method, settings in chosen.items():
        choices = {"seed": seed, **settings}
        encoding = {"encoding": COMPRESSED} if method == COMPRESSED else {}
        tiny = sets.tiny(about["dim"], **encoding)
        tiny_set = sets.vectors(f"{TINY_ROWS}x{about['dim']}", 0)["folder"]
        index = auto if method == picked else sets.build(about, choices, k)
        refine = None
        if method == COMPRESSED != picked:
            refine = int(session.part("refine", *given, "--index", index)["refine"])
        ways[method] = Way(index, tiny, tiny_set, choices, calibrate_sec * (method != EXACT), refine)
    return picked, ways


def _search(session: Session, about: dict[str, Any], method: str, way: Way) -> dict[str, Any]:
    """Measures a method; an exact search that would take long on a sample of its queries."""
    given = ["--data", about["folder"], "--index", way.index, "--warm", way.tiny]
    given += ["--precision", "fastest"]
    if method == EXACT:
        most = str(session.options.search_seconds)
        return session.part("sampled-search", *given, "--search-seconds", most)
    given += ["--refine", str(way.refine)] * (way.refine is not None)
    return session.part("search", *given)


def _build(session: Session, about: dict[str, Any], way: Way) -> dict[str, float]:
    """Measures the build of a method's index; returns its stages, choosing nprobe among them."""
    given = [text for key, value in way.choices.items() for text in (f"--{key}", str(value))]
    given += ["--warm", way.tiny_set]
    with session.scratch() as out:
        found = session.part("build", "--data", about["folder"], "--out", str(out), *given)
    stages = {"build": float(found["stages"]["build"])}
    return stages | ({"calibrate": way.calibrate_sec} if way.calibrate_sec else {})
