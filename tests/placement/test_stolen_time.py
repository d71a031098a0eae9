"""What a hypervisor took is seen, and its absence is no fault."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hybrid.placement import stolen_time
from hybrid.placement.stolen_time import StolenTime


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, and those that were stolen of them."""
    now = SimpleNamespace(passed=100.0, stolen=7.0)
    monkeypatch.setattr(stolen_time.time, "perf_counter", lambda: now.passed)
    monkeypatch.setattr(stolen_time.psutil, "cpu_times", lambda: SimpleNamespace(steal=now.stolen))
    return now


def test_the_share_is_of_the_threads_time_since_the_beginning(clock):
    stolen = StolenTime()
    clock.passed += 2.0
    clock.stolen += 1.0
    assert stolen.share(n_threads=2) == pytest.approx(0.25)
    clock.stolen += 90.0  # of processors that these threads do not use
    assert stolen.share(n_threads=2) == 1.0


def test_a_system_that_does_not_tell_steals_nothing(clock, monkeypatch):
    monkeypatch.setattr(stolen_time.psutil, "cpu_times", lambda: SimpleNamespace(user=1.0))
    stolen = StolenTime()
    clock.passed += 2.0
    assert stolen.share(n_threads=2) == 0.0
