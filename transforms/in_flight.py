"""Marks of the images that are being decoded, on disk, so that a crash tells which ones to suspect.

A decoder is C code, and hostile bytes can end the whole process. A marked image is one that was
being decoded at that moment. The marks are a memory-mapped file: setting one is a store into a page
that the operating system keeps when the process dies, so it needs no system call and no fsync.
"""

import contextlib
import fcntl
import mmap
import os
import re
from types import TracebackType

from index_builder.datasets import storage

_MARKS = ".marks"
_SUSPECTS = ".suspects.json"
_UNFINISHED = ".new"
_SLOT_BYTES = 8


class InFlightMarks:
    """One slot a decode thread, holding what the thread is decoding: ordinal + 1, or 0 when idle.

    An ordinal is an image's position in the stream of records of one task. `suspects` are the
    ordinals that were in flight when an earlier process of the same task died, and those which that
    process suspected already.

    Each process locks its own file, so that a backup worker on the same task neither takes a live
    worker's marks for a dead one's nor the other way round. As a context manager it lets go of the
    file and leaves it; only `finish` removes it.
    """

    def __init__(self, path: str, descriptor: int, threads: int, suspects: frozenset[int]) -> None:
        """Takes over a locked file; `open` is the way to get an instance."""
        self.suspects = suspects
        self._path = path
        self._descriptor = descriptor
        # Written, not only lengthened: a store into a hole of a full disk would end the process.
        size = threads * _SLOT_BYTES
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, bytes(size), 0)
        self._map = mmap.mmap(descriptor, size)
        self._slots = memoryview(self._map).cast("Q")

    @classmethod
    def open(cls, folder: str, name: str, threads: int) -> "InFlightMarks":
        """Opens the marks of a task in a local folder, with what dead processes left there.

        `name` must change with the content of the task's shard, as ordinals do.
        """
        dead, (path, descriptor) = _lock_own(folder, name)
        try:
            found = [_read(*locked) for locked in dead]
            suspects = frozenset[int]().union(*found)
            # Before the marks are wiped, so that a crash in between forgets nothing.
            if suspects:
                _write_suspects(path, suspects)
            marks = cls(path, descriptor, threads, suspects)
        except BaseException:
            for _, locked in dead or [(path, descriptor)]:
                os.close(locked)
            raise
        for other, locked in dead[1:]:
            _remove(other)
            os.close(locked)
        return marks

    @staticmethod
    def forget(folder: str, name: str) -> None:
        """Removes what dead processes left of a task that is finished, and the folder if empty."""
        with contextlib.suppress(FileNotFoundError):
            for path, descriptor in _lock_abandoned(folder, name):
                _remove(path)
                os.close(descriptor)
        _remove_if_empty(folder)

    def set(self, slot: int, ordinal: int) -> None:
        """Marks an image as being decoded by the thread of a slot."""
        self._slots[slot] = ordinal + 1

    def clear(self, slot: int) -> None:
        """Marks the thread of a slot as idle."""
        self._slots[slot] = 0

    def suspect(self, ordinal: int) -> None:
        """Suspects one more image, for the processes that may have to do the task again."""
        self.suspects |= {ordinal}
        _write_suspects(self._path, self.suspects)

    def finish(self) -> None:
        """Removes the files, and the folder if empty: nothing of the task will be tried again."""
        _remove(self._path)
        self.close()
        _remove_if_empty(os.path.dirname(self._path))

    def close(self) -> None:
        """Lets go of the file and leaves it on disk; closing twice is fine."""
        if self._descriptor < 0:
            return
        self._slots.release()
        self._map.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "InFlightMarks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _lock_own(folder: str, name: str) -> tuple[list[tuple[str, int]], tuple[str, int]]:
    """Locks what dead processes left of a task, and the file for this one: the first of those."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)
        # Another task that finishes may take the folder away as long as it is empty.
        with contextlib.suppress(FileNotFoundError):
            dead = _lock_abandoned(folder, name)
            return dead, dead[0] if dead else _lock_new(folder, name)


def _lock_abandoned(folder: str, name: str) -> list[tuple[str, int]]:
    """Locks the task's files that no living process holds: (path, descriptor), in order of number."""
    own = re.compile(re.escape(name) + r"\.\d+" + re.escape(_MARKS))
    locked = []
    for file in sorted(os.listdir(folder)):
        path = os.path.join(folder, file)
        if own.fullmatch(file) and (descriptor := _lock(path, os.O_RDWR)) is not None:
            locked.append((path, descriptor))
    return locked


def _lock_new(folder: str, name: str) -> tuple[str, int]:
    """Creates the file with the first number that no living process holds, and locks it.

    Raises FileNotFoundError when the folder is gone.
    """
    number = 0
    while True:
        path = os.path.join(folder, f"{name}.{number}{_MARKS}")
        descriptor = _lock(path, os.O_RDWR | os.O_CREAT)
        if descriptor is not None:
            return path, descriptor
        number += 1


def _lock(path: str, flags: int) -> int | None:
    """Returns a descriptor with an exclusive lock, or None where another process has one.

    None also where there is no file and none is to be made; FileNotFoundError for want of a folder.
    The lock belongs to the open file and goes with the process, however that ends.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed the file between the two calls.
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _read(path: str, descriptor: int) -> frozenset[int]:
    """The suspects that a dead process left: what it had in flight and what it suspected itself."""
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    slots = memoryview(data[: len(data) - len(data) % _SLOT_BYTES]).cast("Q")
    suspects = {slot - 1 for slot in slots if slot}
    with contextlib.suppress(FileNotFoundError):
        suspects.update(storage.read_json(_suspects_path(path)))
    return frozenset(suspects)


def _write_suspects(path: str, suspects: frozenset[int]) -> None:
    """Replaces the list of suspects; the lock is held, so one temporary name will do."""
    temporary = _suspects_path(path) + _UNFINISHED
    with open(temporary, "wb") as file:
        file.write(storage.encode_json(sorted(suspects)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, _suspects_path(path))


def _remove(path: str) -> None:
    """Removes the files of one process; its lock must be held."""
    suspects = _suspects_path(path)
    for stale in (suspects + _UNFINISHED, suspects, path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(stale)


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):  # Gone already, or other tasks have files there.
        os.rmdir(folder)


def _suspects_path(path: str) -> str:
    return path.removesuffix(_MARKS) + _SUSPECTS
