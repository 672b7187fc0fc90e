"""A small real catalogue, cut from the committed sample, and what a run leaves on disk."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pipelines.config import Config
from pipelines.config_loading import load_config
from pipelines.runners import RunnerSpec
from pipelines.stage import Session

SAMPLES = Path(__file__).parents[2] / "samples"
METADATA = {"object_id": "string", "name": "string", "category": "string", "drawing": "string"}


def write_catalogue(folder: Path, shards: int = 3, images: int = 60) -> Path:
    """Writes TFRecord shards with some of the sample's images, and the hard files beside them."""
    import tensorflow as tf

    (folder / "catalog").mkdir(parents=True)
    files = sorted((SAMPLES / "catalog").glob("*.tfrecord"))
    records = [record.numpy() for record in tf.data.TFRecordDataset([str(file) for file in files])]
    objects = [_object_of(record) for record in records]
    # Whole objects, each in its three drawings, so that there are right answers to find.
    wanted = set(list(dict.fromkeys(objects))[: images // 3])
    chosen = [record for record, name in zip(records, objects, strict=True) if name in wanted]
    for number in range(shards):
        name = str(folder / "catalog" / f"images-{number:05d}.tfrecord")
        with tf.io.TFRecordWriter(name) as writer:
            for record in chosen[number::shards]:
                writer.write(record)
    shutil.copytree(SAMPLES / "hard", folder / "hard")
    return folder


def _object_of(record: bytes) -> bytes:
    import tensorflow as tf

    features = tf.train.Example.FromString(record).features.feature
    return bytes(features["object_id"].bytes_list.value[0])


def write_config(path: Path, catalogue: Path | str, workspace: Path | str, **sections: Any) -> Path:
    """Writes a configuration for a catalogue; `sections` replace or add whole sections."""
    values: dict[str, Any] = {
        "workspace": str(workspace),
        "images": {
            "sources": [
                {"format": "tfrecord", "paths": f"{catalogue}/catalog/*.tfrecord"},
                {"format": "files", "paths": f"{catalogue}/hard/*"},
            ],
            "metadata": METADATA,
        },
        "encoder": {"engine": "tensorflow"},
        "index": {"transform": {"type": "pca", "dim": 32}, "shards": 3},
        "join": {"k": 5},
        "evaluate": {"truth": "object_id", "group_by": "category", "sample": 20},
        "export": {"columns": ["name"]},
    }
    path.write_text(yaml.safe_dump(values | sections))
    return path


def session(*beam_options: str) -> Session:
    """Returns a session of the local runner that keeps quiet."""
    return Session(RunnerSpec("DirectRunner", beam_options), Console(quiet=True, stderr=True))


def load(path: Path, *overrides: str) -> Config:
    """Loads a configuration as the command line does."""
    return load_config(str(path), overrides)


def dataset_bytes(workspace: Path) -> dict[str, str]:
    """Returns the hash of every file of every dataset (parts and manifests) by relative path."""
    kinds = ("embeddings", "failures", "index", "neighbors", "evaluations", "exports")
    return {
        str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in kinds
        for path in sorted((workspace / kind).rglob("*"))
        if path.is_file()
    }
