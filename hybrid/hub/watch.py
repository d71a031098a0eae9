"""Waits for work that depends on a server, and gives up if too little comes.

A timeout of an HTTP library is for one read, and begins again with each byte. A server that sends
one byte a second, in the headers, the body or between chunks, is therefore never too slow for it.
So the work runs in a thread of its own, and the caller's thread measures what arrives. A thread
that is given up ends when its next read returns. It never keeps the process alive.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

PATIENCE_S = 60.0  # in each such span of waiting at least MIN_BYTES must arrive
MIN_BYTES = 64 << 10  # 1.1 kB/s on average: a slow line has five times that

T = TypeVar("T")


class Stalled(Exception):
    """The server sends too little in the time that it has."""


class SourceFailed(Exception):
    """Carries an error of the work, so that it cannot be taken for one of the caller's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    value: T


def watched(
    source: Callable[[], Generator[T, None, None]], *, total_s: float = math.inf
) -> Generator[T, None, None]:
    """Yield what `source` yields, in a thread of its own. Closes it when this generator is closed.

    Only the time is counted in which this waits for the source. Raises Stalled if less than
    MIN_BYTES arrive in PATIENCE_S seconds, or if the source has not ended after `total_s`, and
    SourceFailed for what the source raises.
    """
    arrived: queue.Queue[_Item[T] | Exception | None] = queue.Queue(maxsize=8)
    is_abandoned = threading.Event()

    def work() -> None:
        try:
            with contextlib.closing(source()) as items:
                for item in items:
                    arrived.put(_Item(item))
                    if is_abandoned.is_set():
                        return
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=work, name="hybrid-download", daemon=True).start()
    waited_s, span_s, n_bytes = 0.0, 0.0, 0
    try:
        while True:
            started = time.monotonic()
            try:
                entry = arrived.get(timeout=max(0.0, min(PATIENCE_S - span_s, total_s - waited_s)))
                is_in_time = True
            except queue.Empty:
                is_in_time = False
            elapsed = time.monotonic() - started
            waited_s, span_s = waited_s + elapsed, span_s + elapsed
            if is_in_time:
                if entry is None:
                    return
                if isinstance(entry, Exception):
                    raise SourceFailed(entry) from entry
                n_bytes += len(entry.value) if isinstance(entry.value, bytes) else 0
                yield entry.value
            if waited_s >= total_s:
                raise Stalled(f"the server's answer is not complete after {total_s:g} s")
            if span_s >= PATIENCE_S:
                if n_bytes < MIN_BYTES:
                    raise Stalled(f"the server sent only {n_bytes:,} bytes in {PATIENCE_S:g} s")
                span_s, n_bytes = 0.0, 0
    finally:
        is_abandoned.set()
        with contextlib.suppress(queue.Empty):  # room for what the thread is about to put there
            while True:
                arrived.get_nowait()


def call(function: Callable[[], T]) -> T:
    """Return what `function` returns within PATIENCE_S. Raises Stalled or SourceFailed."""

    def source() -> Generator[T, None, None]:
        yield function()

    with contextlib.closing(watched(source, total_s=PATIENCE_S)) as results:
        return next(results)
