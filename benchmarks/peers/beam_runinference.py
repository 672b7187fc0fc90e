"""Beam `RunInference` with its TensorFlow handler, on the in-process runner that Kith uses too.

The network is a Keras file with vectors for output. Images are decoded by Pillow in a Map; the
handler's own batching is left as it is.
"""

import argparse
import io
import time
from importlib.metadata import version
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import tensorflow as tf
from apache_beam.ml.inference.base import KeyedModelHandler, PredictionResult, RunInference
from apache_beam.ml.inference.tensorflow_inference import TFModelHandlerNumpy
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from PIL import Image

from benchmarks.peers.records import report

SIZE = 224
DIM = 1280


def decode(payload: bytes) -> tuple[str, np.ndarray]:
    """Returns the id and the normalised pixels of a serialised example, float32 [224, 224, 3]."""
    features = tf.train.Example.FromString(payload).features.feature
    image = Image.open(io.BytesIO(features["image/encoded"].bytes_list.value[0])).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    resized = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    pixels = (np.asarray(resized, dtype=np.float32) - 127.0) / 128.0
    return features["image_id"].bytes_list.value[0].decode(), pixels


def to_row(result: tuple[str, PredictionResult]) -> dict[str, object]:
    """Returns the Parquet row of a prediction."""
    vector = np.asarray(result[1].inference, dtype=np.float16)
    return {"image_id": result[0], "embedding": vector}


def main() -> None:
    """Embeds the images of the shards and writes Parquet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a .keras file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--mode", choices=("in_memory", "multi_threading"), required=True)
    options = parser.parse_args()

    workers = options.threads if options.mode == "multi_threading" else 1
    beam_options = PipelineOptions(
        [f"--direct_running_mode={options.mode}", f"--direct_num_workers={workers}"]
    )
    handler = KeyedModelHandler(TFModelHandlerNumpy(options.model))
    schema = pa.schema([("image_id", pa.string()), ("embedding", pa.list_(pa.float16(), DIM))])
    start = time.perf_counter()
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=beam_options)
    _ = (
        pipeline
        | "Read" >> beam.io.ReadFromTFRecord(str(options.shards / "*.tfrecord"))
        | "Decode" >> beam.Map(decode)
        | "Encode" >> RunInference(handler)
        | "ToRow" >> beam.Map(to_row)
        | "Write" >> beam.io.WriteToParquet(str(options.out / "vectors"), schema)
    )
    result = pipeline.run()
    result.wait_until_finish()
    seconds = time.perf_counter() - start
    loading, images = 0.0, 0
    query = result.metrics().query()
    for metric in query["distributions"]:
        if metric.key.metric.name == "load_model_latency_milli_secs":
            loading += metric.committed.sum / 1000
    for metric in query["counters"]:
        if metric.key.metric.name == "num_inferences":
            images += metric.committed
    packages = ("apache-beam", "tensorflow-cpu", "keras", "pillow")
    note = f"{workers} worker{'s' * (workers > 1)}, {options.mode.replace('_', ' ')}"
    report(images, seconds - loading, note, {name: version(name) for name in packages})


if __name__ == "__main__":
    main()
