"""Time that a hypervisor or other processes took is measured, if the system reports it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_models import STORIES

from hybrid.checkpoint import open_checkpoint
from hybrid.kernels import Format, ThreadPool
from hybrid.notices import Notices
from hybrid.placement import disturbance, measurement
from hybrid.placement.disturbance import OtherLoad, StolenTime
from hybrid.placement.machine import CpuSpeeds
from hybrid.placement.measurement import measured_machine


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: seconds that passed, that a hypervisor stole, and that processes computed."""
    now = SimpleNamespace(passed=100.0, steal=7.0, user=50.0, system=5.0, own=20.0, n_cpus=4)
    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=now.own, system=0.0))
    monkeypatch.setattr(disturbance.time, "perf_counter", lambda: now.passed)
    monkeypatch.setattr(disturbance.psutil, "cpu_times", lambda: now)
    monkeypatch.setattr(disturbance.psutil, "cpu_count", lambda: now.n_cpus)
    monkeypatch.setattr(disturbance.psutil, "Process", lambda: process)
    return now


def test_the_share_is_of_the_threads_time_since_the_start(clock):
    stolen = StolenTime()
    clock.passed += 2.0
    clock.steal += 1.0
    assert stolen.share(n_threads=2) == pytest.approx(0.25)
    clock.steal += 90.0  # of processors that these threads do not use
    assert stolen.share(n_threads=2) == 1.0


def test_a_system_that_does_not_report_it_steals_nothing(clock, monkeypatch):
    monkeypatch.setattr(disturbance.psutil, "cpu_times", lambda: SimpleNamespace(user=1.0))
    stolen = StolenTime()
    clock.passed += 2.0
    assert stolen.share(n_threads=2) == 0.0


def test_own_work_and_spare_processors_do_not_count(clock):
    load = OtherLoad()
    clock.passed += 10.0
    clock.own += 20.0  # two threads of this process
    clock.user += 20.0
    assert load.share(n_threads=2) == 0.0
    clock.user += 20.0  # two processors that nobody else needs
    assert load.share(n_threads=2) == 0.0
    clock.user += 5.0
    assert load.share(n_threads=2) == pytest.approx(0.25)
    assert load.share(n_threads=4) == pytest.approx(2.5 / 4)


@pytest.mark.parametrize(("taken", "is_disturbed"), [(0.0, False), (1.9, False), (2.5, True)])
def test_more_than_a_tenth_disturbs(clock, taken, is_disturbed):
    clock.n_cpus = 2
    load, notices = OtherLoad(), Notices()
    clock.passed += 10.0
    clock.system += taken
    assert load.notice(2, notices) is is_disturbed
    assert len(notices) == is_disturbed


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_speeds_of_a_busy_machine_are_used_but_not_kept(tmp_path, monkeypatch, share):
    speeds = CpuSpeeds(30.0, 20.0, 10.0, 1.0)
    monkeypatch.setattr(measurement, "measure_cpu", lambda *_: speeds)
    monkeypatch.setattr(OtherLoad, "share", lambda self, n_threads: share)
    with open_checkpoint(STORIES) as checkpoint:
        config = checkpoint.config
    notices = Notices()
    machine = measured_machine(config, Format.q8, ThreadPool(1), tmp_path, notices)
    assert machine.cpu == speeds
    assert len(list(tmp_path.rglob("*.json"))) == (share == 0.0)
    assert any("50% of the processors" in notice for notice in notices) is (share == 0.5)
