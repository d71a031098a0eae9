"""What a hypervisor takes of a virtual machine's processors: no measurement of ours can see it, and
each is wrong by it."""

from __future__ import annotations

import time

import psutil


def _stolen_s() -> float:
    """Of all processors, since the machine started; Linux alone tells, to 10 ms."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


class StolenTime:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._stolen_s, self._started = _stolen_s(), time.perf_counter()

    def share(self, n_threads: int) -> float:
        """Of the time of `n_threads` processors, 1 at most; 0 where the system does not tell."""
        elapsed = time.perf_counter() - self._started
        return min((_stolen_s() - self._stolen_s) / (n_threads * elapsed), 1.0)
