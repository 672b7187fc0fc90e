"""Large pictures take turns, in their order, and nobody waits for a decoder that hangs."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.unit.images_for_tests import encode
from transforms import pixel_budget, prepare
from transforms.decoding import DecodedImage, DecodePolicy
from transforms.pixel_budget import FREE_PIXELS, PIXELS, PixelBudget
from transforms.prepare import Preparation, Prepared, PreparedImage, prepare_images
from transforms.preprocessing import Preprocessing
from transforms.sources.base import ImageRecord

PREPARATION = Preparation(DecodePolicy(), Preprocessing((32, 32)))
LARGE = (2100, 2000)
LARGE_PIXELS = LARGE[0] * LARGE[1]


def flat(height: int, width: int, format: str, **options: object) -> bytes:
    return encode(np.full((height, width, 3), 90, np.uint8), format, **options)


@pytest.fixture(scope="module")
def large() -> bytes:
    return flat(*LARGE, "PNG")


def records(images: list[bytes]) -> list[ImageRecord]:
    return [ImageRecord(f"i{n}", "shard", n, image) for n, image in enumerate(images)]


class Watch:
    """Stands in front of the decoder: which pixels are being decoded with room, and most at once."""

    def __init__(self, decode: Callable[..., DecodedImage]) -> None:
        self.decode, self.lock = decode, threading.Lock()
        self.now = self.most = self.calls = 0
        self.before: Callable[[], object] = lambda: time.sleep(0.02)

    def __call__(self, data: bytes, policy: DecodePolicy, *arguments: object) -> DecodedImage:
        if len(arguments) > 1:  # The first try, which decodes nothing large.
            return self.decode(data, policy, *arguments)
        with self.lock:
            self.calls += 1
            self.now += LARGE_PIXELS
            self.most = max(self.most, self.now)
        try:
            self.before()
            return self.decode(data, policy, *arguments)
        finally:
            with self.lock:
                self.now -= LARGE_PIXELS


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watched = Watch(prepare.decode_image)
    monkeypatch.setattr(prepare, "decode_image", watched)
    yield watched
    assert PIXELS.held == 0


@pytest.mark.parametrize("fitting", [1, 2])
def test_large_images_stay_within_the_bound(
    watch: Watch, large: bytes, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "AT_ONCE_PIXELS", fitting * LARGE_PIXELS + 1)
    policy = DecodePolicy(max_pixels=LARGE_PIXELS)
    small = flat(40, 40, "PNG")
    images = records([large, small, large, large, small, large, large, large])
    results = list(prepare_images(images, Preparation(policy, PREPARATION.preprocessing), 4, 8))
    assert [result.record.row for result in results if isinstance(result, PreparedImage)] == [*range(8)]
    assert watch.calls == 6
    assert watch.most == fitting * LARGE_PIXELS


def test_without_a_bound_all_threads_decode_at_once(watch: Watch, large: bytes) -> None:
    # The same images, so that the bound above is no accident.
    barrier = threading.Barrier(3)
    watch.before = lambda: barrier.wait(60)
    assert len(list(prepare_images(records([large] * 3), PREPARATION, 3, 3))) == 3
    assert watch.most == 3 * LARGE_PIXELS


def test_an_image_above_the_limit_waits_for_nothing(watch: Watch, large: bytes) -> None:
    policy = DecodePolicy(max_pixels=LARGE_PIXELS - 1)
    (result,) = prepare_images(records([large]), Preparation(policy, PREPARATION.preprocessing), 1, 1)
    assert not isinstance(result, PreparedImage)
    assert getattr(result, "reason", "") == "too_large"
    assert f"more than {LARGE_PIXELS - 1}" in getattr(result, "error", "")


def test_jpegs_count_what_libjpeg_holds(watch: Watch) -> None:
    baseline = flat(*LARGE, "JPEG")
    progressive = flat(*LARGE, "JPEG", progressive=True)
    assert len(list(prepare_images(records([baseline] * 3), PREPARATION, 2, 3))) == 3
    assert watch.calls == 0
    assert len(list(prepare_images(records([progressive] * 3), PREPARATION, 2, 3))) == 3
    assert watch.calls == 3
    whole = Preparation(DecodePolicy(scaled=False), PREPARATION.preprocessing)
    assert len(list(prepare_images(records([baseline] * 3), whole, 2, 3))) == 3
    assert watch.calls == 6


def test_waiting_is_no_time_of_the_decoder(
    watch: Watch, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "AT_ONCE_PIXELS", 1)
    watch.before = lambda: time.sleep(0.5)
    monkeypatch.setattr(prepare, "decode_alone", None)  # Nothing is tried alone.
    preparation = Preparation(DecodePolicy(LARGE_PIXELS), PREPARATION.preprocessing)
    results = list(prepare_images(records([large] * 6), preparation, 6, 6, timeout_sec=2.2))
    assert all(isinstance(result, PreparedImage) for result in results)
    assert watch.most == LARGE_PIXELS


def test_a_large_image_that_hangs_gives_way(
    watch: Watch, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "AT_ONCE_PIXELS", 1)
    gate, first = threading.Event(), threading.Lock()
    watch.before = lambda: gate.wait(60) if first.acquire(blocking=False) else None
    preparation = Preparation(DecodePolicy(LARGE_PIXELS), PREPARATION.preprocessing)
    try:
        results: list[Prepared] = []
        results.extend(prepare_images(records([large] * 4), preparation, 3, 4, timeout_sec=1))
    finally:
        gate.set()
    # The one that hung was tried alone, where nothing hangs.
    assert all(isinstance(result, PreparedImage) for result in results)
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("left behind") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def test_the_order_is_that_of_asking() -> None:
    budget, order = PixelBudget(), list[str]()
    budget.take("a", 6, 10, 60)

    def ask(name: str, pixels: int) -> Callable[[], None]:
        def run() -> None:
            budget.take(name, pixels, 10, 60)
            order.append(name)

        return run

    threads = []
    for name, pixels in (("large", 9), ("small", 1)):
        threads.append(start(ask(name, pixels)))
        while len(budget._queue) < len(threads):
            time.sleep(0.001)
    # The small one would fit, and yet the large one is never overtaken.
    time.sleep(0.05)
    assert order == []
    budget.give_back("a")
    for thread in threads:
        thread.join(30)
    assert order == ["large", "small"]
    assert budget.held == 10


def test_one_may_have_more_than_all() -> None:
    budget = PixelBudget()
    budget.take("a", 11, 10, 0.01)
    assert budget.held == 11
    budget.give_back("a")
    budget.give_back("a")
    budget.give_back("nobody")
    assert budget.held == 0


def test_patience_ends() -> None:
    budget = PixelBudget()
    budget.take("hangs", 10, 10, 60)
    budget.take("next", 10, 10, 0.05)
    assert budget.held == 20


def test_the_bound_is_the_default_limit_of_one_image() -> None:
    assert DecodePolicy().max_pixels == pixel_budget.AT_ONCE_PIXELS
    assert FREE_PIXELS < LARGE_PIXELS < pixel_budget.AT_ONCE_PIXELS
