"""TensorFlow and Keras, imported once, when first needed, and kept quiet.

Everything that TensorFlow and Keras would print on standard output goes to standard error:
a worker pool's undrained output freezes it, and `--json` owns standard output.
"""

import contextlib
import functools
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from index_builder.errors import KithError


@functools.cache
def import_tensorflow() -> Any:
    """The `tensorflow` module; `TF_CPP_MIN_LOG_LEVEL` is 3 unless the environment says more."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow

    return tensorflow


@functools.cache
def import_keras() -> Any:
    """The `keras` module on its TensorFlow backend, channels last, float32, no progress bars.

    Raises:
        KithError: Keras already runs on another backend in this process.
    """
    import_tensorflow()
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import keras

    if keras.backend.backend() != "tensorflow":
        raise KithError(
            f"Keras runs on the {keras.backend.backend()!r} backend, but Kith's encoders need "
            "'tensorflow'. Unset KERAS_BACKEND, or set it to tensorflow."
        )
    keras.config.disable_interactive_logging()
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    return keras


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """Sends what Python code prints to standard error; for loading, not for hot paths."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Draws the weights of the layers built inside from `seed`, the same on every machine.

    What `keras.utils.set_random_seed(seed)` gives; the generators of Python and NumPy go on
    afterwards where they were.
    """
    keras = import_keras()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
