"""Work is shared by as many threads as the system starts. The results are the same."""

from __future__ import annotations

import threading
import time

import pytest

from hybrid.threads import map_on_threads


@pytest.mark.parametrize("n_threads", [0, 1, 3, 100])
def test_results_come_in_the_order_of_the_items(n_threads):
    def slowest_first(i: int) -> int:
        time.sleep(0.003 * (3 - i % 4))
        return i * i

    assert list(map_on_threads(slowest_first, range(10), n_threads)) == [i * i for i in range(10)]
    assert list(map_on_threads(slowest_first, [], n_threads)) == []


def test_threads_work_at_the_same_time():
    both = threading.Barrier(2, timeout=60)
    assert sorted(map_on_threads(lambda _: both.wait(), range(2), 2)) == [0, 1]


@pytest.mark.parametrize("n_allowed", [0, 1, 2])
def test_the_threads_that_the_system_starts_do_all_of_the_work(monkeypatch, n_allowed):
    start, running, workers = threading.Thread.start, threading.active_count(), set()

    def start_some(thread: threading.Thread) -> None:
        if threading.active_count() - running >= n_allowed:
            raise RuntimeError("can't start new thread")
        start(thread)

    def work(i: int) -> int:
        workers.add(threading.get_ident())
        return -i

    monkeypatch.setattr(threading.Thread, "start", start_some)
    assert list(map_on_threads(work, range(50), 8)) == [-i for i in range(50)]
    assert len(workers) <= max(1, n_allowed)
    assert (workers == {threading.get_ident()}) == (n_allowed < 2)
    assert threading.active_count() == running


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_error_passes_through_and_ends_the_work(n_threads):
    done = []

    def work(i: int) -> None:
        if i == 3:
            raise ValueError("three")
        time.sleep(0.001)
        done.append(i)

    with pytest.raises(ValueError, match="three"):
        list(map_on_threads(work, range(1000), n_threads))
    assert len(done) < 1000
