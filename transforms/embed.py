"""Embedding: one DoFn that takes a shard of images to a part of the embeddings dataset.

A shard is read, decoded, encoded and written inside one call, block by block; no pixel is ever an
element of a PCollection, and a part appears whole or not at all.
"""

import contextlib
import dataclasses
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping

import apache_beam as beam
from apache_beam.utils.shared import Shared

from index_builder.datasets import embeddings, manifests, storage
from index_builder.datasets.fingerprints import fingerprint, short
from index_builder.datasets.manifests import Part
from index_builder.errors import KithError
from transforms import failures
from transforms.counters import LOCAL_PROGRESS, count, timed
from transforms.embed_shard import ShardBooks, ShardEncoder
from transforms.encoders.encoder import Encoder
from transforms.encoders.engines.choice import DEFAULT_CHOICE, EngineChoice
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import load_encoder, network_fingerprint
from transforms.in_flight import InFlightMarks
from transforms.part_sink import PartSink
from transforms.prepare import Preparation, prepare_images
from transforms.reuse import PreviousVectors, ReuseSpec
from transforms.sources.base import ImageShard, ImageSource

STAGE = "embed"
# Raised when the same images and configuration give other bytes than before.
REVISION = 2


@dataclasses.dataclass(frozen=True)
class EmbedSpec:
    """Everything that decides what is embedded and how; travels to the workers.

    `metadata` holds (column, type) pairs. `batch_size` and `threads` (None: all cores) decide about
    speed and memory; the batch size also about the last bits of a vector. An image that a thread
    decodes for longer than `timeout_sec` is tried once more in a process of its own. Vectors are
    stored as float16 of unit length, without `normalize` as the encoder's own float32.
    """

    sources: tuple[ImageSource, ...]
    metadata: tuple[tuple[str, str], ...]
    preparation: Preparation
    encoder: EncoderSpec
    choice: EngineChoice = DEFAULT_CHOICE
    batch_size: int = 32
    threads: int | None = None
    timeout_sec: float = 120.0
    normalize: bool = True

    def encoder_fingerprint(self) -> dict[str, object]:
        """Returns what decides whether two vectors can be compared."""
        # Unit vectors are what there was before there was a choice: their fingerprint stays.
        lengths = {} if self.normalize else {"normalize": False}
        return {
            **comparable_without_engine(self.encoder, self.preparation),
            **self.choice.fingerprint(),
            **lengths,
        }

    def part_key(self, shard: ImageShard, encoder: dict[str, object]) -> str:
        """Returns the fingerprint of everything that decides the content of a shard's part."""
        reading = self.sources[shard.source].reading()
        return fingerprint(
            {
                "revision": REVISION,
                "encoder": encoder,
                "batch_size": self.batch_size,
                "admission": self.preparation.policy.admission(),
                "metadata": self.metadata,
                "reading": reading,
                "shard": shard.name,
                "token": shard.token,
            }
        )


def comparable_without_engine(spec: EncoderSpec, preparation: Preparation) -> dict[str, object]:
    """What decides whether two vectors can be compared, apart from engine and precision."""
    return {
        **network_fingerprint(spec),
        **preparation.preprocessing.fingerprint(),
        **preparation.policy.fingerprint(),
    }


@dataclasses.dataclass(frozen=True)
class EmbedTask:
    """One element: a shard, and the part that it becomes in both datasets."""

    shard: ImageShard
    part: str
    key: str


@dataclasses.dataclass
class EmbedImages(beam.PTransform):
    """Embeds shards of images.

    Input: EmbedTask. Output: the Part of the embeddings dataset that each task wrote or, after an
    interrupted run, had written. Images that cannot be embedded go to the failures dataset, one row
    each, with the same part names. `reuse` names a dataset whose vectors may be taken over.

    Resource hints for workers (`with_resource_hints`) belong on this whole step: everything from
    reading to writing is in it, so that they split no stage.
    """

    spec: EmbedSpec
    embeddings_folder: str
    failures_folder: str
    reuse: ReuseSpec | None = None

    def expand(self, tasks: beam.PCollection[EmbedTask]) -> beam.PCollection[Part]:
        """Adds the one fused step."""
        return tasks | "EmbedShard" >> beam.ParDo(
            _EmbedShard(self.spec, self.embeddings_folder, self.failures_folder, self.reuse)
        )


class _EmbedShard(beam.DoFn):
    """Shares one encoder between all threads of a process."""

    def __init__(
        self, spec: EmbedSpec, embeddings_folder: str, failures_folder: str, reuse: ReuseSpec | None
    ) -> None:
        self._spec = spec
        self._embeddings_folder = embeddings_folder
        self._failures_folder = failures_folder
        self._reuse = reuse
        self._shared = Shared()

    def process(self, task: EmbedTask) -> Iterator[Part]:
        spec = self._spec
        finished = manifests.finished_part(self._embeddings_folder, task.part, task.key)
        if finished is None:
            with timed(STAGE):
                encoder = self._shared.acquire(
                    lambda: load_encoder(spec.encoder, spec.batch_size, spec.choice)
                )
                finished = embed_shard(
                    task, spec, encoder, self._embeddings_folder, self._failures_folder, self._reuse
                )
            _count(finished)
        else:
            # A process that was killed just after it had finished the part has left its marks.
            InFlightMarks.forget(_marks_folder(self._failures_folder), _marks_name(task))
        yield finished


