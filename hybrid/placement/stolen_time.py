"""Stolen time: processor time that a hypervisor takes from a virtual machine.

Our timings cannot see it, so every timing is wrong by it.
"""

from __future__ import annotations

import time

import psutil


def _stolen_s() -> float:
    """Return stolen seconds of all processors since boot. Only Linux reports them, to 10 ms."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


class StolenTime:
    """Measures stolen time since its construction."""

    def __init__(self) -> None:
        self._stolen_s, self._started = _stolen_s(), time.perf_counter()

    def share(self, n_threads: int) -> float:
        """Return the stolen share of the time of `n_threads` processors, at most 1.

        It is 0 if the system does not report it.
        """
        elapsed = time.perf_counter() - self._started
        return min((_stolen_s() - self._stolen_s) / (n_threads * elapsed), 1.0)
