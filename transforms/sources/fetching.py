"""Fetching files by URI: several at a time, in order, again where it may help."""

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from index_builder.datasets import storage
from index_builder.errors import ImageError

T = TypeVar("T")
R = TypeVar("R")

# Another attempt changes nothing: no such file, no right to it, no such protocol, a malformed URI.
_FINAL_ERRORS = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ValueError,
    ImportError,
)
_FINAL_NUMBERS = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})
# HTTP: the server may answer otherwise later (request timeout, too early, too many requests).
_PASSING_STATUS = frozenset({408, 425, 429})


def fetch_bytes(uri: str, attempts: int, backoff_sec: float) -> bytes:
    """Reads a file. Raises ImageError `unreadable_file`, or `fetch_failed` after the last attempt."""
    return try_again(lambda: storage.read_bytes(local_path(uri)), uri, attempts, backoff_sec)


def local_path(uri: str) -> str:
    """Returns the path of a `file://` URI; any other as it is."""
    return uri.removeprefix("file://") if uri.startswith("file:///") else uri


def try_again(action: Callable[[], R], uri: str, attempts: int, backoff_sec: float) -> R:
    """Returns what an action on a file returns, after up to `attempts`.

    The pause doubles from `backoff_sec`. Raises ImageError: `unreadable_file` at once where another
    attempt is useless, else `fetch_failed`.
    """
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff_sec * 2 ** (attempt - 1))
        try:
            return action()
        except Exception as error:  # fsspec's file systems raise what their HTTP clients do
            problem = error
            if _is_final(error):
                raise ImageError(
                    "unreadable_file", f"{uri} cannot be read: {_describe(error)}"
                ) from error
    raise ImageError(
        "fetch_failed", f"{uri} could not be fetched in {attempts} attempts: {_describe(problem)}"
    ) from problem


def _is_final(error: Exception) -> bool:
    if isinstance(error, _FINAL_ERRORS) or getattr(error, "errno", None) in _FINAL_NUMBERS:
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def map_in_order(
    action: Callable[[T], R], items: Iterable[T], threads: int, look_ahead: int
) -> Iterator[R]:
    """Yields action(item) in the order of the items, several at a time on threads.

    At most `look_ahead` results are there and not yet yielded, which bounds the memory.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(action, item))
                if len(waiting) >= look_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
