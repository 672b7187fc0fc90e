"""What an engine is: a network compiled for batches of one size."""

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import KithError
from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.family import Network

# More batches at once than this only take memory.
_MOST_STREAMS = 4


class EncodingError(Exception):
    """The engine refused a batch: one of its images, or the engine itself, is at fault."""


class OutOfMemoryError(EncodingError):
    """The batch does not fit into the device's memory."""


class UnsupportedModelError(KithError):
    """The engine cannot run this model; another one may."""


class Engine(Protocol):
    """A network from uint8 images to vectors, compiled for batches of `batch_size`.

    `dim` is the length of a vector. `streams` callers may call `run` at once, and so many keep the
    hardware busy.
    """

    batch_size: int
    dim: int
    streams: int

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Maps uint8 [batch_size, h, w, 3] to float32 [batch_size, dim].

        Raises EncodingError where the engine refuses the batch.
        """


# Loads the network (in the precision that it is called in) and compiles it for a batch size.
LoadEngine = Callable[[Callable[[], Network], str, int, EngineChoice], Engine]


def cpu_streams() -> int:
    """How many batches to run at once on the cores of this process."""
    return min(len(os.sched_getaffinity(0)), _MOST_STREAMS)
