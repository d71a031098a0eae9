"""Work that several threads share, or fewer if the system starts no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_on_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], n_threads: int
) -> Iterator[_Result]:
    """Yield function(item) for each item, in their order, computed by up to `n_threads` threads.

    A limit of processes may allow fewer threads. If it allows none, or `n_threads` is 1, the
    calling thread computes. If the caller ends early, what has not begun is left out.
    """
    items = list(items)
    workers = start_workers(min(n_threads, len(items)))
    if workers is None:
        yield from map(function, items)
        return
    try:
        yield from workers.map(function, items)
    finally:
        workers.shutdown(cancel_futures=True)


def start_workers(n_threads: int) -> ThreadPoolExecutor | None:
    """Return a pool whose threads run already. None if one thread is enough, or none starts.

    A pool starts its threads with its first tasks, and raises RuntimeError if one does not start.
    """
    while n_threads > 1:
        workers = ThreadPoolExecutor(n_threads)
        is_full = threading.Event()  # no thread takes two of the tasks
        n_started = 0
        try:
            for _ in range(n_threads):
                workers.submit(is_full.wait)
                n_started += 1
        except RuntimeError:
            is_full.set()
            workers.shutdown()
            n_threads = n_started
        else:
            return workers
        finally:
            is_full.set()
    return None
