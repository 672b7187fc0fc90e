"""Decoding and preprocessing ahead of the encoder, on threads, in order.

A decoder that hangs or ends the process costs its image only. What a dead process had in flight, and
what a thread does not come back from, is tried again in a process of its own, whose verdict counts.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable

import numpy as np
from numpy.typing import NDArray

from index_builder.errors import ImageError
from transforms.decode_alone import decode_alone
from transforms.decoding import DecodedImage, DecodePolicy, decode_image
from transforms.failures import UNREADABLE_REGION, Failure
from transforms.in_flight import InFlightMarks
from transforms.pixel_budget import AT_ONCE_PIXELS, FREE_PIXELS, PIXELS
from transforms.pixel_rules import TooManyPixels
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord, UnreadableRegion

# The lowest priority there is, for decoding: a core that changes between a decoder and the encoder
# within a batch loses its caches (measured: 0.90 of the two in series without, 0.95 with it).
DECODE_NICENESS = 19
# How long a closing pool waits for images that are being decoded, before it leaves its threads.
CLOSE_SEC = 5.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Everything that decides which pixels the encoder sees of an image."""

    policy: DecodePolicy
    preprocessing: Preprocessing


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image ready for the encoder: pixels uint8 [height, width, 3], and what is kept of it.

    `width` and `height` are those of the upright image, before any resizing; `record` has lost its
    data.
    """

    record: ImageRecord
    pixels: NDArray[np.uint8]
    content_sha256: bytes
    width: int
    height: int
    format: str


@dataclasses.dataclass(frozen=True, eq=False)
class KnownImage:
    """One image whose vector is known from its bytes alone; nothing was decoded."""

    record: ImageRecord
    content_sha256: bytes


Prepared = PreparedImage | KnownImage | Failure


def never(digest: bytes) -> bool:
    """Knows no image; the default of `known`."""
    return False


def prepare_image(
    record: ImageRecord,
    preparation: Preparation,
    known: Callable[[bytes], bool] = never,
    make_room: Callable[[int], None] | None = None,
) -> Prepared:
    """Decodes and resizes one image; whatever is wrong with it becomes a Failure.

    `known` tells by the SHA-256 of the encoded bytes whether decoding can be spared. `make_room` is
    called with the number of pixels before a large image is decoded, and may wait.
    """
    if record.error is not None:
        return failure_of(record, "read", record.error)
    data = record.data
    digest = hashlib.sha256(data).digest()
    if known(digest):
        return KnownImage(dataclasses.replace(record, data=b""), digest)
    preprocessing = preparation.preprocessing
    try:
        image = _decode_with_room(data, preparation, make_room)
    except ImageError as error:
        return failure_of(record, "decode", error)
    pixels = preprocessing.apply(image.pixels, (image.width, image.height))
    # The encoded bytes are not kept: many images wait for their batch.
    kept = dataclasses.replace(record, data=b"")
    return PreparedImage(kept, pixels, digest, image.width, image.height, image.format)


def _decode_with_room(
    data: bytes, preparation: Preparation, make_room: Callable[[int], None] | None
) -> DecodedImage:
    policy, needed = preparation.policy, preparation.preprocessing.needed_size
    if make_room is not None:
        try:
            return decode_image(data, policy, needed, FREE_PIXELS)
        except TooManyPixels as error:
            pixels = error.pixels
        if pixels <= policy.max_pixels:
            make_room(pixels)
    return decode_image(data, policy, needed)


def prepare_image_alone(
    record: ImageRecord,
    preparation: Preparation,
    known: Callable[[bytes], bool] = never,
    timeout_sec: float = 120.0,
) -> Prepared:
    """Does what `prepare_image` does, but decodes in a process that may crash or be killed.

    Raises KithError when that process fails by something else than the image.
    """
    if record.error is not None:
        return failure_of(record, "read", record.error)
    digest = hashlib.sha256(record.data).digest()
    kept = dataclasses.replace(record, data=b"")
    if known(digest):
        return KnownImage(kept, digest)
    try:
        image = decode_alone(record.data, preparation.policy, preparation.preprocessing, timeout_sec)
    except ImageError as error:
        return failure_of(record, "decode", error)
    return PreparedImage(kept, image.pixels, digest, image.width, image.height, image.format)


def failure_of(record: ImageRecord, stage: str, error: ImageError) -> Failure:
    """Returns the row for an image that a stage could not handle."""
    return Failure(record.image_id, record.source_shard, record.row, stage, error.reason, error.message)


def prepare_images(
    records: Iterable[ImageRecord | UnreadableRegion],
    preparation: Preparation,
    threads: int,
    look_ahead: int,
    *,
    known: Callable[[bytes], bool] = never,
    marks: InFlightMarks | None = None,
    timeout_sec: float = 120.0,
) -> Generator[Prepared, None, None]:
    """Prepares a stream of images on threads and yields the results in the order of the stream.

    At most `look_ahead` images are read and not yet yielded, which bounds the memory. The threads
    go on while the caller works on what it got, so decoding overlaps with encoding. `known` is
    called on them. Large images take turns, so that no more than AT_ONCE_PIXELS of them are decoded
    at once, or one that has more.

    `marks` must have a slot for each thread, and the stream must be the one that they were made
    for. An image that they suspect, or that a thread decodes for longer than `timeout_sec`, is
    decoded in a process of its own.
    """
    suspects = frozenset[int]() if marks is None else marks.suspects
    waiting: deque[_Task | ImageRecord | Failure] = deque()
    pool = _DecodePool(preparation, known, threads, marks, timeout_sec)

    def result(item: _Task | ImageRecord | Failure) -> Prepared:
        if isinstance(item, _Task):
            return pool.result(item)
        if isinstance(item, Failure):
            return item
        return prepare_image_alone(item, preparation, known, timeout_sec)

    try:
        for ordinal, record in enumerate(records):
            if isinstance(record, UnreadableRegion):
                waiting.append(_region(record))
            elif ordinal in suspects:
                waiting.append(record)
            else:
                waiting.append(pool.submit(ordinal, record))
            if len(waiting) >= look_ahead:
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())
    finally:
        pool.close()


def _region(region: UnreadableRegion) -> Failure:
    where = region.source_shard
    return Failure(None, where, None, "read", UNREADABLE_REGION, region.error, region.offset)


class _Task:
    """One image on its way through the pool; `done` is a lock that is let go when it is finished."""

    __slots__ = ("done", "error", "ordinal", "record", "result", "started", "worker")

    def __init__(self, ordinal: int, record: ImageRecord) -> None:
        self.ordinal = ordinal
        self.record: ImageRecord | None = record
        self.result: Prepared | None = None
        self.error: BaseException | None = None
        self.started = 0.0
        self.worker: _DecodeThread | None = None
        self.done = threading.Lock()
        self.done.acquire()


class _DecodePool:
    """Threads that prepare images in the order of submission.

    Not an executor: that one waits for a stuck thread when the interpreter ends, and cannot replace
    it. Futures would also cost three times as much as these tasks, for every image.
    """

    def __init__(
        self,
        preparation: Preparation,
        known: Callable[[bytes], bool],
        threads: int,
        marks: InFlightMarks | None,
        timeout_sec: float,
    ) -> None:
        self._preparation = preparation
        self._known = known
        self._marks = marks
        self._timeout_sec = timeout_sec
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads = [self._start(slot) for slot in range(threads)]

    def _start(self, slot: int) -> "_DecodeThread":
        thread = _DecodeThread(
            self._tasks, self._preparation, self._known, self._marks, slot, self._timeout_sec
        )
        thread.start()
        return thread

    def submit(self, ordinal: int, record: ImageRecord) -> _Task:
        """Puts an image in line."""
        task = _Task(ordinal, record)
        self._tasks.put(task)
        return task

    def result(self, task: _Task) -> Prepared:
        """Waits for the oldest task that is left; tries its image alone when its thread is stuck."""
        wait = self._timeout_sec
        while not task.done.acquire(timeout=wait):
            worker = task.worker
            # With all earlier tasks done or given up, some thread is about to begin this one, or
            # waits for room to decode it.
            if worker is None:
                wait = self._timeout_sec
                continue
            wait = task.started + self._timeout_sec - time.monotonic()
            if wait <= 0:
                record = worker.give_up(task)
                if record is not None:
                    self._threads[worker.slot] = self._start(worker.slot)
                    if self._marks is not None:
                        self._marks.suspect(task.ordinal)
                    return self._alone(record)
                wait = self._timeout_sec
        if task.error is not None:
            raise task.error
        assert task.result is not None
        return task.result

    def _alone(self, record: ImageRecord) -> Prepared:
        _log.warning(
            "A decode thread did not come back from row %d of %s in %g seconds. It is left behind, "
            "and the image is tried in a process of its own.",
            record.row, record.source_shard, self._timeout_sec,
        )  # fmt: skip
        return prepare_image_alone(record, self._preparation, timeout_sec=self._timeout_sec)

    def close(self) -> None:
        """Gives up what waits and ends the threads; one that is stuck is left behind."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + CLOSE_SEC
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                thread.leave()


