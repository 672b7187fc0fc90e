"""The measurements of `benchmarks.join` that need Kith, each in a process of its own.

`python -m benchmarks.join_parts PART ...` prints one JSON object on the last line. A join of a tiny
index comes first wherever a search is timed: numba's kernels are loaded then, or compiled once a
machine.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.peers.neighbors import Clock, peak_bytes, recall, timed_search, tune
from benchmarks.vectors import EMBEDDINGS_FOLDER
from index_builder import library
from index_builder.datasets import embeddings, manifests
from index_builder.errors import ConfigError, KithError
from index_builder.index.goals import Encoding, Method
from index_builder.index.shards import IndexDataset, open_index, open_shard, read_shard_table
from index_builder.index.spec import DEFAULT_REFINE, IndexSpec
from index_builder.recall import calibration
from index_builder.recall.calibration import CalibrationSpec
from index_builder.recall.query_sample import choose_queries
from index_builder.recall.recall import Promise
from index_builder.rules.rules import JoinRules
from index_builder.scoring import products
from index_builder.scoring.products import Product
from index_builder.search.corpus import Corpus
from index_builder.search.join import JoinSpec, Queries, join_shard, search_shards

# As evaluate.max_attempts has it by default: the confidence of a build's own calibration.
PROMISE_ATTEMPTS = 3
# So many queries load what calibrating needs.
_FEW_QUERIES = 50
# Proposals by codes for each neighbour that are tried where a recall is asked for.
REFINES = tuple(DEFAULT_REFINE * factor for factor in (1, 2, 4, 8))


def search_index(folder: str, spec: JoinSpec, refine: int | None = None) -> NDArray[np.int64]:
    """Finds every row's neighbours as rows of the index, int64 [n, k]: the join's search alone.

    All of it but the ends: opens every query shard (ids, rule columns, norms and stored lists from
    Parquet, vectors from the mapped FAISS file) and streams the corpus shards; no checksums, no table
    of neighbours. `refine`: instead of the index's own.
    """
    index = refined(open_index(folder), refine)
    shards = range(index.layout.shards)
    return np.concatenate([_search_queries(index, number, spec) for number in shards])


def search_rows(
    index: IndexDataset, spec: JoinSpec, rows: NDArray[np.int64], origin: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Finds the neighbours of some rows of the set as rows of the set, int64 [rows, k].

    `rows` are ascending; `origin` [n] is `origin_of` the index.
    """
    found = np.empty((len(rows), spec.k), np.int64)
    for number in range(index.layout.shards):
        first, last = index.layout.shard_offsets[number : number + 2]
        places = np.flatnonzero(np.isin(origin[first:last], rows))
        if len(places):
            best = _search_queries(index, number, spec, places)
            owners = np.searchsorted(rows, origin[first:last][places])
            found[owners] = np.where(best >= 0, origin[best], -1)
    return found


