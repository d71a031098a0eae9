"""Choosing the next tokens of several streams on several threads.

A token is drawn without the GIL. Each stream has a random generator of its own, so who chooses
first changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hybrid.engine.batch.stream import Stream
from hybrid.threads import start_workers

LEAST_LOGITS = 1 << 16  # of all streams: below, waking a thread costs more than it saves


class Chooser:
    """Threads that choose tokens; they start when they are first needed."""

    def __init__(self, n_threads: int, vocab_size: int) -> None:
        self._n_threads, self._vocab_size = n_threads, vocab_size
        self._workers: ThreadPoolExecutor | None = None

    def choose(self, streams: Sequence[Stream]) -> None:
        """Let each stream choose its next token."""
        n = min(self._n_threads, len(streams))
        if n > 1 and len(streams) * self._vocab_size >= LEAST_LOGITS:
            self._workers = self._workers or start_workers(self._n_threads)
            if self._workers is None:  # the system starts no more threads
                self._n_threads = 1
            else:
                list(self._workers.map(_choose, [streams[i::n] for i in range(n)]))
                return
        _choose(streams)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.shutdown()


def _choose(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.choose()
