"""Results in order, from a few threads, in bounded memory."""

import threading
import time

import pytest

from index_builder.datasets.in_order import map_in_order


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.003 * (number % 3 == 0))
        return number * number

    assert list(map_in_order(work, range(20), threads)) == [number**2 for number in range(20)]
    assert list(map_in_order(work, [], threads)) == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_no_more_is_begun_than_threads_may_hold(threads: int) -> None:
    begun, lock = [], threading.Lock()

    def work(number: int) -> int:
        with lock:
            begun.append(number)
        return number

    for taken in map_in_order(work, range(30), threads):
        time.sleep(0.002)
        with lock:
            # The one that the caller holds, and one for each thread.
            assert len(begun) <= taken + 1 + (threads if threads > 1 else 0)
    assert sorted(begun) == list(range(30))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_in_its_place_and_ends_the_work(threads: int) -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 4:
            raise ValueError("four")
        return number

    found = []
    with pytest.raises(ValueError, match="four"):
        found.extend(map_in_order(work, range(100), threads))
    assert max(begun) <= 4 + threads
