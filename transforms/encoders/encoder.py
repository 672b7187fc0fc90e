"""A loaded encoder: batches of 8-bit images in, float32 vectors out, on the chosen engine."""

import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import KithError
from transforms.encoders.engines.engine import Engine, OutOfMemoryError

_LOGGER = logging.getLogger(__name__)


class Encoder:
    """One network, compiled for batches of a fixed size.

    `dim` is the length of a vector, `input_size` the (height, width) of the images it takes,
    `streams` the number of callers that may call `encode` at once and keep the hardware busy.
    """

    def __init__(
        self, compile_engine: Callable[[int], Engine], input_size: tuple[int, int], batch_size: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size} but must be at least 1.")
        self.input_size = input_size
        self.batch_size = batch_size
        self._compile_engine = compile_engine
        self._lock = threading.Lock()
        self._engine = self._first_that_fits(batch_size)
        self.dim = self._engine.dim
        self.streams = self._engine.streams

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encodes uint8 [b, h, w, 3] (RGB, b at most the batch size) to float32 [b, dim].

        The vectors are the network's own, neither normalised nor checked for NaN. A batch that does
        not fit into the device's memory is halved, now and for all that follow.

        Raises:
            ValueError: the images have another shape or type.
            EncodingError: the engine refuses them.
            KithError: not even one image fits into the device's memory.
        """
        height, width = self.input_size
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)} but the encoder takes uint8 "
                f"[b, {height}, {width}, 3]."
            )
        if len(images) > self.batch_size:
            raise ValueError(
                f"images holds {len(images)} images but the encoder was compiled for at most "
                f"{self.batch_size}."
            )
        while True:
            engine = self._engine
            try:
                return _run_in_batches(engine, images)
            except OutOfMemoryError as error:
                self._halve(engine, error)

    def _halve(self, engine: Engine, error: OutOfMemoryError) -> None:
        with self._lock:
            if self._engine is engine:  # else another thread has halved it
                _check_can_halve(engine.batch_size, error)
                self._engine = self._first_that_fits(engine.batch_size // 2)

    def _first_that_fits(self, batch_size: int) -> Engine:
        while True:
            try:
                return self._compile_engine(batch_size)
            except OutOfMemoryError as error:
                _check_can_halve(batch_size, error)
                batch_size //= 2


def _check_can_halve(batch_size: int, error: OutOfMemoryError) -> None:
    if batch_size == 1:
        raise KithError(
            "A batch of one image does not fit into the device's memory: "
            f"{error}. Free memory on the device, or set a smaller encoder or encoder.input_size."
        ) from error
    _LOGGER.warning(
        "A batch of %d images does not fit into the device's memory; going on with batches of %d. "
        "Set encoder.batch_size to that to save the attempt.",
        batch_size,
        batch_size // 2,
    )


def _run_in_batches(engine: Engine, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Runs full batches of the engine's size, the last one padded with black images."""
    size = engine.batch_size
    if len(images) == size:
        return engine.run(images)
    vectors = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        if len(batch) < size:
            padded = np.zeros((size, *images.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            vectors.append(engine.run(padded)[: len(batch)])
        else:
            vectors.append(engine.run(batch))
    return np.concatenate(vectors)
