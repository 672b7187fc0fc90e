"""The measurements of `benchmarks.embed` that need Kith, each in a process of its own.

`python -m benchmarks.embed_parts PART ...` prints one JSON object on the last line. One engine in one
precision a process: thread pools of two engines would get in each other's way.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.figures import timed
from benchmarks.peers.records import find_records, read_record

if TYPE_CHECKING:
    from pipelines.config import Config
    from transforms.encoders.engines.choice import EngineChoice

WORK = ("decode", "engine", "loop", "pipeline")


def write_config(
    path: str, workspace: str, shards: str, network: str, engine: str, precision: str
) -> str:
    """Writes a configuration that embeds a folder of shards, and returns its path."""
    encoder = {"name": network, "engine": engine, "precision": precision}
    if network != "efficientnet_lite0":
        encoder["weights"] = "random"  # Only Lite0's ship with Kith; speed is the same.
    settings = {
        "workspace": workspace,
        "images": {"sources": [{"format": "tfrecord", "paths": [os.path.join(shards, "*.tfrecord")]}]},
        "encoder": encoder,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(settings, file)  # JSON is YAML
    return path


class Comparison:
    """Decoding alone, an engine alone, the functions in a loop, and the stage through Beam."""

    def __init__(self, config: "Config", choice: "EngineChoice") -> None:
        from pipelines.embed_plan import plan_embedding
        from pipelines.runners import RunnerSpec
        from pipelines.stage import Session
        from transforms.encoders.registry import load_encoder
        from transforms.sources.base import ImageRecord

        self._config = config
        graph = plan_embedding(config, choice).graph
        self._spec, self._tasks = graph.spec, graph.tasks
        self._session = Session(RunnerSpec(), Console(file=sys.stderr, quiet=True))
        self._records = [
            record
            for task in self._tasks
            for record in self._spec.sources[task.shard.source].read(task.shard, {})
            if isinstance(record, ImageRecord)
        ]
        self._threads = len(os.sched_getaffinity(0))
        self._encoder = load_encoder(self._spec.encoder, self._spec.batch_size, choice)

    @property
    def images(self) -> list[bytes]:
        """The encoded images."""
        return [record.data for record in self._records]

    def run(self, rounds: int, work: Sequence[str]) -> dict[str, Any]:
        """Runs everything in turns, `rounds` times; returns the seconds of each run."""
        pixels = self._decode()
        seconds: dict[str, list[float]] = {name: [] for name in work}
        loads: list[float] = []
        does: dict[str, Callable[[], float]] = {
            "decode": lambda: timed(self._decode),
            "engine": lambda: timed(lambda: self._encode(pixels)),
            "loop": lambda: timed(self._loop),
            "pipeline": lambda: self._pipeline(loads),
        }
        self._warm_up(self._encoder)
        for number in range(rounds + 1):
            for name in work:
                took = does[name]()
                if number > 0 or rounds == 1:
                    seconds[name].append(took)
                shutil.rmtree(self._config.workspace, ignore_errors=True)
            if rounds == 1:
                break  # A run of one round is a trial, without the one that only warms up.
        return {"images": len(self._records), "seconds": seconds, "load_seconds": loads}

    def _decode(self) -> NDArray[np.uint8]:
        """Decodes and resizes every image on all threads: no hashing, no queues."""
        from transforms.decoding import decode_image

        preparation = self._spec.preparation
        preprocessing = preparation.preprocessing
        height, width = preprocessing.input_size
        pixels = np.empty((len(self._records), height, width, 3), np.uint8)

        def slice_of(thread: int) -> None:
            for number in range(thread, len(self._records), self._threads):
                data = self._records[number].data
                image = decode_image(data, preparation.policy, preprocessing.needed_size)
                pixels[number] = preprocessing.apply(image.pixels, (image.width, image.height))

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(slice_of, range(self._threads)))
        return pixels

    def _encode(self, pixels: NDArray[np.uint8]) -> None:
        """Encodes pixels in memory, with as many callers at once as the engine can use."""
        size = self._spec.batch_size
        batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        with ThreadPoolExecutor(self._encoder.streams) as pool:
            list(pool.map(self._encoder.encode, batches))

    def _warm_up(self, encoder: Any) -> None:
        """Lets every stream of a new engine make its first call."""
        height, width = self._spec.preparation.preprocessing.input_size
        grey = np.full((self._spec.batch_size, height, width, 3), 127, np.uint8)
        with ThreadPoolExecutor(encoder.streams) as pool:
            list(pool.map(encoder.encode, [grey] * 2 * encoder.streams))

    def _loop(self) -> None:
        """Does to every shard what the pipeline's workers do, Parquet and checksums included."""
        from transforms.embed import embed_shard

        for task in self._tasks:
            embed_shard(
                task,
                self._spec,
                self._encoder,
                os.path.join(self._config.workspace, "embeddings"),
                os.path.join(self._config.workspace, "failures"),
            )

    def _pipeline(self, loads: list[float]) -> float:
        """Runs the embed stage; returns its seconds without those of the network coming and going."""
        from pipelines import embed_images as stage
        from transforms import embed

        worker: Any = embed
        driver: Any = stage
        load_encoder, release_encoder = worker.load_encoder, driver.release_encoder
        found: list[float] = []
        released: list[float] = []

        def timed_load(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            encoder = load_encoder(*arguments, **named)
            # A new engine's first calls allocate; the loop's engine has had its own.
            self._warm_up(encoder)
            found.append(time.perf_counter() - start)
            return encoder

        # The runner's workers are in this process, so that they see the other function.
        worker.load_encoder = timed_load
        driver.release_encoder = lambda: released.append(timed(release_encoder))
        try:
            whole = timed(lambda: stage.embed_images(self._config, self._session))
        finally:
            worker.load_encoder, driver.release_encoder = load_encoder, release_encoder
        if len(found) != 1:
            raise RuntimeError(f"The stage loaded {len(found)} encoders, wanted one to leave out.")
        both = sum(found) + sum(released)
        loads.append(both)
        return whole - both


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures one network on one engine in one precision."""
    from pipelines.config_loading import load_config
    from transforms.encoders.engines.choice import EngineChoice

    with tempfile.TemporaryDirectory(prefix="kith-bench-") as folder:
        path, workspace = os.path.join(folder, "bench.yaml"), os.path.join(folder, "workspace")
        network, engine, precision = options.network, options.engine, options.precision
        config = load_config(write_config(path, workspace, options.shards, network, engine, precision))
        # The configuration has refused other engines and precisions by now.
        comparison = Comparison(config, EngineChoice(engine, precision))
        return comparison.run(options.rounds, options.work.split(","))


def textbook(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the textbook way on the first images of the shards."""
    places = find_records(Path(options.shards), options.images)
    seconds = time_textbook(options.network, [read_record(place)[1] for place in places])
    return {"images": len(places), "seconds": seconds}


def time_textbook(network: str, images: list[bytes]) -> float:
    """Returns the seconds of the lines that a tutorial has: one image at a time, from files."""
    keras, model, preprocess_input = _keras_network(network)
    size = model.input_shape[1:3]
    with tempfile.TemporaryDirectory(prefix="kith-bench-") as folder:
        paths = []
        for number, data in enumerate(images):
            paths.append(os.path.join(folder, f"{number}.jpg"))
            with open(paths[-1], "wb") as file:
                file.write(data)

        def one(path: str) -> None:
            image = keras.utils.load_img(path, target_size=size)
            array = preprocess_input(np.expand_dims(keras.utils.img_to_array(image), 0))
            model.predict(array, verbose=0)

        one(paths[0])
        start = time.perf_counter()
        for path in paths:
            one(path)
        return time.perf_counter() - start


def save_network(options: argparse.Namespace) -> dict[str, Any]:
    """Saves Lite0 with its ImageNet weights as a Keras file, for a peer to load."""
    _, model, _ = _keras_network("efficientnet_lite0")
    model.save(options.path)
    return {"path": options.path}


def _keras_network(name: str) -> tuple[Any, Any, Any]:
    """Returns Keras, a network from normalised images to vectors, and its normalisation."""
    from transforms.encoders import efficientnet_lite0
    from transforms.encoders.keras_runtime import import_keras

    keras = import_keras()
    if name == efficientnet_lite0.NAME:
        whole = efficientnet_lite0.build_model()
        whole.load_weights(efficientnet_lite0.IMAGENET_WEIGHTS)
        features = keras.layers.GlobalAveragePooling2D()(whole.get_layer("head").output)
        return keras, keras.Model(whole.input, features), efficientnet_lite0.preprocess_input
    if name != "vgg16":
        raise ValueError(f"network is {name!r}, wanted efficientnet_lite0 or vgg16.")
    vgg16 = keras.applications.vgg16
    # Random weights take as long as others, and need no download.
    model = vgg16.VGG16(include_top=False, weights=None, pooling="avg", input_shape=(224, 224, 3))
    return keras, model, vgg16.preprocess_input


def main(arguments: list[str] | None = None) -> None:
    """Runs one measurement and prints its result; what Kith refuses is a result too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed_parts", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("compare")
    command.add_argument("--shards", required=True)
    command.add_argument("--network", required=True)
    command.add_argument("--engine", required=True)
    command.add_argument("--precision", required=True)
    command.add_argument("--rounds", type=int, default=1)
    command.add_argument("--work", default=",".join(WORK))
    command.set_defaults(run=compare)
    command = commands.add_parser("textbook")
    command.add_argument("--shards", required=True)
    command.add_argument("--network", required=True)
    command.add_argument("--images", type=int, required=True)
    command.set_defaults(run=textbook)
    command = commands.add_parser("save-network")
    command.add_argument("path")
    command.set_defaults(run=save_network)
    options = parser.parse_args(arguments)

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from index_builder.errors import KithError

    try:
        result = options.run(options)
    except KithError as error:
        result = {"skipped": str(error)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