def _count(part: Part) -> None:
    books = part.properties
    count(STAGE, "images_in", books["images_read"])
    count(STAGE, "images_out", books["images_embedded"])
    count(STAGE, "images_reused", books["images_reused"])
    count(STAGE, "model_calls", books["model_calls"])
    count(STAGE, "unreadable_regions", books["unreadable_regions"])
    count(STAGE, "bytes_out", sum(file.bytes for file in part.files))
    for reason, failed in books["images_failed"].items():
        count(STAGE, f"images_failed_{reason}", failed)


class _Nothing:
    """What the process holds in place of an encoder."""


def release_encoder() -> None:
    """Lets go of the encoder that this process shares, where the runner's workers are in it.

    Beam would keep it through all later stages, and TensorFlow complains about what is left of it
    when the interpreter ends. Acquiring another object is how Beam drops a shared one.
    """
    Shared().acquire(_Nothing)
    gc.collect()


def embed_shard(
    task: EmbedTask,
    spec: EmbedSpec,
    encoder: Encoder,
    embeddings_folder: str,
    failures_folder: str,
    reuse: ReuseSpec | None = None,
) -> Part:
    """Embeds one shard: writes its parts of both datasets, marks them, returns the embeddings' one.

    Memory: the look-ahead of decoded images, the batches in flight, one row group, and the images
    that are being decoded, which `transforms.pixel_budget` bounds. Raises KithError when the books
    do not balance: a defect, not a bad image.
    """
    threads = spec.threads or len(os.sched_getaffinity(0))
    look_ahead = 2 * spec.batch_size + threads
    records = spec.sources[task.shard.source].read(task.shard, dict(spec.metadata))
    schema = embeddings.EmbeddingSchema(encoder.dim, spec.metadata, spec.normalize)
    name = f"{task.part}.parquet"
    previous = None if reuse is None else PreviousVectors(reuse)
    shard = ShardEncoder(encoder, spec.batch_size, spec.preparation.policy, previous, spec.normalize)
    with (
        contextlib.closing(shard),
        InFlightMarks.open(_marks_folder(failures_folder), _marks_name(task), threads) as marks,
    ):
        with (
            storage.atomic_path(storage.join(embeddings_folder, name)) as temporary,
            embeddings.parquet_writer(temporary, schema.arrow()) as writer,
        ):
            prepared = prepare_images(
                records, spec.preparation, threads, look_ahead,
                known=shard.known, marks=marks, timeout_sec=spec.timeout_sec,
            )  # fmt: skip
            sink = PartSink(schema, writer)
            with contextlib.closing(prepared):
                shard.run(prepared, sink, LOCAL_PROGRESS.add)
        books = shard.books
        failures.write_failures(storage.join(failures_folder, name), books.failures)
        origin = {"source_shard": task.shard.name, "token": task.shard.token}
        _mark(failures_folder, task, len(books.failures), origin)
        figures = {**origin, "dim": encoder.dim, **_balance(task, books), "model_calls": shard.calls}
        part = _mark(embeddings_folder, task, sink.rows, figures)
        marks.finish()
    return part


def _marks_folder(failures_folder: str) -> str:
    """A local folder for the marks of images in flight; in the workspace, where that is local."""
    if storage.is_remote(failures_folder):
        name = f"kith-in-flight-{short(fingerprint(failures_folder))}"
        return os.path.join(tempfile.gettempdir(), name)
    return storage.join(failures_folder, manifests.WORK_FOLDER, "in-flight")


def _marks_name(task: EmbedTask) -> str:
    return f"{task.part}-{short(task.key)}"


def _balance(task: EmbedTask, books: ShardBooks) -> dict[str, object]:
    reasons = failures.count_reasons(books.failures)
    failed = sum(reasons.values())
    if books.read != books.embedded + books.reused + failed:
        raise KithError(
            f"The books of {task.shard.name} do not balance: {books.read} images read, "
            f"{books.embedded} embedded, {books.reused} reused, {failed} failed. This is a defect of "
            "Kith."
        )
    return {
        "images_read": books.read,
        "images_embedded": books.embedded,
        "images_reused": books.reused,
        "images_failed": reasons,
        "unreadable_regions": books.regions,
    }


def _mark(folder: str, task: EmbedTask, rows: int, properties: Mapping[str, object]) -> Part:
    """Marks a part as finished: its file is in place."""
    files = (manifests.describe_file(folder, f"{task.part}.parquet"),)
    part = Part(task.part, task.key, rows, files, dict(properties))
    manifests.mark_part(folder, part)
    return part
