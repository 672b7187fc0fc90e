"""Embedding: one DoFn that takes a shard of images to a part of the embeddings dataset.

A shard is read, decoded, encoded and written inside one call, block by block; no pixel is ever an
element of a PCollection, and a part appears whole or not at all.
"""

import dataclasses
import gc
import os
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
from apache_beam.utils.shared import Shared
from numpy.typing import NDArray

from index_builder import embeddings, manifests, storage
from index_builder.errors import ImageError, KithError
from index_builder.fingerprints import fingerprint
from index_builder.manifests import Part
from index_builder.vectors import unit_float16
from transforms import failures
from transforms.counters import LOCAL_PROGRESS, count, timed
from transforms.encoders.encoder import Encoder
from transforms.encoders.family import EncoderSpec
from transforms.encoders.registry import encoder_fingerprint, load_encoder
from transforms.failures import Failure
from transforms.prepare import PreparedImage, failure_of, prepare_images
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageShard, ImageSource

STAGE = "embed"
# Raised when the same images and configuration give other bytes than before.
REVISION = 1


@dataclasses.dataclass(frozen=True)
class EmbedSpec:
    """Everything that decides what is embedded and how; travels to the workers.

    `metadata` holds (column, type) pairs. `batch_size` and `threads` (None: all cores) decide about
    speed and memory; the batch size also about the last bits of a vector.
    """

    sources: tuple[ImageSource, ...]
    metadata: tuple[tuple[str, str], ...]
    max_pixels: int
    encoder: EncoderSpec
    preprocessing: Preprocessing
    batch_size: int = 32
    threads: int | None = None

    def encoder_fingerprint(self) -> dict[str, object]:
        """Returns what decides whether two vectors can be compared."""
        return encoder_fingerprint(self.encoder, self.preprocessing)

    def part_key(self, shard: ImageShard, encoder: dict[str, object]) -> str:
        """Returns the fingerprint of everything that decides the content of a shard's part."""
        reading = self.sources[shard.source].model_dump(mode="json", exclude={"paths", "name"})
        return fingerprint(
            {
                "revision": REVISION,
                "encoder": encoder,
                "batch_size": self.batch_size,
                "max_pixels": self.max_pixels,
                "metadata": self.metadata,
                "reading": reading,
                "shard": shard.name,
                "token": shard.token,
            }
        )


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
    each, with the same part names.
    """

    spec: EmbedSpec
    embeddings_folder: str
    failures_folder: str

    def expand(self, tasks: beam.PCollection[EmbedTask]) -> beam.PCollection[Part]:
        """Adds the one fused step."""
        return tasks | "EmbedShard" >> beam.ParDo(
            _EmbedShard(self.spec, self.embeddings_folder, self.failures_folder)
        )


class _EmbedShard(beam.DoFn):
    """Shares one encoder between all threads of a process."""

    def __init__(self, spec: EmbedSpec, embeddings_folder: str, failures_folder: str) -> None:
        self._spec = spec
        self._embeddings_folder = embeddings_folder
        self._failures_folder = failures_folder
        self._shared = Shared()

    def process(self, task: EmbedTask) -> Iterator[Part]:
        finished = manifests.finished_part(self._embeddings_folder, task.part, task.key)
        if finished is None:
            with timed(STAGE):
                encoder = self._shared.acquire(
                    lambda: load_encoder(self._spec.encoder, self._spec.batch_size)
                )
                finished = embed_shard(
                    task, self._spec, encoder, self._embeddings_folder, self._failures_folder
                )
            books = finished.properties
            count(STAGE, "images_in", books["images_read"])
            count(STAGE, "images_out", books["images_embedded"])
            count(STAGE, "bytes_out", sum(file.bytes for file in finished.files))
            for reason, failed in books["images_failed"].items():
                count(STAGE, f"images_failed_{reason}", failed)
        yield finished


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
) -> Part:
    """Embeds one shard: writes its parts of both datasets, marks them, returns the embeddings' one.

    Memory: the look-ahead of decoded images plus one row group. Raises KithError when the books do
    not balance: a defect, not a bad image.
    """
    source = spec.sources[task.shard.source]
    threads = spec.threads or len(os.sched_getaffinity(0))
    records = source.read(task.shard, dict(spec.metadata))
    prepared = prepare_images(
        records, spec.preprocessing, spec.max_pixels, threads, 2 * spec.batch_size + threads
    )
    schema = embeddings.EmbeddingSchema(encoder.dim, spec.metadata)
    sink = _PartSink(schema)
    failed: list[Failure] = []
    name = f"{task.part}.parquet"
    embedded = 0
    with (
        storage.atomic_path(storage.join(embeddings_folder, name)) as temporary,
        embeddings.parquet_writer(temporary, schema.arrow()) as writer,
    ):
        images = _Counted(prepared)
        for batch in _batches(images, spec.batch_size, failed):
            embedded += _encode(batch, encoder, failed, sink)
            LOCAL_PROGRESS.add(len(batch))
            sink.write_full(writer)
        sink.write_rest(writer)
    reasons = failures.count_reasons(failed)
    if images.count != embedded + sum(reasons.values()):
        raise KithError(
            f"The books of {task.shard.name} do not balance: {images.count} images read, "
            f"{embedded} embedded, {sum(reasons.values())} failed. This is a defect of Kith."
        )
    failures.write_failures(storage.join(failures_folder, name), failed)
    manifests.mark_part(
        failures_folder,
        Part(
            task.part,
            task.key,
            len(failed),
            (manifests.describe_file(failures_folder, name),),
            {"source_shard": task.shard.name},
        ),
    )
    part = Part(
        task.part,
        task.key,
        embedded,
        (manifests.describe_file(embeddings_folder, name),),
        {
            "source_shard": task.shard.name,
            "dim": encoder.dim,
            "images_read": images.count,
            "images_embedded": embedded,
            "images_failed": reasons,
            "unreadable_regions": images.regions,
        },
    )
    manifests.mark_part(embeddings_folder, part)
    return part


class _Counted:
    """Passes images on and counts them, apart from regions that are no images."""

    def __init__(self, prepared: Iterable[PreparedImage | Failure]) -> None:
        self._prepared = prepared
        self.count = 0
        self.regions = 0

    def __iter__(self) -> Iterator[PreparedImage | Failure]:
        for image in self._prepared:
            if isinstance(image, Failure) and image.reason == failures.UNREADABLE_REGION:
                self.regions += 1
            else:
                self.count += 1
            yield image


def _batches(
    prepared: Iterable[PreparedImage | Failure], size: int, failed: list[Failure]
) -> Iterator[list[PreparedImage]]:
    """Groups images into batches of `size`, the last one smaller; failures go to `failed`."""
    batch: list[PreparedImage] = []
    for image in prepared:
        if isinstance(image, Failure):
            failed.append(image)
            continue
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(
    batch: list[PreparedImage], encoder: Encoder, failed: list[Failure], sink: "_PartSink"
) -> int:
    """Encodes a batch into the sink; images without a usable vector go to `failed`."""
    raw = encoder.encode(np.stack([image.pixels for image in batch]))
    vectors, valid = unit_float16(raw)
    for image, vector in zip(batch, raw, strict=True):
        problem = _vector_problem(vector)
        if problem is not None:
            failed.append(failure_of(image.record, "encode", problem))
    kept = [image for image, ok in zip(batch, valid, strict=True) if ok]
    sink.add(vectors[valid], kept)
    return len(kept)


def _vector_problem(vector: NDArray[np.float32]) -> ImageError | None:
    if not np.isfinite(vector).all():
        return ImageError("non_finite", "The encoder returned numbers that are not finite.")
    if not vector.any():
        return ImageError(
            "zero_vector", "The encoder returned a zero vector, which has no direction to compare."
        )
    return None


class _PartSink:
    """Collects rows and writes them in row groups of a fixed size."""

    def __init__(self, schema: embeddings.EmbeddingSchema) -> None:
        self._schema = schema
        self._vectors: list[NDArray[np.float16]] = []
        self._images: list[PreparedImage] = []

    def add(self, vectors: NDArray[np.float16], images: list[PreparedImage]) -> None:
        """Adds rows: vectors float16 [n, dim] and the images they belong to."""
        self._vectors.append(vectors)
        # Pixels are done with; keeping them for a whole row group would take 600 MB.
        self._images += [dataclasses.replace(image, pixels=_NO_PIXELS) for image in images]

    def write_full(self, writer: pq.ParquetWriter) -> None:
        """Writes a row group once there are enough rows for one."""
        if len(self._images) >= embeddings.ROW_GROUP_ROWS:
            self.write_rest(writer)

    def write_rest(self, writer: pq.ParquetWriter) -> None:
        """Writes the rows that are left."""
        if not self._images:
            return
        images = self._images
        columns: dict[str, list[object]] = {
            "image_id": [image.record.image_id for image in images],
            "item_id": [image.record.item_id or image.record.image_id for image in images],
            "content_sha256": [image.content_sha256 for image in images],
            "source_shard": [image.record.source_shard for image in images],
            "row": [image.record.row for image in images],
            "width": [image.width for image in images],
            "height": [image.height for image in images],
            "format": [image.format for image in images],
        }
        for name, _ in self._schema.metadata:
            columns[name] = [image.record.metadata.get(name) for image in images]
        writer.write_table(self._schema.table(np.concatenate(self._vectors), columns))
        self._vectors, self._images = [], []


_NO_PIXELS = np.empty((0, 0, 3), dtype=np.uint8)
