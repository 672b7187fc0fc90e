"""Files on a local disk or in a bucket, through fsspec, with writes that appear whole or not at all.

A path is a string: a local path or a `gs://` URL. Locally a file is written under a temporary name in
its own folder, synced and renamed. In a bucket it is written to a local temporary file and uploaded
once to its final name, because a rename there is a copy and a delete.
"""

import contextlib
import errno
import hashlib
import json
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from index_builder.errors import KithError

TEMPORARY_PREFIX = ".writing-"
_TOKEN_THREADS = 16


def is_remote(path: str) -> bool:
    """Tells whether a path names an object in a bucket rather than a local file."""
    return "://" in path


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a path and the path as that file system spells it.

    An emulator named by `STORAGE_EMULATOR_HOST` is spoken to without credentials.
    """
    options: dict[str, Any] = {}
    if path.startswith(("gs://", "gcs://")) and os.environ.get("STORAGE_EMULATOR_HOST"):
        options = {"token": "anon", "endpoint_url": os.environ["STORAGE_EMULATOR_HOST"]}
    fs, name = fsspec.core.url_to_fs(path, **options)
    return fs, name


def join(base: str, *names: str) -> str:
    """Joins path components, for both kinds of path; a component with `..` is folded."""
    if not is_remote(base):
        return os.path.normpath(os.path.join(base, *names))
    scheme, rest = base.split("://", 1)
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, *names))}"


def exists(path: str) -> bool:
    """Tells whether a file (or a local folder) is there."""
    fs, name = filesystem(path)
    return bool(fs.exists(name))


def size(path: str) -> int:
    """Returns the bytes of a file, or -1 where there is none."""
    fs, name = filesystem(path)
    try:
        return int(fs.size(name))
    except FileNotFoundError:
        return -1


def glob(pattern: str) -> list[str]:
    """Returns the files that match a glob, sorted, in the same spelling as the pattern.

    Temporary files of unfinished writes are left out.
    """
    fs, name = filesystem(pattern)
    scheme = pattern.split("://", 1)[0] + "://" if is_remote(pattern) else ""
    fs.invalidate_cache()
    found = fs.glob(name, detail=True)
    files = [scheme + path for path, info in found.items() if _is_file(path, info)]
    return sorted(path for path in files if not _is_temporary(path))


def _is_file(path: str, info: dict[str, Any]) -> bool:
    """Tells files, and links to files, from folders."""
    return info["type"] == "file" or (bool(info.get("islink")) and os.path.isfile(path))


def _is_temporary(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX)


def read_bytes(path: str) -> bytes:
    """Reads a whole file. Raises FileNotFoundError."""
    fs, name = filesystem(path)
    return bytes(fs.cat_file(name))


def read_json(path: str) -> Any:
    """Reads a JSON file. Raises FileNotFoundError, or KithError where it is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise KithError(
            f"{path} is not valid JSON ({error}). Delete it and run the stage again."
        ) from error


def open_binary(path: str) -> Any:
    """Opens a file for reading, as a seekable binary file. Raises FileNotFoundError."""
    if not is_remote(path):
        return open(path, "rb")
    fs, name = filesystem(path)
    return fs.open(name, "rb")


