"""What may have been made from a damaged file is forgotten before the next attempt.

A task checks the checksum of the files that it owns and streams those of others, which other tasks
check. So a damaged file stops the run, but tasks that had read it before may have left finished parts.
"""

import contextlib
from collections.abc import Iterator

from index_builder.datasets import manifests, storage
from index_builder.errors import DatasetError


@contextlib.contextmanager
def suspecting(folder: str, key: str) -> Iterator[None]:
    """Notes in a dataset's work folder that a damaged file was met; `key` is its fingerprint."""
    try:
        yield
    except DatasetError:
        storage.write_bytes(_path(folder, key), b"")
        raise


def drop_suspects(folder: str, key: str) -> None:
    """Forgets what an earlier attempt finished that met a damaged file; called before the tasks."""
    if storage.exists(_path(folder, key)):
        storage.remove(storage.join(folder, manifests.WORK_FOLDER))


def _path(folder: str, key: str) -> str:
    return storage.join(folder, manifests.WORK_FOLDER, f"damaged-{key[:16]}")
