"""The measurements of `benchmarks.join` that need Kith, each in a process of its own.

`python -m benchmarks.join_parts PART ...` prints one JSON object on the last line. A join of a tiny
index comes first wherever a search is timed: numba's kernels are loaded then, or compiled once a
machine.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.neighbors import Clock, peak_bytes, recall
from benchmarks.vectors import EMBEDDINGS_FOLDER
from index_builder import library
from index_builder.datasets import embeddings
from index_builder.errors import KithError
from index_builder.index.shards import IndexDataset, open_index, open_shard, read_shard_table
from index_builder.index.spec import IndexSpec
from index_builder.scoring import products
from index_builder.scoring.products import Product
from index_builder.search.join import JoinSpec, Queries, join_shard, search_shards


def search_index(folder: str, spec: JoinSpec) -> NDArray[np.int64]:
    """Finds every row's neighbours as rows of the index, int64 [n, k]: the join's search alone.

    All of it but the ends: opens every query shard (ids, rule columns, norms and stored lists from
    Parquet, vectors from the mapped FAISS file) and streams the corpus shards; no checksums, no table
    of neighbours.
    """
    index = open_index(folder)
    columns = ("image_id", *spec.rules.columns, "squared_norm", "probes")
    found = []
    for number in range(index.layout.shards):
        with open_shard(index, number, columns) as shard:
            queries = Queries.build(
                shard.codes(), shard.squared_norms(), shard.probes(), shard.table, spec.rules,
                single_images=index.single_images,
            )  # fmt: skip
        found.append(search_shards(index, queries, spec, home=number).rows)
    return np.concatenate(found)


def origin_rows(index: IndexDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns rows of the set for rows of the index (-1 stays), in the set's own order of queries.

    `rows` [n, k] are the neighbours of every row of the index, in its order.
    """
    tables = [read_shard_table(index, number, ("row",)) for number in range(index.layout.shards)]
    origin = np.concatenate([table["row"].to_numpy() for table in tables])
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
    return {
        "recall": recall(Path(options.data), origin_rows(index, found), options.k),
        "peak_bytes": peak,
        "pairs": count_pairs(index),
        "note": f"{index.nprobe} of {index.trained.nlist} lists, {index.layout.shards} shards",
    }


def choose_product(precision: str, threads: int) -> Product:
    """Returns the product that a row is measured with: the fastest of Kith's of that precision.

    In bfloat16 that is the CPU's own where it has one, else OpenVINO's. Raises ConfigError on a CPU
    without bfloat16.
    """
    if precision == "float32":
        return products.timed_products()[0].product
    offered = products.timed_bfloat16_products()
    if offered:
        return offered[0].product
    from benchmarks.bfloat16_product import BFloat16Product

    return BFloat16Product(threads)


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Times the search over a finished index."""
    product = choose_product(options.precision, options.threads)
    spec = JoinSpec(options.k, threads=options.threads, product=product)
    search_index(options.warm, spec)
    clock = Clock()
    with clock.stage("search"):
        found = search_index(options.index, spec)
    about = _found(options, options.index, found)
    about["note"] += f", {product.name}"
    return {"stages": clock.stages, "cpu_seconds": clock.cpu_seconds, **about}


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
    product = choose_product(options.precision, options.threads)
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
    "library": library_join,
    "whole": whole,
    "task": task,
    "export-centroids": export_centroids,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one measurement and prints its result; what Kith refuses is a result too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.join_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", help="a set of benchmarks.vectors")
    parser.add_argument("--index", help="a finished index")
    parser.add_argument("--warm", help="a tiny index of the same dim")
    parser.add_argument("--out", help="where to write")
    parser.add_argument("--k", type=int, default=21)
    parser.add_argument("--nlist", type=int)
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    try:
        result = PARTS[options.part](options)
    except KithError as error:
        result = {"skipped": str(error)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
