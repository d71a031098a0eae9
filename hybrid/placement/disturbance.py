"""What disturbs a measurement: time that a hypervisor steals, and processors that others take.

Our timings cannot see either, so every timing is wrong by it.
"""

from __future__ import annotations

import time

import psutil

from hybrid.notices import Notices

# Share of the processors that a measurement needs. If others take more, it is not kept.
MAX_OTHERS = 0.1


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


class OtherLoad:
    """Measures how many processors other processes, or a hypervisor, take since its construction.

    Processors that nobody needs do not count: on a machine with 16 of them, a measurement with 4
    threads is disturbed only if others take more than 12.
    """

    def __init__(self) -> None:
        self._others_s, self._started = _others_s(), time.perf_counter()

    def share(self, n_threads: int) -> float:
        """Return the share of `n_threads` processors that others took, from 0 to 1."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        others = (_others_s() - self._others_s) / elapsed
        spare = (psutil.cpu_count() or n_threads) - n_threads
        return min(max(0.0, others - spare) / n_threads, 1.0)

    def notice(self, n_threads: int, notices: Notices) -> bool:
        """Return whether others took too much; then a notice says so."""
        share = self.share(n_threads)
        if share <= MAX_OTHERS:
            return False
        notices.add(
            f"other processes took {share:.0%} of the processors while this machine was measured: "
            "its speeds are used now but not kept"
        )
        return True


def _stolen_s() -> float:
    """Return stolen seconds of all processors since boot. Only Linux reports them, to 10 ms."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _others_s() -> float:
    """Return busy seconds of all processors since boot, without those of this process."""
    times = psutil.cpu_times()
    names = ("user", "system", "nice", "irq", "softirq", "steal")
    busy = sum(float(getattr(times, name, 0.0)) for name in names)
    own = psutil.Process().cpu_times()
    return busy - own.user - own.system
