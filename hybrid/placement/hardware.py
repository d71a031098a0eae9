"""Hardware of this machine: cores, caches, memory and memory bandwidth."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import psutil

from hybrid.kernels import ThreadPool, _native

STREAM_BYTES = 1 << 30  # far larger than any cache
STREAM_PASSES = 5


def default_threads() -> int:
    """Return the number of physical cores that this process may use.

    More threads would only compete for the same memory bandwidth.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))


def last_level_cache_bytes() -> int | None:
    """Return the size of the largest cache, or None if the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        except OSError:
            continue
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)


def available_memory_bytes() -> int:
    """Return the memory that is free without swapping, within a container's limit."""
    available = psutil.virtual_memory().available
    try:  # https://docs.kernel.org/admin-guide/cgroup-v2.html
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(available, 0)


def total_memory_bytes() -> int:
    """Return the memory of this machine with its swap space, within a container's limit."""
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    try:  # https://docs.kernel.org/admin-guide/cgroup-v2.html
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            total = min(total, int(limit) + psutil.swap_memory().total)
    except (OSError, ValueError):
        pass
    return total


def measure_stream_gbs(pool: ThreadPool) -> float:
    """Measure the memory bandwidth in GB/s (1e9 bytes) with the threads of `pool`.

    It is the best of several read-only SIMD passes over huge-page memory. This takes about half a
    second and 1 GiB. Raises MemoryError.
    """
    memory = _native.allocate_bytes(STREAM_BYTES).view(np.float32)
    memory[:] = 1.0  # untouched pages would all map to one page of zeros
    best = float("inf")
    for _ in range(STREAM_PASSES):
        started = time.perf_counter()
        pool.read(memory)
        best = min(best, time.perf_counter() - started)
    return STREAM_BYTES / best / 1e9
