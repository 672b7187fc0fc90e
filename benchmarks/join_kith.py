"""The parts of `benchmarks.join` that only Kith has: growth with the catalogue, copies, memory."""

from benchmarks.embed import Ratio
from benchmarks.join_figures import EQUAL_LISTS, KITH, KITH_HALF, SEARCH
from benchmarks.join_options import LARGE_ROWS
from benchmarks.join_runs import Catalogue
from benchmarks.join_session import SHORT_TURNS, Session, rows_of

MEMORY_SHARDS = 4
# Rows of a list where all sizes are measured with equal ones: those of 1,000,000 in 4,096 lists.
ROWS_OF_A_LIST = 244


def measure_growth(session: Session) -> None:
    """Measures the search of sets of several sizes, of those that no other part has measured.

    With the lists of the benchmark, which grow with the set: a query then scores more pairs in a list,
    over which what it costs besides is shared out. And with lists of one mean length, so that a query
    scores as many pairs in every set. In float32, and in bfloat16 where joins on this host take it.
    """
    for size in session.options.growth:
        seed = session.options.seeds[0]
        with session.skipping(f"growth, {size}"):
            about = session.sets.vectors(size, seed)
            lists = max(1, round(about["rows"] / ROWS_OF_A_LIST))
            ready = {
                SEARCH: session.sets.catalogue(about, seed),
                EQUAL_LISTS: session.sets.catalogue(about, seed, nlist=lists),
            }
            found = session.part("describe", "--index", ready[SEARCH].index)
            methods = (KITH, KITH_HALF) if found["precision"] == "bfloat16" else (KITH,)
            _take_turns(session, ready, methods)


def _take_turns(session: Session, ready: dict[str, Catalogue], methods: tuple[str, ...]) -> None:
    """Measures rows and methods in turns, those again that were not measured so often yet."""
    for turn in range(SHORT_TURNS):
        for row, catalogue in ready.items():
            large = catalogue.about["rows"] > LARGE_ROWS
            for method in methods:
                known = len(session.log.of(catalogue.about["name"], row, method))
                if known <= turn and not (large and known):
                    session.search(catalogue, (method,), row)


def measure_identical(session: Session) -> None:
    """Measures the search over a corpus of which a share is one picture, beside one without."""
    for size in session.options.sizes:
        if session.sets.is_made(size) and rows_of(size) <= LARGE_ROWS:
            with session.skipping(f"identical vectors, {size}"):
                _measure_identical(session, size)


def _measure_identical(session: Session, size: str) -> None:
    seed = session.options.seeds[0]
    plain, same = (session.catalogue(size, seed, each) for each in (0.0, session.options.identical))
    seconds: dict[str, list[float]] = {}
    for _ in range(SHORT_TURNS):
        for each in (plain, same):
            found = session.part(
                "search", "--data", each.about["folder"], "--index", each.index,
                "--warm", each.tiny,
            )  # fmt: skip
            seconds.setdefault(each.about["name"], []).append(found["stages"]["search"])
    ratio = min(seconds[same.about["name"]]) / min(seconds[plain.about["name"]])
    name = f"{same.about['name']} / without, Kith, {SEARCH}"
    session.log.add_ratio(Ratio(name, ratio, "the fastest of each"))


def measure_memory(session: Session) -> None:
    """Measures the memory of one join task over sets of several sizes; a shard's rows stay."""
    peaks: list[tuple[str, int]] = []
    sizes, seed = session.options.memory, session.options.seeds[0]
    least = min((rows_of(size) for size in sizes), default=0)
    for size in sizes:
        with session.skipping(f"memory, {size}"):
            about = session.sets.vectors(size, seed)
            shards = round(MEMORY_SHARDS * about["rows"] / least)
            catalogue = session.sets.catalogue(about, seed, shards)
            found = session.part("task", "--index", catalogue.index, "--warm", catalogue.tiny)
            peaks.append((about["name"], found["peak_bytes"]))
            note = (
                f"one of {found['shards']} tasks, {found['queries']:,} queries; "
                f"{found['base_bytes'] / 2**20:,.0f} MiB before it"
            )
            name = f"peak memory of a join task, MiB, {size}"
            session.log.add_ratio(Ratio(name, found["peak_bytes"] / 2**20, note))
    for name, peak in peaks[1:]:
        text = f"peak memory of a join task, {name} / {peaks[0][0]}"
        session.log.add_ratio(Ratio(text, peak / peaks[0][1]))
