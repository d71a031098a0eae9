"""Hardware of this machine: cores, caches, memory and memory bandwidth."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import psutil

from hybrid import limits
from hybrid.kernels import ThreadPool, _native

STREAM_BYTES = 1 << 30  # far larger than any cache
STREAM_RESERVE_BYTES = 1 << 29
STREAM_PASSES = 5


def default_threads() -> int:
    """Return the number of threads to use if the user names none: one per allowed core."""
    return limits.allowed_threads()


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
    """Return the memory that is free without swapping, within the limits of all control groups."""
    return limits.memory_left(psutil.virtual_memory().available)


def total_memory_bytes() -> int:
    """Return the memory that this process may have, with the machine's swap space."""
    return limits.memory_limit(psutil.virtual_memory().total) + psutil.swap_memory().total


def measure_stream_gbs(pool: ThreadPool) -> float:
    """Measure the memory bandwidth in GB/s (1e9 bytes) with the threads of `pool`.

    It is the best of several read-only SIMD passes over huge-page memory. This takes about half a
    second and 1 GiB. Raises MemoryError if less than that and a reserve for others is free, because
    the system would end this process, or another one.
    """
    if available_memory_bytes() < STREAM_BYTES + STREAM_RESERVE_BYTES:
        raise MemoryError
    memory = _native.allocate_bytes(STREAM_BYTES).view(np.float32)
    memory[:] = 1.0  # untouched pages would all map to one page of zeros
    best = float("inf")
    for _ in range(STREAM_PASSES):
        started = time.perf_counter()
        pool.read(memory)
        best = min(best, time.perf_counter() - started)
    return STREAM_BYTES / best / 1e9
