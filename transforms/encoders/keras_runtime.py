"""TensorFlow and Keras, imported once, when first needed, and kept quiet.

Keras has one backend a process: TensorFlow, unless the engine that came first was JAX.

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


def require_backend(backend: str) -> None:
    """Sets Keras's backend where Keras is not imported yet.

    Raises:
        KithError: Keras already runs on another backend in this process.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    found = import_keras().backend.backend()
    if found != backend:
        raise KithError(
            f"Keras runs on the {found!r} backend in this process, but the encoder's engine needs "
            f"{backend!r}. Keras has one backend a process: run the other engine in a process of its "
            "own."
        )


@functools.cache
def import_keras() -> Any:
    """The `keras` module: channels last, float32, no progress bars.

    Its backend is TensorFlow unless `require_backend` set another before.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend == "tensorflow":
        import_tensorflow()
    import keras

    keras.config.disable_interactive_logging()
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    return keras


@contextlib.contextmanager
def compute_precision(precision: str) -> Iterator[None]:
    """Lets the layers that are built inside compute in a precision; their weights stay float32."""
    config = import_keras().config
    before = config.dtype_policy()
    config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    try:
        yield
    finally:
        config.set_dtype_policy(before)


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
