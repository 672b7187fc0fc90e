"""Times the stages on the sample beside the bare limits of this machine, in one run (`make bench`).

Every figure is measured here and now on the same cores; nothing is remembered from another machine.
Everything is written into a temporary folder that is removed at the end.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

SAMPLE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "samples")
TEXTBOOK_IMAGES = 100
K = 20
PRODUCT_REPEATS = 5
VERSIONS = ("apache-beam", "faiss-cpu", "keras", "numpy", "pillow", "tensorflow")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line: what was timed, how many of which unit in how many seconds, and against what."""

    part: str
    name: str
    units: int
    unit: str
    seconds: float
    peer: str = ""
    ratio: float | None = None
    note: str = ""

    @property
    def per_second(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    def against(self, name: str, per_second: float) -> "Figure":
        """Returns the figure with its speed relative to a peer's."""
        return dataclasses.replace(self, peer=name, ratio=self.per_second / per_second)


def timed(work: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best_of(repeats: int, work: Callable[[], Any]) -> float:
    """Returns the fewest seconds of a few calls."""
    return min(timed(work) for _ in range(repeats))


class Bench:
    """One run of all measurements, in a folder of its own."""

    def __init__(self, folder: str, images: int | None) -> None:
        from pipelines.config import load_config
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
        """Times decoding alone, the model alone, the functions in a loop, Kith, and the textbook."""
        from pipelines.embed_images import embed_images, list_shards
        from transforms.encoders.registry import load_encoder
        from transforms.prepare import PreparedImage, prepare_image, prepare_images
        from transforms.sources.base import ImageRecord

        spec = self.config.embed_spec()
        source = spec.sources[0]
        shards = list_shards(self.config)
        found = [record for shard in shards for record in source.read(shard, {})]
        records = [record for record in found if isinstance(record, ImageRecord)]
        threads = len(os.sched_getaffinity(0))
        count = len(records)

        def decode() -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda r: prepare_image(r, spec.preprocessing, spec.max_pixels), records))

        decode_seconds = timed(decode)
        tried = [prepare_image(record, spec.preprocessing, spec.max_pixels) for record in records]
        prepared = [image for image in tried if isinstance(image, PreparedImage)]
        batch = spec.batch_size
        pixels = np.stack([image.pixels for image in prepared])
        encoder = load_encoder(spec.encoder, batch)
        encoder.encode(pixels[:batch])

        def model() -> None:
            for start in range(0, count, batch):
                encoder.encode(pixels[start : start + batch])

        model_seconds = timed(model)

        def loop() -> None:
            for shard in shards:
                waiting: list[NDArray[np.uint8]] = []
                found = prepare_images(
                    source.read(shard, {}), spec.preprocessing, spec.max_pixels, threads,
                    2 * batch + threads,
                )  # fmt: skip
                for image in found:
                    if isinstance(image, PreparedImage):
                        waiting.append(image.pixels)
                    if len(waiting) == batch:
                        encoder.encode(np.stack(waiting))
                        waiting = []
                if waiting:
                    encoder.encode(np.stack(waiting))

        loop_seconds = timed(loop)
        start = time.perf_counter()
        self.embedded = embed_images(self.config, self.session)
        whole = time.perf_counter() - start
        # The encoder is loaded once a worker; its seconds say nothing about images a second.
        load_seconds = timed(lambda: load_encoder(spec.encoder, batch))
        kith_seconds = whole - load_seconds
        serial = decode_seconds + model_seconds
        textbook_seconds, textbook_count = self._textbook([record.data for record in records])

        limit = count / serial
        part = "embed"
        return [
            Figure(part, "decode and resize alone", count, "images", decode_seconds,
                   note=f"{threads} threads"),
            Figure(part, "model alone", count, "images", model_seconds, note=f"batches of {batch}"),
            Figure(part, "serial limit of the two", count, "images", serial, note="their sum"),
            Figure(part, "same functions in a loop", count, "images", loop_seconds,
                   note="no Beam, nothing written").against("serial limit", limit),
            Figure(part, "Kith embed", count, "images", kith_seconds,
                   note=f"{loop_seconds / kith_seconds:.2f} x the loop; Beam, Parquet; "
                        f"without {load_seconds:.1f} s of loading"
                   ).against("serial limit", limit),
            Figure(part, "textbook, one by one", textbook_count, "images", textbook_seconds,
                   note="load_img, preprocess_input, predict"
                   ).against("Kith embed", count / kith_seconds),
        ]  # fmt: skip

    def _textbook(self, images: list[bytes]) -> tuple[float, int]:
        """Times the lines that a tutorial has, with the same network and weights."""
        import keras

        from transforms.encoders.efficientnet_lite0 import (
            IMAGENET_WEIGHTS,
            build_model,
            preprocess_input,
        )

        whole = build_model()
        whole.load_weights(IMAGENET_WEIGHTS)
        features = keras.layers.GlobalAveragePooling2D()(whole.get_layer("head").output)
        model = keras.Model(whole.input, features)
        chosen = images[:TEXTBOOK_IMAGES]
        paths = []
        for number, data in enumerate(chosen):
            path = os.path.join(self.folder, f"{number}.jpg")
            with open(path, "wb") as file:
                file.write(data)
            paths.append(path)

        def one(path: str) -> None:
            image = keras.utils.load_img(path, target_size=(224, 224))
            array = preprocess_input(np.expand_dims(keras.utils.img_to_array(image), 0))
            model.predict(array, verbose=0)

        one(paths[0])

        def every() -> None:
            for path in paths:
                one(path)

        return timed(every), len(paths)

    def join(self) -> list[Figure]:
        """Times the matrix product alone, Kith's join, and FAISS on the same shards."""
        from pipelines.build_index import build_index

        index_dataset = build_index(self.config, self.session, self.embedded.embeddings.folder)
        return self._time_join(index_dataset.folder)

    def _time_join(self, folder: str) -> list[Figure]:
        import faiss

        from index_builder.join import JoinSpec, join_shard
        from index_builder.shards import open_index, open_shard

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
                blocks.append(shard.codes())
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


def describe_machine() -> dict[str, Any]:
    """Returns the CPU's model, the cores that this process may use, and the versions."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    model = line.partition(":")[2].strip()
                    break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def show(machine: dict[str, Any], figures: list[Figure], console: Console) -> None:
    """Prints the figures as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}")
    console.print(versions)
    table = Table("", "measured", "units", "seconds", "a second", "ratio", "note")
    last = ""
    for figure in figures:
        if last and figure.part != last:
            table.add_section()
        ratio = f"{figure.ratio:.2f} x {figure.peer}" if figure.ratio is not None else ""
        speed = f"{figure.per_second:,.0f}" if figure.per_second < 1e6 else (
            f"{figure.per_second / 1e6:,.0f} M"
        )  # fmt: skip
        part = figure.part if figure.part != last else ""
        cells = (f"{figure.units:,} {figure.unit}", f"{figure.seconds:.3f}", speed, ratio, figure.note)
        table.add_row(part, figure.name, *cells)
        last = figure.part
    console.print(table)


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
        rows = [dataclasses.asdict(figure) | {"per_second": figure.per_second} for figure in figures]
        print(json.dumps({"machine": machine, "figures": rows}))
    else:
        show(machine, figures, Console(width=150, soft_wrap=True))


if __name__ == "__main__":
    main()