def _let_the_encoder_go_first() -> None:
    """Lowers the priority of the calling thread; only on Linux do threads have one of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), DECODE_NICENESS)


class _DecodeThread(threading.Thread):
    """One thread and its slot of the marks. A daemon, so that it never keeps a process from ending."""

    def __init__(
        self,
        tasks: "queue.SimpleQueue[_Task | None]",
        preparation: Preparation,
        known: Callable[[bytes], bool],
        marks: InFlightMarks | None,
        slot: int,
        timeout_sec: float,
    ) -> None:
        super().__init__(name=f"decode-{slot}", daemon=True)
        self.slot = slot
        self._tasks = tasks
        self._preparation = preparation
        self._known = known
        self._marks = marks
        self._timeout_sec = timeout_sec
        # Held for every change of the marks, so that a thread left behind never touches a slot that
        # is another's by then, or a file that is closed.
        self._lock = threading.Lock()
        self._left = threading.Event()

    def run(self) -> None:
        """Prepares one image after another until told to end, or left behind."""
        _let_the_encoder_go_first()
        tasks, preparation, known, marks = self._tasks, self._preparation, self._known, self._marks
        lock, slot = self._lock, self.slot
        while (task := tasks.get()) is not None:
            record = task.record
            assert record is not None
            with lock:
                if self._left.is_set():
                    return
                if marks is not None:
                    marks.set(slot, task.ordinal)
            task.started = time.monotonic()
            task.worker = self
            try:
                task.result = prepare_image(
                    record, preparation, known, functools.partial(self._make_room, task)
                )
            except BaseException as error:  # Whatever it is, the consumer raises it.
                task.error = error
            PIXELS.give_back(self)
            with lock:
                if self._left.is_set():
                    return
                if marks is not None:
                    marks.clear(slot)
                task.record = None
                task.done.release()

    def _make_room(self, task: _Task, pixels: int) -> None:
        """Waits for other large images; that time is none of the decoder's."""
        task.worker = None
        most = max(self._preparation.policy.max_pixels, AT_ONCE_PIXELS)
        PIXELS.take(self, pixels, most, self._timeout_sec)
        task.started = time.monotonic()
        task.worker = self

    def give_up(self, task: _Task) -> ImageRecord | None:
        """Leaves the thread behind with its task and returns the record; None if it just finished."""
        with self._lock:
            if task.record is None:
                return None
            self._leave()
            return task.record

    def leave(self) -> None:
        """Tells the thread, which may never notice, to end without another word."""
        with self._lock:
            self._leave()

    def _leave(self) -> None:
        self._left.set()
        PIXELS.give_back(self)
        self.name = f"left behind, {self.name}"
