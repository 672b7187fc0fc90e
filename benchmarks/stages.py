"""Times the stages on the sample beside the bare limits of this machine, in one run (`make bench`).

Every figure is measured here and now on the same cores; nothing is remembered from another machine.
Everything is written into a temporary folder that is removed at the end.
"""

import argparse
import json
import os
import sys
import tempfile
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.embed_parts import WORK, Comparison, time_textbook
from benchmarks.figures import (
    Figure,
    best_of,
    describe_machine,
    show_figures,
    show_machine,
)

SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "samples")
TEXTBOOK_IMAGES = 100
K = 20
PRODUCT_REPEATS = 5


class Bench:
    """One run of all measurements, in a folder of its own."""

    def __init__(self, folder: str, images: int | None) -> None:
        from pipelines.config_loading import load_config
        from pipelines.runners import RunnerSpec
        from pipelines.stage import Session

        self.folder = folder
        config = os.path.join(folder, "bench.yaml")
        with open(config, "w", encoding="utf-8") as file:
            json.dump(self._settings(images), file)  # JSON is YAML
        self.config = load_config(config)
        self.session = Session(RunnerSpec(), Console(file=sys.stderr, quiet=True))

    def _settings(self, images: int | None) -> dict[str, Any]:
        catalog = os.path.join(SAMPLE, "catalog")
        names = sorted(name for name in os.listdir(catalog) if name.endswith(".tfrecord"))
        if images is not None:
            # A shard of the sample holds 315 images; whole shards are what Kith reads.
            names = names[: max(1, round(images / 315))]
        return {
            "workspace": os.path.join(self.folder, "workspace"),
            "images": {
                "sources": [
                    {"format": "tfrecord", "paths": [os.path.join(catalog, name) for name in names]}
                ]
            },
            "index": {"transform": {"type": "pca", "dim": 256, "whitening": "half"}, "shards": 4},
            "join": {"k": K},
        }

    def embed(self) -> list[Figure]:
        """Times decoding alone, the engine alone, the functions in a loop, Kith, and the textbook."""
        from pipelines.embed_images import embed_images
        from pipelines.engine_choice import settle_engine

        choice = settle_engine(self.config, self.session)
        comparison = Comparison(self.config, choice)
        found = comparison.run(rounds=1, work=WORK)
        self.embedded = embed_images(self.config, self.session)
        images = comparison.images[:TEXTBOOK_IMAGES]
        textbook_seconds = time_textbook("efficientnet_lite0", images)

        count, seconds = found["images"], {name: each[0] for name, each in found["seconds"].items()}
        serial = seconds["decode"] + seconds["engine"]
        limit = count / serial
        kith, loop = seconds["pipeline"], seconds["loop"]
        part, unit = "embed", "images"
        return [
            Figure(part, "decode and resize alone", count, unit, seconds["decode"],
                   note="all cores"),
            Figure(part, "model alone", count, unit, seconds["engine"],
                   note=f"{choice.engine}, {choice.precision}"),
            Figure(part, "serial limit of the two", count, unit, serial, note="their sum"),
            Figure(part, "same functions in a loop", count, unit, loop,
                   note="Parquet, no Beam").against("serial limit", limit),
            Figure(part, "Kith embed", count, unit, kith,
                   note=f"{loop / kith:.2f} x the loop; Beam, Parquet; "
                        f"without {found['load_seconds'][0]:.1f} s of loading"
                   ).against("serial limit", limit),
            Figure(part, "textbook, one by one", len(images), unit, textbook_seconds,
                   note="load_img, preprocess_input, predict"
                   ).against("Kith embed", count / kith),
        ]  # fmt: skip

    def join(self) -> list[Figure]:
        """Times the matrix product alone, Kith's join, and FAISS on the same shards."""
        from pipelines.build_index import build_index

        index_dataset = build_index(self.config, self.session, self.embedded.embeddings.folder)
        return self._time_join(index_dataset.folder)

    def _time_join(self, folder: str) -> list[Figure]:
        import faiss

        from index_builder.index.shards import open_index, open_shard
        from index_builder.search.join import JoinSpec, join_shard

        index = open_index(folder)
        spec = JoinSpec(K)
        join_shard(index, 0, spec)  # numba compiles once a machine and keeps the result
        shards = range(index.layout.shards)
        join_seconds = best_of(3, lambda: [join_shard(index, number, spec) for number in shards])
        pairs = 0
        blocks = []
        sizes = np.diff(index.layout.list_offsets)
        for number in shards:
            with open_shard(index, number, ("probes",)) as shard:
                pairs += int(sizes[shard.probes()].sum())
                blocks.append(shard.vectors().matrix())
        vectors = np.ascontiguousarray(np.concatenate(blocks), dtype=np.float32)
        rows, dim = vectors.shape
        product_seconds = best_of(PRODUCT_REPEATS, lambda: vectors @ vectors.T)

        paths = [os.path.join(folder, part.file(".faiss").path) for part in index.parts]

        def search_faiss() -> None:
            for path in paths:
                shard = faiss.read_index(path)
                shard.nprobe = index.nprobe
                shard.search(vectors, K + 1)

        faiss_seconds = best_of(3, search_faiss)
        knn_seconds = best_of(3, lambda: faiss.knn(vectors, vectors, K + 1, faiss.METRIC_INNER_PRODUCT))
        every = rows * rows
        part, unit = "join", "pairs"
        gflops = 2 * dim * every / product_seconds / 1e9
        kith = pairs / join_seconds
        return [
            Figure(part, "float32 matrix product alone", every, unit, product_seconds,
                   note=f"{gflops:.0f} GFLOP/s, {rows} x {dim}"),
            Figure(part, "Kith join", pairs, unit, join_seconds,
                   note=f"exact scores, k {K}, {index.nprobe} of {index.trained.nlist} lists"
                   ).against("matrix product", every / product_seconds),
            Figure(part, "FAISS on the same shards", pairs, unit, faiss_seconds,
                   note="IndexIVFScalarQuantizer.search").against("Kith join", kith),
            Figure(part, "FAISS, exact", every, unit, knn_seconds,
                   note="faiss.knn, all pairs").against("Kith join", kith),
        ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=__doc__)
    parser.add_argument(
        "--images", type=int, help="about so many images of the sample (315 a shard); default: all"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory(prefix="kith-bench-") as folder:
        bench = Bench(folder, options.images)
        figures = bench.embed() + bench.join()
    machine = describe_machine()
    if options.json:
        print(json.dumps({"machine": machine, "figures": [figure.to_json() for figure in figures]}))
    else:
        console = Console(width=150, soft_wrap=True)
        show_machine(machine, console)
        show_figures(figures, console)


if __name__ == "__main__":
    main()