def open_arrow(path: str) -> Any:
    """Opens a file for the readers of pyarrow. Raises FileNotFoundError.

    A local one is Arrow's own: its threads let go of a Python file some time after they have read it,
    and where the process ends just then it aborts ("terminate called without an active exception").
    """
    return open_binary(path) if is_remote(path) else pa.OSFile(path)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yields a local path with the content of a file: the file itself, or a temporary download."""
    if not is_remote(path):
        yield path
        return
    fs, name = filesystem(path)
    with tempfile.TemporaryDirectory(prefix="kith-") as folder:
        local = os.path.join(folder, posixpath.basename(name))
        fs.get_file(name, local)
        yield local


@contextlib.contextmanager
def scratch_folder(parent: str) -> Iterator[str]:
    """Yields a new local folder that is removed at the end: in `parent`, where that is local.

    A killed process leaves it there, to be removed with the `parent`, not in the system's folder.
    What was missing of `parent` is made, and removed at the end where it is still empty.
    """
    missing: list[Path] = []
    inside = None if is_remote(parent) else parent
    if inside is not None:
        missing = [path for path in (Path(inside), *Path(inside).parents) if not path.exists()]
        os.makedirs(inside, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="kith-", dir=inside) as folder:
            yield folder
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def unnamed_file(folder: str | None) -> Iterator[str]:
    """Yields a path to a new file that has no name and goes with this process, however that ends.

    Its disk is that of a local `folder`, or of the system's folder of temporary files.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        yield f"/proc/self/fd/{file.fileno()}"


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yields a local temporary path; what is written there becomes `path` when the block ends well.

    The temporary name carries the process id and a nonce, so that a retried or backup task never
    writes into another one's file. Raises KithError when the disk is full.
    """
    remote = is_remote(path)
    folder = tempfile.gettempdir() if remote else os.path.dirname(os.path.abspath(path))
    temporary = ""
    try:
        if not remote:
            os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-", suffix=posixpath.basename(path), dir=folder
        )
        os.close(handle)
        yield temporary
        if remote:
            fs, name = filesystem(path)
            fs.put_file(temporary, name)
        else:
            _sync(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # FAISS reports a failed write as a RuntimeError with the text of errno.
        full = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):
            raise KithError(
                f"No space left on the device while writing {path} (temporary file in {folder}). "
                "Free some space or set workspace to a larger disk, then run again: finished "
                "parts are kept."
            ) from error
        raise
    finally:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def encode_json(value: Any) -> bytes:
    """Returns the canonical bytes of a JSON document: sorted keys, two spaces, one final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: str, value: Any) -> None:
    """Writes a JSON document atomically, with the same bytes for equal values."""
    write_bytes(path, encode_json(value))


def swap_json(path: str, value: Any) -> None:
    """Replaces a small JSON document in one step, for pointers that others read at any time.

    In a bucket the swap is conditional on the generation that was seen, so of two runs that publish
    at the same moment one fails instead of being overwritten unnoticed; it raises KithError.
    """
    if not is_remote(path):
        write_json(path, value)
        return
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud import storage

    bucket_name, _, blob_name = path.split("://", 1)[1].partition("/")
    emulated = bool(os.environ.get("STORAGE_EMULATOR_HOST"))
    client = storage.Client.create_anonymous_client() if emulated else storage.Client()
    bucket = client.bucket(bucket_name)
    current = bucket.get_blob(blob_name)
    try:
        bucket.blob(blob_name).upload_from_string(
            encode_json(value),
            content_type="application/json",
            if_generation_match=0 if current is None else current.generation,
        )
    except PreconditionFailed as error:
        raise KithError(
            f"{path} was changed by another run while this one published. Nothing was overwritten. "
            "Run again when the other run has ended."
        ) from error


def remove(path: str) -> None:
    """Deletes a file or a folder with its content; a missing one is fine."""
    fs, name = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(name, recursive=True)


def sweep_temporary(folder: str) -> None:
    """Deletes what killed writers left behind in a local folder (a bucket holds no such files)."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY_PREFIX):
            os.unlink(os.path.join(folder, name))


def sha256_of(path: str) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal, reading it in pieces."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_tokens(paths: Sequence[str]) -> list[str]:
    """Returns the content token of each file, looking at several at once."""
    with ThreadPoolExecutor(_TOKEN_THREADS) as pool:
        return list(pool.map(content_token, paths))


def content_token(path: str) -> str:
    """Returns a short text that changes when a file's content does.

    It is the MD5 of the content: computed here for a local file, taken from the object's metadata
    in a bucket, so equal content has an equal token in both places and no object is read for it.
    A composite object has no MD5; its CRC32C and size serve instead.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        return "md5:" + digest.hexdigest()
    fs, name = filesystem(path)
    info = fs.info(name)
    if info.get("md5Hash"):
        import base64

        return "md5:" + base64.b64decode(info["md5Hash"]).hex()
    if info.get("crc32c"):
        return f"crc32c:{info['crc32c']}:{info['size']}"
    return "sha256:" + sha256_of(path)