def _search_queries(
    index: IndexDataset, number: int, spec: JoinSpec, places: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Searches for the rows of a shard, or for those at some places of it."""
    columns = ("image_id", *spec.rules.columns, "squared_norm", "probes")
    with open_shard(index, number, columns) as shard:
        vectors, norms, probes, table = (
            shard.vectors(), shard.squared_norms(), shard.probes(), shard.table
        )  # fmt: skip
        rows = np.arange(len(vectors))
        if places is not None:
            rows, vectors, norms = places, vectors.take(places), norms[places]
            probes, table = probes[places], table.take(pa.array(places))
        queries = Queries.build(
            vectors, norms, probes, table, spec.rules, single_images=index.single_images,
            own_rows=shard.first_row + rows,
        )  # fmt: skip
    top = search_shards(index, queries, spec, home=number)
    short = np.flatnonzero(top.counts < spec.k)
    top.rows[short] = np.where(np.arange(spec.k) < top.counts[short, None], top.rows[short], -1)
    return top.rows


def refined(index: IndexDataset, refine: int | None) -> IndexDataset:
    """Returns an index with codes as one of another refine, or as it is (None)."""
    if refine is None:
        return index
    properties = index.manifest.properties | {"refine": refine}
    return dataclasses.replace(
        index, manifest=dataclasses.replace(index.manifest, properties=properties)
    )


def origin_of(index: IndexDataset) -> NDArray[np.int64]:
    """Returns the row of the set of every row of an index, int64 [n]."""
    tables = [read_shard_table(index, number, ("row",)) for number in range(index.layout.shards)]
    return np.concatenate([table["row"].to_numpy() for table in tables])


def origin_rows(index: IndexDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns rows of the set for rows of the index (-1 stays), in the set's own order of queries.

    `rows` [n, k] are the neighbours of every row of the index, in its order.
    """
    origin = origin_of(index)
    named = np.where(rows >= 0, origin[rows], -1)
    found = np.empty_like(named)
    found[origin] = named
    return found


def count_pairs(index: IndexDataset) -> int:
    """Counts the pairs that a join of an index with itself scores."""
    sizes = np.diff(index.layout.list_offsets)
    tables = [read_shard_table(index, number, ("probes",)) for number in range(index.layout.shards)]
    return sum(int(sizes[embeddings.list_matrix(table["probes"])].sum()) for table in tables)


def _found(options: argparse.Namespace, folder: str, found: NDArray[np.int64]) -> dict[str, Any]:
    """Returns what is known once neighbours were found: recall, pairs and memory."""
    peak = peak_bytes()
    index = open_index(folder)
    reached = recall(Path(options.data), origin_rows(index, found), options.k)
    return {"recall": reached, "peak_bytes": peak, **_about(index)}


def _about(index: IndexDataset) -> dict[str, Any]:
    """Returns the pairs that a search of an index looks at, and its lists in words."""
    note = f"{index.nprobe} of {index.trained.nlist} lists, {index.layout.shards} shards"
    return {"pairs": count_pairs(index), "note": note}


def choose_product(precision: str, index: str, threads: int) -> Product:
    """Returns the product that a row is measured with: the fastest of Kith's of that precision.

    In bfloat16 that is the CPU's own where it has one, else OpenVINO's; `fastest` is what a join of
    the index takes on this host. Raises ConfigError on a CPU without bfloat16 or products of integers.
    """
    if precision == "fastest":
        with open_shard(open_index(index), 0, ()) as shard:
            return products.product_for(shard.vectors())
    if precision == "float32":
        return products.timed_products()[0].product
    if precision == "int8":
        rated = products.timed_integer_products()
        if not rated:
            raise ConfigError("this CPU has no products of 8-bit integers (VNNI)")
        return rated[0].product
    offered = products.timed_bfloat16_products()
    if offered:
        return offered[0].product
    from benchmarks.bfloat16_product import BFloat16Product

    return BFloat16Product(threads)


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Times the search over a finished index."""
    product = choose_product(options.precision, options.index or options.warm, options.threads)
    spec = JoinSpec(options.k, threads=options.threads, product=product)
    search_index(options.warm, spec)
    clock = Clock()
    with clock.stage("search"):
        found = search_index(options.index, spec, options.refine)
    about = _found(options, options.index, found)
    refine = options.refine or open_index(options.index).refine
    about["note"] += f", {product.name}" if refine is None else f", codes, refine {refine}"
    return {"stages": clock.stages, "cpu_seconds": clock.cpu_seconds, **about}


def sampled_search(options: argparse.Namespace) -> dict[str, Any]:
    """Times the search of a sample of the queries where that of all would take too long."""
    product = choose_product(options.precision, options.index or options.warm, options.threads)
    spec = JoinSpec(options.k, threads=options.threads, product=product)
    search_index(options.warm, spec)
    index, clock, data = open_index(options.index), Clock(), Path(options.data)
    every, origin = np.arange(index.layout.rows), origin_of(index)
    found, rows, note = timed_search(
        clock, data, len(every), options.search_seconds,
        lambda chosen: search_rows(index, spec, every[chosen], origin),
    )  # fmt: skip
    peak, about = peak_bytes(), _about(index)
    about["note"] += f", {product.name}, {note}"
    reached = recall(data, found, options.k, rows)
    return {"stages": clock.stages, "cpu_seconds": clock.cpu_seconds, "recall": reached,
            "peak_bytes": peak, **about}  # fmt: skip


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the manifest of an index says was chosen, and what joins take on this host."""
    chosen = open_index(options.index).manifest.properties
    rounds = products.multiplies_bfloat16()
    known = {name: chosen[name] for name in ("method", "nlist", "nprobe", "refine", "calibration")}
    return {**known, "precision": "bfloat16" if rounds else "float32"}


def calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Chooses nprobe for a recall over the lists of an index, as a build does, and times it."""
    clock, promise = Clock(), Promise(options.target, attempts=PROMISE_ATTEMPTS)
    _calibrated(options, dataclasses.replace(promise, sample=_FEW_QUERIES))
    with clock.stage("calibrate"):
        nprobes = _calibrated(options, promise)
    return {"nprobes": nprobes, "stages": clock.stages}


def _calibrated(options: argparse.Namespace, promise: Promise) -> dict[str, int]:
    """Returns nprobe by vectors, and by codes, to which half of what may be missed is left.

    See steps/nprobe_choice.py.
    """
    trained, source = open_index(options.index).trained, f"{options.data}/{EMBEDDINGS_FOLDER}"
    parts = manifests.load(source, embeddings.KIND).parts
    corpus, numbers = Corpus(source, parts), range(len(parts))
    wanted = CalibrationSpec(promise, options.k, JoinRules())
    sample = wanted.sample(sum(part.rows for part in parts), options.seed)
    drawn = (calibration.draw_queries(corpus, number, wanted, sample) for number in numbers)
    queries = choose_queries(drawn, sample)
    found = calibration.merge_found(
        (calibration.search_part(corpus, n, queries, wanted, trained) for n in numbers), corpus, wanted
    )
    nprobes = {}
    for method, aim in (
        (Method.LIST_MAJOR, options.target),
        (Method.COMPRESSED, (1 + options.target) / 2),
    ):
        aimed = dataclasses.replace(wanted, promise=dataclasses.replace(promise, target=aim))
        chosen = calibration.calibrate(corpus, queries, found, aimed, sample, trained)
        nprobes[method.value] = int(chosen["nprobe"])
    return nprobes


def choose_refine(options: argparse.Namespace) -> dict[str, Any]:
    """Chooses the fewest proposals with which the queries whose neighbours are known reach a recall."""
    index, data = open_index(options.index), Path(options.data)
    spec, origin = JoinSpec(options.k, threads=options.threads), origin_of(index)
    chosen = tune(
        data, options.target, options.k, list(REFINES),
        lambda rows, refine: search_rows(refined(index, refine), spec, rows, origin),
    )  # fmt: skip
    return {"refine": chosen}


def library_join(options: argparse.Namespace) -> dict[str, Any]:
    """Times `library.join`: the whole join, Parquet in and out, checksums and ids included, no Beam."""
    spec = JoinSpec(options.k, threads=options.threads)
    library.join(options.warm, str(Path(options.out) / "warm"), spec)
    clock = Clock()
    with clock.stage("join"):
        library.join(options.index, str(Path(options.out) / "neighbors"), spec)
    return {
        "stages": clock.stages,
        "cpu_seconds": clock.cpu_seconds,
        "peak_bytes": peak_bytes(),
        "note": "Parquet in and out",
    }


def whole(options: argparse.Namespace) -> dict[str, Any]:
    """Times everything from the embeddings' Parquet to neighbours, with the library alone."""
    product = choose_product(options.precision, options.index or options.warm, options.threads)
    spec = JoinSpec(options.k, threads=options.threads, product=product)
    search_index(options.warm, spec)
    clock = Clock()
    source, folder = f"{options.data}/{EMBEDDINGS_FOLDER}", f"{options.out}/index"
    request = IndexSpec(nlist=options.nlist, nprobe=options.nprobe, seed=options.seed)
    with clock.stage("build"):
        library.build(source, folder, request)
    with clock.stage("search"):
        found = search_index(folder, spec)
    return {"stages": clock.stages, **_found(options, folder, found)}


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Times `library.build` with choices as they are given, after one of `warm`, a set of few rows."""
    request = IndexSpec(
        nlist=options.nlist, nprobe=options.nprobe, seed=options.seed, encoding=options.encoding
    )
    source, clock = f"{options.data}/{EMBEDDINGS_FOLDER}", Clock()
    few = dataclasses.replace(request, nlist=4, nprobe=2)
    library.build(f"{options.warm}/{EMBEDDINGS_FOLDER}", f"{options.out}/first", few)
    with clock.stage("build"):
        library.build(source, f"{options.out}/index", request)
    return {"stages": clock.stages, "cpu_seconds": clock.cpu_seconds, "peak_bytes": peak_bytes()}


def task(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one join task, that of the first shard, and reports the memory of this process."""
    spec = JoinSpec(options.k, threads=options.threads)
    join_shard(open_index(options.warm), 0, spec)
    base = peak_bytes()
    clock = Clock()
    with clock.stage("join"):
        index = open_index(options.index)
        table = join_shard(index, 0, spec)
    about = {"queries": len(table), "rows": index.layout.rows, "shards": index.layout.shards}
    return {"stages": clock.stages, "peak_bytes": peak_bytes(), "base_bytes": base, **about}


def export_centroids(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the centroids of an index for peers, float16 [nlist, d]."""
    trained = open_index(options.index).trained
    np.save(options.out, trained.centroids)
    return {"nlist": trained.nlist, "path": options.out}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "search": search,
    "sampled-search": sampled_search,
    "describe": describe,
    "calibrate": calibrate,
    "refine": choose_refine,
    "library": library_join,
    "whole": whole,
    "build": build,
    "task": task,
    "export-centroids": export_centroids,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one measurement and prints its result; what Kith refuses is a result too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.join_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", help="a set of benchmarks.vectors")
    parser.add_argument("--index", help="a finished index")
    parser.add_argument("--warm", help="a tiny index of the same dim; for a build, a tiny set")
    parser.add_argument("--out", help="where to write")
    parser.add_argument("--k", type=int, default=21)
    parser.add_argument("--nlist", type=int)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoding", type=Encoding, help="default: what Kith chooses")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "int8", "fastest"), default="float32"
    )
    parser.add_argument("--refine", type=int, help="proposals for each neighbour, not the index's own")
    parser.add_argument("--target", type=float, default=0.0, help="recall that is aimed at")
    parser.add_argument("--search-seconds", type=float, default=math.inf,
                        help="a longer search is measured on a sample, and multiplied")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        result = PARTS[options.part](options)
    except KithError as error:
        result = {"skipped": str(error)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
