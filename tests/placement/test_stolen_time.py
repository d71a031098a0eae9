"""The time that a hypervisor took is measured, if the system reports it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hybrid.placement import stolen_time
from hybrid.placement.stolen_time import StolenTime


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: the seconds that passed, and the seconds that a hypervisor stole."""
    now = SimpleNamespace(passed=100.0, stolen=7.0)
    monkeypatch.setattr(stolen_time.time, "perf_counter", lambda: now.passed)
    monkeypatch.setattr(stolen_time.psutil, "cpu_times", lambda: SimpleNamespace(steal=now.stolen))
    return now


def test_the_share_is_of_the_threads_time_since_the_start(clock):
    stolen = StolenTime()
    clock.passed += 2.0
    clock.stolen += 1.0
    assert stolen.share(n_threads=2) == pytest.approx(0.25)
    clock.stolen += 90.0  # of processors that these threads do not use
    assert stolen.share(n_threads=2) == 1.0


def test_a_system_that_does_not_report_it_steals_nothing(clock, monkeypatch):
    monkeypatch.setattr(stolen_time.psutil, "cpu_times", lambda: SimpleNamespace(user=1.0))
    stolen = StolenTime()
    clock.passed += 2.0
    assert stolen.share(n_threads=2) == 0.0
