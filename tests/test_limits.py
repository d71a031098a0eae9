"""Limits of control groups of both versions, at every level, and of the processors are seen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import hybrid
from hybrid import limits
from hybrid.engine.loading.choices import WORKING_BYTES
from hybrid.placement import hardware

MB = 1 << 20


class System:
    """A fake /proc/self and control groups in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self.proc.mkdir()
        self.groups: list[str] = []
        self.mounts = [f"31 23 0:28 / {root} rw,relatime - tmpfs tmpfs rw,mode=755"]

    def mount(self, controller: str, *, version: int, seen_from: str = "/", at: str = "") -> Path:
        """Mount a hierarchy. `seen_from` is the group that is the root of what is visible."""
        folder = self.root / "cgroup" / (at or controller or "unified")
        folder.mkdir(parents=True)
        kind, option = ("cgroup2", "rw") if version == 2 else ("cgroup", f"rw,{controller}")
        escaped = str(folder).replace(" ", "\\040")
        self.mounts.append(f"32 31 0:29 {seen_from} {escaped} rw,relatime - {kind} {kind} {option}")
        return folder

    def enter(self, controllers: str, path: str) -> None:
        self.groups.append(f"{len(self.groups)}:{controllers}:{path}")

    def write(self) -> None:
        (self.proc / "mountinfo").write_text("\n".join(self.mounts) + "\n")
        (self.proc / "cgroup").write_text("\n".join(self.groups) + "\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    made = System(tmp_path)
    monkeypatch.setattr(limits, "PROC", made.proc)
    monkeypatch.setattr(limits, "CPUS", tmp_path / "cpus")
    return made


def fill(folder: Path, **files: object) -> None:
    """Write the files of a group; "__" in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def group_v2(folder: Path, limit: object, used: int, cached: int = 0, high: object = "max") -> None:
    statistics = f"anon 1\ninactive_anon 7\ninactive_file {cached}\nactive_file 5"
    fill(folder, memory__max=limit, memory__current=used, memory__high=high)
    fill(folder, memory__stat=statistics)


def group_v1(folder: Path, limit: int, used: int, cached: int = 0, above: int = 2**63) -> None:
    statistics = f"inactive_file 1\nhierarchical_memory_limit {above}\ntotal_inactive_file {cached}"
    fill(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=used)
    fill(folder, memory__stat=statistics)


# Memory


def test_without_control_groups_everything_is_left(system):
    assert limits.memory_left(100 * MB) == 100 * MB  # not even /proc
    system.write()
    assert limits.memory_left(100 * MB) == 100 * MB
    assert limits.cpu_quota() == math.inf


@pytest.mark.parametrize("tightest", [0, 1, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_every_ancestor_limits_memory(system, version, tightest):
    top = system.mount("memory", version=version)
    system.enter("" if version == 2 else "memory", "/a/b")
    system.write()
    group = group_v2 if version == 2 else group_v1
    for index, folder in enumerate((top / "a" / "b", top / "a", top)):
        group(folder, 200 * MB if index == tightest else 900 * MB, 50 * MB)
    assert limits.memory_left(10**12) == 150 * MB
    assert limits.memory_left(100 * MB) == 100 * MB  # the machine itself has less


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_that_can_be_dropped_is_not_used(system, version):
    top = system.mount("memory", version=version)
    system.enter("" if version == 2 else "memory", "/")
    system.write()
    (group_v2 if version == 2 else group_v1)(top, 200 * MB, 190 * MB, 120 * MB)
    assert limits.memory_left(10**12) == 130 * MB


def test_what_is_beyond_a_limit_leaves_nothing(system):
    top = system.mount("memory", version=2)
    system.enter("", "/")
    system.write()
    group_v2(top, 200 * MB, 210 * MB)
    assert limits.memory_left(10**12) == 0


def test_groups_without_a_limit_do_not_count(system):
    v2, v1 = system.mount("", version=2), system.mount("memory", version=1)
    system.enter("memory", "/")
    system.enter("", "/")
    system.write()
    group_v2(v2, "max", 500 * MB)
    group_v1(v1, 9223372036854771712, 500 * MB)
    assert limits.memory_left(10**9) == 10**9


def test_the_limit_from_which_a_group_is_slowed_down_counts(system):
    top = system.mount("memory", version=2)
    system.enter("", "/")
    system.write()
    group_v2(top, 900 * MB, 50 * MB, high=300 * MB)
    assert limits.memory_left(10**12) == 250 * MB


def test_both_versions_may_be_mounted_and_the_smaller_limit_counts(system):
    v2, v1 = system.mount("", version=2), system.mount("memory", version=1)
    system.mount("cpu", version=1)
    system.enter("cpu,cpuacct", "/elsewhere")
    system.enter("memory", "/a")
    system.enter("", "/b")
    system.write()
    group_v1(v1 / "a", 300 * MB, 0)
    group_v2(v2 / "b", 200 * MB, 0)
    assert limits.memory_left(10**12) == 200 * MB
    group_v2(v2 / "b", 400 * MB, 0)
    assert limits.memory_left(10**12) == 300 * MB


@pytest.mark.parametrize(
    ("seen_from", "path"),
    [
        pytest.param("/docker/1f", "/docker/1f", id="the container's own group is mounted"),
        pytest.param("/", "/../../outside", id="the path leads out of the namespace"),
        pytest.param("/docker/1f", "/", id="the path is that of the namespace"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_sees_its_own_group_as_the_root(system, version, seen_from, path):
    top = system.mount("memory", version=version, seen_from=seen_from)
    system.enter("" if version == 2 else "memory", path)
    system.write()
    (group_v2 if version == 2 else group_v1)(top, 200 * MB, 20 * MB)
    assert limits.memory_left(10**12) == 180 * MB


def test_a_limit_of_an_ancestor_that_a_container_cannot_see_counts(system):
    top = system.mount("memory", version=1, seen_from="/pod/1f")
    system.enter("memory", "/pod/1f")
    system.write()
    group_v1(top, 9223372036854771712, 20 * MB, above=100 * MB)
    assert limits.memory_left(10**12) == 80 * MB


def test_a_mount_point_may_hold_a_space(system):
    top = system.mount("memory", version=1, at="control groups")
    system.enter("memory", "/")
    system.write()
    group_v1(top, 200 * MB, 0)
    assert limits.memory_left(10**12) == 200 * MB


def test_files_that_make_no_sense_are_ignored(system):
    top = system.mount("memory", version=2)
    system.enter("", "/")
    system.groups.append("nonsense")
    system.mounts.append("nonsense - cgroup")
    system.write()
    fill(top, memory__max="200 apples", memory__current="", cpu__max="lots")
    assert limits.memory_left(10**9) == 10**9
    assert limits.cpu_quota() == math.inf


def test_the_limits_bound_what_is_available(system, monkeypatch):
    top = system.mount("memory", version=1)
    system.enter("memory", "/a")
    system.write()
    group_v1(top / "a", 3 * MB, MB)
    assert hardware.available_memory_bytes() == 2 * MB


def test_a_model_beyond_the_limit_of_an_ancestor_is_mapped(system, monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    top = system.mount("memory", version=2)
    system.enter("", "/pod/container")
    system.write()
    group_v2(top / "pod" / "container", "max", 90 * MB)
    group_v2(top / "pod", 100 * MB + WORKING_BYTES, 150 * MB, cached=52 * MB)  # 2 MB too much
    with hybrid.load("stories", threads=2) as engine:
        assert engine.stats.is_mapped
        assert any("mapped from disk" in notice for notice in engine.notices)
    with pytest.raises(hybrid.OutOfMemory, match="close other programs"):
        hybrid.load("stories", mmap=False)


def test_the_bandwidth_is_not_measured_without_ample_memory(monkeypatch):
    def refuse(n_bytes):
        raise AssertionError("it was allocated")

    monkeypatch.setattr(hardware._native, "allocate_bytes", refuse)
    for available in (0, hardware.STREAM_BYTES, hardware.STREAM_BYTES * 5 // 4):
        monkeypatch.setattr(hardware, "available_memory_bytes", lambda n=available: n)
        with pytest.raises(MemoryError):
            hardware.measure_stream_gbs(None)


# Processors


def cpus(monkeypatch: pytest.MonkeyPatch, cores: dict[int, str], allowed: set[int]) -> None:
    """Pretend that processors belong to `cores` and that this process may use `allowed`."""
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: allowed, raising=False)
    for cpu, siblings in cores.items():
        fill(limits.CPUS / f"cpu{cpu}" / "topology", thread_siblings_list=siblings)


FOUR_CORES = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}


@pytest.mark.parametrize(
    ("allowed", "n_cores"), [(set(range(8)), 4), ({0, 1}, 2), ({0, 4}, 1), ({0, 4, 5}, 2)]
)
def test_threads_of_one_core_count_once(system, monkeypatch, allowed, n_cores):
    cpus(monkeypatch, FOUR_CORES, allowed)
    assert limits.allowed_cores() == n_cores
    assert hardware.default_threads() == n_cores


@pytest.mark.parametrize(("known", "n_threads"), [(None, 6), (4, 4), (64, 6)])
def test_where_cores_are_unknown_all_allowed_processors_count(
    system, monkeypatch, known, n_threads
):
    cpus(monkeypatch, {}, set(range(2, 8)))
    monkeypatch.setattr(limits.psutil, "cpu_count", lambda logical: known)
    assert hardware.default_threads() == n_threads


def test_a_system_without_affinity_allows_all_processors(system, monkeypatch):
    monkeypatch.delattr(limits.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(limits.psutil, "cpu_count", lambda logical: None)
    assert hardware.default_threads() == 3


@pytest.mark.parametrize(
    ("quota", "n_threads"), [(300_000, 3), (250_000, 2), (50_000, 1), (1_000_000, 4)]
)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("is_nested", [False, True])
def test_the_quota_bounds_the_threads(system, monkeypatch, quota, n_threads, version, is_nested):
    cpus(monkeypatch, FOUR_CORES, set(range(8)))
    top = system.mount("cpu", version=version)
    system.enter("" if version == 2 else "cpu", "/a/b")
    system.write()
    unlimited = {"cpu__max": "max 100000", "cpu__cfs_quota_us": -1, "cpu__cfs_period_us": 100_000}
    limited = {"cpu__max": f"{quota} 100000", "cpu__cfs_quota_us": quota}
    fill(top / "a" / "b", **unlimited)
    fill(top / "a", **unlimited)
    fill(top / "a" if is_nested else top / "a" / "b", **limited)
    assert limits.cpu_quota() == quota / 100_000
    assert hardware.default_threads() == n_threads
