"""Encoding batches ahead of the consumer, and finding the image that makes a batch fail."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import ImageError, KithError
from index_builder.scoring.vectors import unit_float16
from transforms.encoders.encoder import Encoder
from transforms.encoders.engines.engine import EncodingError

Encoded = NDArray[np.floating[Any]] | ImageError


class EncodeAhead:
    """Encodes batches on threads of their own, so that the next one is made up meanwhile.

    As many batches run at once as the encoder has streams, and one more waits. Results come in the
    order of submission, and when they come depends on nothing but the number of batches.
    """

    def __init__(self, encoder: Encoder, normalize: bool = True) -> None:
        self.calls = 0
        self._encoder = encoder
        self._normalize = normalize
        self._pool = ThreadPoolExecutor(encoder.streams, thread_name_prefix="encode")
        self._thread = threading.local()
        self._waiting: deque[Future[list[Encoded]]] = deque()

    def submit(self, pixels: Sequence[NDArray[np.uint8]]) -> Iterator[list[Encoded]]:
        """Takes a batch; yields the results of the oldest one once enough are in flight."""
        self.calls += 1
        self._waiting.append(self._pool.submit(self._encode, pixels))
        if len(self._waiting) > self._encoder.streams + 1:
            yield self._waiting.popleft().result()

    def _encode(self, pixels: Sequence[NDArray[np.uint8]]) -> list[Encoded]:
        # Each thread has one block for its batches: pages that were touched before cost half.
        block = getattr(self._thread, "block", None)
        if block is None:
            shape = (self._encoder.batch_size, *self._encoder.input_size, 3)
            block = self._thread.block = np.empty(shape, np.uint8)
        images = np.stack(pixels, out=block[: len(pixels)])
        return encode_batch(self._encoder, images, self._normalize)

    def finish(self) -> Iterator[list[Encoded]]:
        """Yields the results of all batches that are in flight."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def close(self) -> None:
        """Ends the threads; batches that have not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)


def encode_batch(encoder: Encoder, pixels: NDArray[np.uint8], normalize: bool = True) -> list[Encoded]:
    """Encodes uint8 [b, h, w, 3] to a float16 [dim] of unit length each, or what is wrong with it.

    Without `normalize` to the encoder's own float32 [dim], of which only numbers that are not finite
    are wrong: a zero vector has a length, if no direction. A batch that the engine refuses is halved
    until the images at fault are alone.

    Raises:
        KithError: the engine refuses whatever it is given.
    """
    try:
        raw = encoder.encode(pixels)
    except EncodingError as error:
        if len(pixels) > 1:
            middle = len(pixels) // 2
            halves = (pixels[:middle], pixels[middle:])
            return [one for half in halves for one in encode_batch(encoder, half, normalize)]
        _require_working(encoder, error)
        return [ImageError("encoding_failed", f"The encoder refuses the image: {error}")]
    if normalize:
        unit, valid = unit_float16(raw)
        return [
            vector if ok else _vector_problem(numbers)
            for vector, ok, numbers in zip(unit, valid, raw, strict=True)
        ]
    # A copy: an engine may use its output's memory again.
    vectors, finite = np.array(raw, dtype=np.float32), np.isfinite(raw).all(axis=1)
    return [
        vector if ok else _vector_problem(vector) for vector, ok in zip(vectors, finite, strict=True)
    ]


def _require_working(encoder: Encoder, error: EncodingError) -> None:
    """Raises KithError where the engine refuses a grey image too: then no image is at fault."""
    try:
        encoder.encode(np.full((1, *encoder.input_size, 3), 127, np.uint8))
    except EncodingError:
        raise KithError(
            f"The encoder fails whatever image it is given: {error}. Check the device and the model; "
            "finished parts are kept."
        ) from error


def _vector_problem(vector: NDArray[np.float32]) -> ImageError:
    if not np.isfinite(vector).all():
        return ImageError("non_finite", "The encoder returned numbers that are not finite.")
    return ImageError(
        "zero_vector", "The encoder returned a zero vector, which has no direction to compare."
    )
