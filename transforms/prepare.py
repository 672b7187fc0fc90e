"""Decoding and preprocessing ahead of the encoder, on threads, in order."""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import ImageError
from transforms.decoding import decode_image
from transforms.failures import UNREADABLE_REGION, Failure
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord, UnreadableRegion


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image ready for the encoder: pixels uint8 [height, width, 3], and what is kept of it."""

    record: ImageRecord
    pixels: NDArray[np.uint8]
    content_sha256: bytes
    width: int
    height: int
    format: str


def prepare_image(
    record: ImageRecord, preprocessing: Preprocessing, max_pixels: int
) -> PreparedImage | Failure:
    """Decodes and resizes one image; whatever is wrong with it becomes a Failure."""
    if record.error is not None:
        return failure_of(record, "read", record.error)
    try:
        image = decode_image(record.data, max_pixels=max_pixels)
    except ImageError as error:
        return failure_of(record, "decode", error)
    pixels = preprocessing.apply(image.pixels)
    digest = hashlib.sha256(record.data).digest()
    kept = dataclasses.replace(record, data=b"")
    return PreparedImage(kept, pixels, digest, image.width, image.height, image.format)


def failure_of(record: ImageRecord, stage: str, error: ImageError) -> Failure:
    """Returns the row for an image that a stage could not handle."""
    return Failure(record.image_id, record.source_shard, record.row, stage, error.reason, error.message)


def prepare_images(
    records: Iterable[ImageRecord | UnreadableRegion],
    preprocessing: Preprocessing,
    max_pixels: int,
    threads: int,
    look_ahead: int,
) -> Iterator[PreparedImage | Failure]:
    """Prepares a stream of images on threads and yields the results in the order of the stream.

    At most `look_ahead` images are read and not yet yielded, which bounds the memory. The threads
    go on while the caller works on what it got, so decoding overlaps with encoding.
    """
    waiting: deque[Future[PreparedImage | Failure] | Failure] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for record in records:
                if isinstance(record, UnreadableRegion):
                    waiting.append(_region(record))
                else:
                    waiting.append(pool.submit(prepare_image, record, preprocessing, max_pixels))
                if len(waiting) >= look_ahead:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(
    waiting: Future[PreparedImage | Failure] | Failure,
) -> PreparedImage | Failure:
    return waiting if isinstance(waiting, Failure) else waiting.result()


def _region(region: UnreadableRegion) -> Failure:
    return Failure(None, region.source_shard, None, "read", UNREADABLE_REGION, region.error)
