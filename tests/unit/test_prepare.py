"""Decoding ahead on threads: order, a bounded look-ahead, failures in place, faults, and an end."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index_builder.errors import ImageError
from tests.faulty_decoder import write_faults
from tests.unit.images_for_tests import encode, picture
from tests.unit.prepare_in_a_process import IMAGES
from transforms import prepare
from transforms.decoding import DecodedImage, DecodePolicy
from transforms.failures import UNREADABLE_REGION, Failure
from transforms.in_flight import InFlightMarks
from transforms.prepare import KnownImage, Preparation, PreparedImage, prepare_image, prepare_images
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord, UnreadableRegion

ROOT = Path(__file__).parents[2]
RESIZE = Preprocessing((8, 12))
SMALL = Preparation(DecodePolicy(), RESIZE)


def record(number: int, data: bytes | None = None) -> ImageRecord:
    data = encode(picture(20, 30, number), "PNG") if data is None else data
    return ImageRecord(f"id-{number}", "shard", number, data, f"item-{number}", {"n": number})


def rows_of(results: list[prepare.Prepared]) -> list[int | None]:
    return [r.row if isinstance(r, Failure) else r.record.row for r in results]


def decode_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


def test_one_image_is_decoded_resized_and_described() -> None:
    source = record(3)
    prepared = prepare_image(source, SMALL)
    assert isinstance(prepared, PreparedImage)
    np.testing.assert_array_equal(prepared.pixels, RESIZE.apply(picture(20, 30, 3)))
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
    failure = prepare_image(source, SMALL)
    assert isinstance(failure, Failure)
    assert (failure.image_id, failure.source_shard, failure.row) == ("id-1", "shard", 1)
    assert (failure.stage, failure.reason) == (stage, reason)
    assert failure.error


def test_an_image_with_too_many_pixels_is_a_failure() -> None:
    failure = prepare_image(record(1), Preparation(DecodePolicy(20 * 30 - 1), RESIZE))
    assert isinstance(failure, Failure)
    assert failure.reason == "too_large"
    assert isinstance(
        prepare_image(record(1), Preparation(DecodePolicy(20 * 30), RESIZE)), PreparedImage
    )


@pytest.mark.parametrize(("threads", "look_ahead"), [(1, 1), (1, 5), (4, 1), (4, 3), (4, 100)])
def test_results_keep_the_order_of_the_stream(threads: int, look_ahead: int) -> None:
    # The first of each four takes by far the longest, so that threads finish out of order.
    big, small = encode(picture(600, 900), "PNG"), encode(picture(4, 4), "PNG")
    records = [record(i, small if i % 4 else big) for i in range(24)]
    results = list(prepare_images(records, SMALL, threads, look_ahead))
    assert rows_of(results) == list(range(24))
    for result, source in zip(results, records, strict=True):
        assert isinstance(result, PreparedImage)
        assert result.content_sha256 == hashlib.sha256(source.data).digest()


def test_no_images_give_no_results() -> None:
    assert list(prepare_images([], SMALL, 2, 4)) == []
    assert decode_threads() == 0


def test_failures_and_regions_stay_in_their_place() -> None:
    stream = [
        record(0),
        record(1, b"no image"),
        ImageRecord(None, "shard", 2, error=ImageError("corrupt_record", "The checksum differs.")),
        record(3),
        UnreadableRegion("shard", "The framing is lost at byte 99"),
    ]
    results = list(prepare_images(stream, SMALL, 2, 2))
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
    for done, _ in enumerate(prepare_images(reader(), SMALL, 2, look_ahead)):
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
    results = prepare_images([record(0, data), record(1, Watched(data))], SMALL, 1, 2)
    next(results)
    # The consumer holds the first result and asks for nothing more.
    assert started.wait(10)
    results.close()


def test_threads_end_when_the_consumer_stops_early() -> None:
    stopped = []

    def reader() -> Iterator[ImageRecord]:
        try:
            for number in range(1000):
                yield record(number)
        finally:
            stopped.append(number)

    stream = reader()
    results = prepare_images(stream, SMALL, 3, 10)
    for _ in range(3):
        next(results)
    assert decode_threads() > 0
    start = time.monotonic()
    results.close()
    assert decode_threads() == 0
    assert time.monotonic() - start < 5
    stream.close()  # type: ignore[attr-defined]
    assert stopped == [12 - 1]


def test_images_that_wait_are_not_decoded_when_the_consumer_stops() -> None:
    decoded, gate = [], threading.Event()

    class Gated(Preprocessing):
        def apply(
            self, pixels: NDArray[np.uint8], full_size: tuple[int, int] | None = None
        ) -> NDArray[np.uint8]:
            decoded.append(pixels.shape)
            if len(decoded) > 1:
                assert gate.wait(10)
            return super().apply(pixels, full_size)

    records = [record(number) for number in range(40)]
    results = prepare_images(records, Preparation(DecodePolicy(), Gated((8, 8))), 1, 30)
    next(results)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    results.close()
    opener.join()
    # The one that was under way is finished; the others are given up.
    assert len(decoded) <= 2


def test_threads_end_when_the_reader_fails() -> None:
    def reader() -> Iterator[ImageRecord]:
        yield record(0)
        raise OSError("the disk is gone")

    results = prepare_images(reader(), SMALL, 2, 4)
    with pytest.raises(OSError, match="the disk is gone"):
        list(results)
    assert decode_threads() == 0


def test_a_defect_is_not_taken_for_a_bad_image() -> None:
    class Defective(Preprocessing):
        def apply(
            self, pixels: NDArray[np.uint8], full_size: tuple[int, int] | None = None
        ) -> NDArray[np.uint8]:
            raise ZeroDivisionError("a defect of ours")

    with pytest.raises(ZeroDivisionError):
        list(prepare_images([record(0)], Preparation(DecodePolicy(), Defective((8, 8))), 1, 1))
    assert decode_threads() == 0


def test_a_known_image_is_not_decoded() -> None:
    broken = record(1, b"no image")
    digests = [hashlib.sha256(record(n).data).digest() for n in (0, 2)]
    digests.append(hashlib.sha256(broken.data).digest())
    stream = [record(0), broken, record(2), record(3), ImageRecord("id-4", "shard", 4, b"no image")]
    results = list(prepare_images(stream, SMALL, 2, 3, known=digests.__contains__))
    assert [type(result) for result in results] == [
        KnownImage, KnownImage, KnownImage, PreparedImage, KnownImage,
    ]  # fmt: skip
    assert rows_of(results) == list(range(5))
    for result, source in zip(results, stream, strict=True):
        assert not isinstance(result, Failure)
        assert result.content_sha256 == hashlib.sha256(source.data).digest()
        assert result.record.data == b""
        assert result.record.image_id == source.image_id


def test_an_image_without_bytes_is_never_known() -> None:
    failed = ImageRecord("id-1", "shard", 1, error=ImageError("missing_image", "text"))
    failure = prepare_image(failed, SMALL, known=lambda digest: True)
    assert isinstance(failure, Failure)
    assert failure.reason == "missing_image"


def in_flight(folder: Path) -> list[int]:
    """The marks on disk: ordinals by slot, -1 for an idle one."""
    (file,) = folder.glob("*.marks")
    return [int(slot) - 1 for slot in np.frombuffer(file.read_bytes(), np.uint64)]


def open_marks(folder: Path, threads: int) -> InFlightMarks:
    return InFlightMarks.open(str(folder), "part-0", threads)


def leave_in_flight(folder: Path, *ordinals: int) -> None:
    """Leaves the marks of a process that died with these images in flight."""
    with open_marks(folder, len(ordinals)) as marks:
        for slot, ordinal in enumerate(ordinals):
            marks.set(slot, ordinal)


Put = Callable[[Callable[[bytes], None]], None]


@pytest.fixture
def put_before_decoding(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts a function in front of the decoder of this process; other processes have their own."""
    decode = prepare.decode_image

    def put(before: Callable[[bytes], None]) -> None:
        def changed(data: bytes, *arguments: object) -> DecodedImage:
            before(data)
            return decode(data, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(prepare, "decode_image", changed)

    return put


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own elsewhere")
def test_decoding_lets_the_encoder_go_first(put_before_decoding: Put) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, seen = niceness(), set[int]()
    put_before_decoding(lambda data: seen.add(niceness()))
    assert len(list(prepare_images([record(n) for n in range(4)], SMALL, 2, 4))) == 4
    assert seen == {prepare.DECODE_NICENESS}
    # Only the decode threads: what the caller runs, the encoder among it, keeps its priority.
    assert niceness() == before < prepare.DECODE_NICENESS


def test_an_image_is_marked_while_it_is_decoded(tmp_path: Path, put_before_decoding: Put) -> None:
    seen: list[list[int]] = []
    put_before_decoding(lambda data: seen.append(in_flight(tmp_path)))
    # A region has a place in the stream, too: ordinals count everything that was read.
    stream = [record(0), UnreadableRegion("shard", "text"), record(1), record(2, b"no image")]
    with open_marks(tmp_path, 1) as marks:
        assert len(list(prepare_images(stream, SMALL, 1, 2, marks=marks))) == 4
    assert seen == [[0], [2], [3]]
    assert in_flight(tmp_path) == [-1]


def test_suspects_are_decoded_on_no_thread(tmp_path: Path, put_before_decoding: Put) -> None:
    leave_in_flight(tmp_path, 1, 3, 4, 5)
    decoded: list[bytes] = []
    put_before_decoding(decoded.append)
    failed = ImageRecord("id-5", "shard", 5, error=ImageError("missing_image", "text"))
    stream = [record(0), record(1), record(2), record(3, b"no image"), record(4), failed]
    digest = hashlib.sha256(record(4).data).digest()
    with open_marks(tmp_path, 2) as marks:
        results = list(
            prepare_images(stream, SMALL, 2, 3, marks=marks, known=lambda found: found == digest)
        )
    assert sorted(decoded) == sorted([record(0).data, record(2).data])
    kinds = [PreparedImage, PreparedImage, PreparedImage, Failure, KnownImage, Failure]
    assert [type(result) for result in results] == kinds
    assert rows_of(results) == list(range(6))
    suspect, unreadable, missing = results[1], results[3], results[5]
    assert isinstance(suspect, PreparedImage)
    np.testing.assert_array_equal(suspect.pixels, RESIZE.apply(picture(20, 30, 1)))
    assert suspect.record.data == b""
    assert suspect.record.metadata == {"n": 1}
    assert isinstance(unreadable, Failure)
    assert (unreadable.stage, unreadable.reason) == ("decode", "unsupported_format")
    assert isinstance(missing, Failure)
    assert (missing.stage, missing.reason) == ("read", "missing_image")


def test_suspects_count_in_the_look_ahead(tmp_path: Path) -> None:
    leave_in_flight(tmp_path, 1)
    read = 0

    def reader() -> Iterator[ImageRecord]:
        nonlocal read
        for number in range(12):
            read += 1
            yield record(number)

    with open_marks(tmp_path, 2) as marks:
        results = prepare_images(reader(), SMALL, 2, 4, marks=marks)
        assert max(read - done for done, _ in enumerate(results)) == 4


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a stuck decoder waits for; opened at the end, so that its thread ends."""
    event = threading.Event()
    yield event
    event.set()


def stuck_on(data: bytes, gate: threading.Event) -> Callable[[bytes], None]:
    def before(found: bytes) -> None:
        if found == data:
            assert gate.wait(60)

    return before


def test_an_image_whose_thread_is_stuck_is_tried_alone(
    tmp_path: Path, put_before_decoding: Put, gate: threading.Event
) -> None:
    put_before_decoding(stuck_on(record(1).data, gate))
    records = [record(number) for number in range(9)]
    with open_marks(tmp_path, 1) as marks:
        # The only thread is stuck: a fresh one does the rest.
        results = list(prepare_images(records, SMALL, 1, 4, marks=marks, timeout_sec=1))
        assert marks.suspects == {1}
    assert rows_of(results) == list(range(9))
    for number, result in enumerate(results):
        assert isinstance(result, PreparedImage)
        np.testing.assert_array_equal(result.pixels, RESIZE.apply(picture(20, 30, number)))
    assert decode_threads() == 0


def test_the_time_of_an_image_starts_with_its_decoding(put_before_decoding: Put) -> None:
    # Each waits for the ones before it, longer than one of them may take.
    put_before_decoding(lambda data: time.sleep(0.5))
    alone = threading.Event()
    records = [record(number) for number in range(6)]
    results = prepare_images(records, SMALL, 1, 6, timeout_sec=2.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "decode_alone", lambda *arguments: alone.set())
        assert rows_of(list(results)) == list(range(6))
    assert not alone.is_set()


def test_a_thread_left_behind_leaves_its_slot_alone(
    tmp_path: Path, put_before_decoding: Put, gate: threading.Event
) -> None:
    looking, looked = threading.Event(), threading.Event()

    def before(data: bytes) -> None:
        stuck_on(record(0).data, gate)(data)
        if data == record(2).data:
            looking.set()
            assert looked.wait(60)

    put_before_decoding(before)
    with open_marks(tmp_path, 1) as marks:
        results = prepare_images([record(n) for n in range(3)], SMALL, 1, 3, marks=marks, timeout_sec=1)
        assert rows_of([next(results), next(results)]) == [0, 1]
        assert looking.wait(30)
        (stuck,) = (t for t in threading.enumerate() if t.name.startswith("left behind"))
        gate.set()
        stuck.join(30)
        assert not stuck.is_alive()
        assert in_flight(tmp_path) == [2]
        looked.set()
        assert rows_of(list(results)) == [2]
        assert in_flight(tmp_path) == [-1]


def test_closing_does_not_wait_for_a_stuck_thread(
    tmp_path: Path,
    put_before_decoding: Put,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare, "CLOSE_SEC", 0.2)
    put_before_decoding(stuck_on(record(1).data, gate))
    with open_marks(tmp_path, 2) as marks:
        results = prepare_images([record(n) for n in range(9)], SMALL, 2, 6, marks=marks)
        next(results)
        start = time.monotonic()
        results.close()
        assert time.monotonic() - start < 5
    (stuck,) = (t for t in threading.enumerate() if t.name.startswith("left behind"))
    assert sorted(in_flight(tmp_path)) == [-1, 1]
    # It comes back when the file is closed, and ends without a word.
    gate.set()
    stuck.join(30)
    assert not stuck.is_alive()
    with open_marks(tmp_path, 2) as marks:
        assert marks.suspects == {1}


def run_process(
    environment: dict[str, str], folder: Path, *marked: int, timeout_sec: float = 30
) -> tuple[int, list[object]]:
    """Prepares a dozen images in a process; returns its status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.prepare_in_a_process", str(folder), str(timeout_sec),
         *map(str, marked)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if done.returncode == 0 else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, results = run_process(write_faults(folder / "f", "segfault"), folder / "m")
    assert (status, len(results)) == (0, IMAGES)
    return results


def test_images_that_crash_the_process_cost_their_own_rows(
    tmp_path: Path, undisturbed: list[object]
) -> None:
    environment = write_faults(tmp_path / "faults", "segfault")
    status, runs = 1, 0
    while status != 0:
        status, results = run_process(environment, tmp_path / "marks", 3, 10)
        assert status in (0, -signal.SIGSEGV)
        runs += 1
    # They are too far apart to be in flight together: a run dies of each.
    assert runs == 3
    assert len(results) == IMAGES
    for number, (result, expected) in enumerate(zip(results, undisturbed, strict=True)):
        if number in (3, 10):
            assert isinstance(result, list)
            assert result[0] == "decoder_crashed"
            assert "SIGSEGV" in result[1]
        else:
            assert result == expected
    assert not (tmp_path / "marks").exists()


def test_an_image_that_only_crashes_beside_others_is_embedded_after_all(
    tmp_path: Path, undisturbed: list[object]
) -> None:
    environment = write_faults(tmp_path / "faults", "segfault", only_on_threads=True)
    assert run_process(environment, tmp_path / "marks", 5) == (-signal.SIGSEGV, [])
    assert run_process(environment, tmp_path / "marks", 5) == (0, undisturbed)


def test_images_that_hang_cost_time_and_their_own_rows(
    tmp_path: Path, undisturbed: list[object]
) -> None:
    environment = write_faults(tmp_path / "faults", "hang")
    start = time.monotonic()
    status, results = run_process(environment, tmp_path / "marks", 2, 3, timeout_sec=1)
    # Neither the pool nor the end of the interpreter waits for the threads, which hang in C.
    assert time.monotonic() - start < 60
    assert status == 0
    for number in (2, 3):
        result = results[number]
        assert isinstance(result, list)
        assert result[0] == "decoder_timed_out"
        results[number] = undisturbed[number]
    assert results == undisturbed
