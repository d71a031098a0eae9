"""Limits that the system sets this process: control groups, and the processors it may use.

A process belongs to a group of each hierarchy, and every ancestor of that group limits it too.
Version 2 has one hierarchy, version 1 one per controller, and a system may mount both. Sources:
https://docs.kernel.org/admin-guide/cgroup-v2.html (memory, cpu), cgroup-v1/memory.html,
https://docs.kernel.org/scheduler/sched-bwc.html, and proc_pid_mountinfo(5).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

PROC = Path("/proc/self")
CPUS = Path("/sys/devices/system/cpu")


class Group(NamedTuple):
    """A control group that this process is in, directly or through a descendant."""

    folder: Path
    version: int  # 1 or 2

    def read(self, name: str) -> str:
        """Return the content of one of its files, or "" if it has no such file."""
        try:
            return (self.folder / name).read_text().strip()
        except (OSError, ValueError):
            return ""

    def number(self, name: str) -> int | None:
        """Return the number that a file holds. None: no such file, or no number, such as "max"."""
        text = self.read(name)
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def statistic(self, file: str, name: str) -> int | None:
        """Return a value of a file that has lines such as "inactive_file 4096"."""
        match = re.search(rf"^{name} (\d+)$", self.read(file), re.MULTILINE)
        return int(match[1]) if match else None


def groups(controller: str) -> Iterator[Group]:
    """Yield the groups that limit this process by "memory" or "cpu", from its own to the root."""
    try:
        memberships = (PROC / "cgroup").read_text().splitlines()
        mounts = (PROC / "mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return
    paths: dict[str, str] = {}  # of this process's groups, by controller; "" is version 2
    for line in memberships:  # such as 4:cpu,cpuacct:/user/1 or 0::/user/1
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in mounts:  # such as 32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
        match = re.match(r"\S+ \S+ \S+ (\S+) (\S+) .*- (cgroup2?) \S+ (\S+)$", line)
        if match is None:
            continue
        root, mount_point, kind, options = match.groups()
        if kind == "cgroup" and controller not in options.split(","):
            continue
        version, of = (2, "") if kind == "cgroup2" else (1, controller)
        # In a container the mount may begin at the process's own group, or the path lead outside.
        inner, top = Path(paths.get(of, "/")), Path(_unescaped(root))
        is_inside = inner.is_relative_to(top) and ".." not in inner.parts
        below = inner.relative_to(top) if is_inside else Path()
        for part in (below, *below.parents):
            yield Group(Path(_unescaped(mount_point)) / part, version)


def memory_left(available: int) -> int:
    """Return how much of `available` bytes the control groups leave to this process.

    Page cache that the system can drop at once does not count as used.
    """
    for group in groups("memory"):
        if group.version == 2:
            used = group.number("memory.current")
            cached = group.statistic("memory.stat", "inactive_file")
        else:
            used = group.number("memory.usage_in_bytes")
            cached = group.statistic("memory.stat", "total_inactive_file")
        limit = _memory_limit(group)
        if limit is not None and used is not None:
            available = min(available, limit - max(0, used - (cached or 0)))
    return max(available, 0)


def memory_limit(total: int) -> int:
    """Return the memory that this process may have, of `total` bytes that the machine has."""
    limits = [_memory_limit(group) for group in groups("memory")]
    return min([total, *(limit for limit in limits if limit is not None)])


def _memory_limit(group: Group) -> int | None:
    """Return a group's limit in bytes. None: it has none."""
    if group.version == 2:
        limits = [group.number(name) for name in ("memory.max", "memory.high")]
    else:
        # The statistic also covers ancestors that a container cannot see.
        limits = [
            group.number("memory.limit_in_bytes"),
            group.statistic("memory.stat", "hierarchical_memory_limit"),
        ]
    return min((limit for limit in limits if limit is not None), default=None)


def cpu_quota() -> float:
    """Return how many processors the control groups let this process use at once, or infinity."""
    quota = math.inf
    for group in groups("cpu"):
        if group.version == 2:
            limit, _, period = group.read("cpu.max").partition(" ")
        else:
            limit, period = group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")
        if limit.isdigit() and period.isdigit() and int(period) > 0:  # not "max" and not "-1"
            quota = min(quota, int(limit) / int(period))
    return quota


def allowed_cpus() -> set[int]:
    """Return the numbers of the logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def allowed_cores() -> int:
    """Return the number of physical cores that this process may use.

    Where the system does not tell cores from their hardware threads, all of those count.
    """
    cpus = allowed_cpus()
    cores = set()
    for cpu in cpus:
        try:
            cores.add((CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except (OSError, ValueError):
            return min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))
    return len(cores)


def allowed_threads() -> int:
    """Return how many threads can compute at once: one per core, within the quota.

    More threads would only compete for the same memory bandwidth. If they used up the quota, the
    system would stop all of them for a part of each period.
    """
    return max(1, int(min(allowed_cores(), cpu_quota())))


def _unescaped(path: str) -> str:
    """Undo the octal escapes of mountinfo, such as "\\040" for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
