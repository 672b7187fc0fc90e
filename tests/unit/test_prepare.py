"""Decoding ahead on threads: order, a bounded look-ahead, failures in place, and an end."""

import hashlib
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.errors import ImageError
from tests.unit.images_for_tests import encode, picture
from transforms.failures import UNREADABLE_REGION, Failure
from transforms.prepare import PreparedImage, prepare_image, prepare_images
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord, UnreadableRegion

SMALL = Preprocessing((8, 12))
MAX_PIXELS = 10_000_000


def record(number: int, data: bytes | None = None) -> ImageRecord:
    data = encode(picture(20, 30, number), "PNG") if data is None else data
    return ImageRecord(f"id-{number}", "shard", number, data, f"item-{number}", {"n": number})


def rows_of(results: list[PreparedImage | Failure]) -> list[int | None]:
    return [r.row if isinstance(r, Failure) else r.record.row for r in results]


def decode_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


def test_one_image_is_decoded_resized_and_described() -> None:
    source = record(3)
    prepared = prepare_image(source, SMALL, MAX_PIXELS)
    assert isinstance(prepared, PreparedImage)
    np.testing.assert_array_equal(prepared.pixels, SMALL.apply(picture(20, 30, 3)))
    assert (prepared.width, prepared.height, prepared.format) == (30, 20, "png")
    assert prepared.content_sha256 == hashlib.sha256(source.data).digest()
    # The encoded bytes are not kept: thousands of images wait for their batch.
    assert prepared.record.data == b""
    assert (prepared.record.image_id, prepared.record.item_id) == ("id-3", "item-3")
    assert prepared.record.metadata == {"n": 3}


@pytest.mark.parametrize(
    ("source", "stage", "reason"),
    [
        (record(1, b""), "decode", "empty"),
        (record(1, encode(picture(), "PNG")[:200]), "decode", "truncated"),
        (
            ImageRecord("id-1", "shard", 1, error=ImageError("missing_image", "text")),
            "read",
            "missing_image",
        ),
    ],
)
def test_what_is_wrong_with_an_image_becomes_a_failure(
    source: ImageRecord, stage: str, reason: str
) -> None:
    failure = prepare_image(source, SMALL, MAX_PIXELS)
    assert isinstance(failure, Failure)
    assert (failure.image_id, failure.source_shard, failure.row) == ("id-1", "shard", 1)
    assert (failure.stage, failure.reason) == (stage, reason)
    assert failure.error


def test_an_image_with_too_many_pixels_is_a_failure() -> None:
    failure = prepare_image(record(1), SMALL, max_pixels=20 * 30 - 1)
    assert isinstance(failure, Failure)
    assert failure.reason == "too_large"
    assert isinstance(prepare_image(record(1), SMALL, max_pixels=20 * 30), PreparedImage)


@pytest.mark.parametrize(("threads", "look_ahead"), [(1, 1), (1, 5), (4, 1), (4, 3), (4, 100)])
def test_results_keep_the_order_of_the_stream(threads: int, look_ahead: int) -> None:
    # The first of each four takes by far the longest, so that threads finish out of order.
    big, small = encode(picture(600, 900), "PNG"), encode(picture(4, 4), "PNG")
    records = [record(i, small if i % 4 else big) for i in range(24)]
    results = list(prepare_images(records, SMALL, MAX_PIXELS, threads, look_ahead))
    assert rows_of(results) == list(range(24))
    for result, source in zip(results, records, strict=True):
        assert isinstance(result, PreparedImage)
        assert result.content_sha256 == hashlib.sha256(source.data).digest()


def test_no_images_give_no_results() -> None:
    assert list(prepare_images([], SMALL, MAX_PIXELS, 2, 4)) == []
    assert decode_threads() == 0


def test_failures_and_regions_stay_in_their_place() -> None:
    stream = [
        record(0),
        record(1, b"no image"),
        ImageRecord(None, "shard", 2, error=ImageError("corrupt_record", "The checksum differs.")),
        record(3),
        UnreadableRegion("shard", "The framing is lost at byte 99"),
    ]
    results = list(prepare_images(stream, SMALL, MAX_PIXELS, 2, 2))
    assert [isinstance(r, Failure) for r in results] == [False, True, True, False, True]
    assert rows_of(results) == [0, 1, 2, 3, None]
    assert results[2] == Failure(None, "shard", 2, "read", "corrupt_record", "The checksum differs.")
    assert results[4] == Failure(
        None, "shard", None, "read", UNREADABLE_REGION, "The framing is lost at byte 99"
    )


@pytest.mark.parametrize("look_ahead", [1, 3, 8])
def test_the_reader_runs_at_most_look_ahead_images_ahead(look_ahead: int) -> None:
    read = 0

    def reader() -> Iterator[ImageRecord]:
        nonlocal read
        for number in range(30):
            read += 1
            yield record(number)

    ahead = []
    for done, _ in enumerate(prepare_images(reader(), SMALL, MAX_PIXELS, 2, look_ahead)):
        ahead.append(read - done)
    assert max(ahead) == look_ahead
    assert read == len(ahead) == 30


def test_threads_decode_while_the_consumer_works() -> None:
    started = threading.Event()

    class Watched(bytes):
        """The bytes of the second image, which tell when they are looked at."""

        def __len__(self) -> int:
            started.set()
            return super().__len__()

        def __getitem__(self, key: object) -> object:
            started.set()
            return super().__getitem__(key)  # type: ignore[index]

    data = encode(picture(4, 4), "PNG")
    results = prepare_images([record(0, data), record(1, Watched(data))], SMALL, MAX_PIXELS, 1, 2)
    next(results)
    # The consumer holds the first result and asks for nothing more.
    assert started.wait(10)
    results.close()  # type: ignore[attr-defined]


def test_threads_end_when_the_consumer_stops_early() -> None:
    stopped = []

    def reader() -> Iterator[ImageRecord]:
        try:
            for number in range(1000):
                yield record(number)
        finally:
            stopped.append(number)

    stream = reader()
    results = prepare_images(stream, SMALL, MAX_PIXELS, 3, 10)
    for _ in range(3):
        next(results)
    assert decode_threads() > 0
    start = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert decode_threads() == 0
    assert time.monotonic() - start < 5
    stream.close()  # type: ignore[attr-defined]
    assert stopped == [12 - 1]


def test_images_that_wait_are_not_decoded_when_the_consumer_stops() -> None:
    decoded, gate = [], threading.Event()

    class Gated(Preprocessing):
        def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            decoded.append(pixels.shape)
            if len(decoded) > 1:
                assert gate.wait(10)
            return super().apply(pixels)

    records = [record(number) for number in range(40)]
    results = prepare_images(records, Gated((8, 8)), MAX_PIXELS, 1, 30)
    next(results)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    results.close()  # type: ignore[attr-defined]
    opener.join()
    # The one that was under way is finished; the others are given up.
    assert len(decoded) <= 2


def test_threads_end_when_the_reader_fails() -> None:
    def reader() -> Iterator[ImageRecord]:
        yield record(0)
        raise OSError("the disk is gone")

    results = prepare_images(reader(), SMALL, MAX_PIXELS, 2, 4)
    with pytest.raises(OSError, match="the disk is gone"):
        list(results)
    assert decode_threads() == 0


def test_a_defect_is_not_taken_for_a_bad_image() -> None:
    class Defective(Preprocessing):
        def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
            raise ZeroDivisionError("a defect of ours")

    with pytest.raises(ZeroDivisionError):
        list(prepare_images([record(0)], Defective((8, 8)), MAX_PIXELS, 1, 1))
    assert decode_threads() == 0
