"""Memory for the bytes of a packed file: mapped, copied, or mapped first and copied later.

Huge-page memory of our own is read fastest, but copying a gigabyte into it takes a second. So the
file is mapped first, which takes no time. A thread then copies it in the background, part by part,
to the same addresses.
"""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hybrid.errors import OutOfMemory
from hybrid.kernels import _native
from hybrid.weights.packed_rows import Buffer

READ_BYTES = 32 << 20  # bytes of one read
MOVE_BYTES = 16 << 20  # bytes copied at once in the background; whole huge pages
SYNC_BYTES = 32 << 20  # bytes written before they are forced to the disk


class FileChanged(Exception):
    """The file became shorter after its size was checked."""


def allocate(n_bytes: int) -> Buffer:
    """Allocate huge-page memory. Raises OutOfMemory."""
    try:
        return _native.allocate_bytes(n_bytes)
    except MemoryError:
        raise OutOfMemory(
            f"the packed weights need {n_bytes / 1e9:.2f} GB of memory, which this machine cannot "
            "provide; use quant q4, a smaller model, or mmap"
        ) from None


def lock(buffer: Buffer) -> list[str]:
    """Lock the weights in memory. Return a notice if the system refuses."""
    try:
        _native.lock_bytes(buffer)
    except OSError as error:
        return [
            f"mlock: the system refuses to lock {buffer.size / 1e9:.2f} GB ({error.strerror}) and "
            "may move the weights out of memory; raise the limit (ulimit -l)"
        ]
    return []


def map_file(path: Path, offset: int, n_bytes: int) -> Buffer:
    """Map a file's bytes from `offset` on, for reading. Raises FileChanged, OSError."""
    with path.open("rb") as file:
        check_length(file, offset + n_bytes)
        mapping = mmap.mmap(file.fileno(), offset + n_bytes, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, np.uint8)[offset:]  # the array keeps the mapping alive


def read_file(path: Path, offset: int, n_bytes: int, n_threads: int) -> Buffer:
    """Read a file's bytes from `offset` on into huge-page memory.

    Several threads read, because one thread copies more slowly than the memory can stream. Raises
    FileChanged, OSError, OutOfMemory.
    """
    buffer = allocate(n_bytes)
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(n_threads) as workers:

        def read(first: int) -> None:
            part = buffer.data[first : first + READ_BYTES]
            while part:
                n = os.preadv(file.fileno(), [part], offset + first)
                if n == 0:
                    raise FileChanged
                first, part = first + n, part[n:]

        list(workers.map(read, range(0, n_bytes, READ_BYTES)))
    return buffer


class MappedOutput:
    """A new file's bytes from `offset` on, mapped for writing.

    What has been written is forced to the disk again and again. The system cannot drop pages that
    only memory holds, so if there were many, it would end a process with little memory.
    """

    def __init__(self, file: BinaryIO, offset: int, n_bytes: int) -> None:
        """The file already has its whole length. Raises OSError."""
        self._file = file.fileno()
        self._mapping = mmap.mmap(self._file, offset + n_bytes)
        self.buffer: Buffer = np.frombuffer(self._mapping, np.uint8)[offset:]
        self._lock = threading.Lock()
        self._unsynced = 0

    def written(self, n_bytes: int) -> None:
        """Count bytes that were written into the buffer. Any thread may call it. Raises OSError."""
        with self._lock:
            self._unsynced += n_bytes
            if self._unsynced >= SYNC_BYTES:
                self._unsynced = 0
                sync(self._file)


def write_in_parts(file: BinaryIO, buffer: Buffer) -> None:
    """Write the buffer, and force each part to the disk, for the same reason as MappedOutput."""
    for first in range(0, buffer.size, SYNC_BYTES):
        file.write(buffer[first : first + SYNC_BYTES].data)
        file.flush()
        sync(file.fileno())


def sync(file: int) -> None:
    """Force a file's content to the disk. Raises OSError."""
    getattr(os, "fdatasync", os.fsync)(file)


def check_length(file: BinaryIO, n_bytes: int) -> None:
    """Raises FileChanged if the file is shorter than `n_bytes`."""
    if os.fstat(file.fileno()).st_size < n_bytes:
        raise FileChanged


def copy_in_background(
    path: Path, offset: int, n_bytes: int, n_threads: int
) -> Buffer | BackgroundCopy:
    """Map a file and copy it into memory in the background.

    If this system cannot do that, read the file instead. Raises FileChanged, OSError, OutOfMemory.
    """
    try:
        return BackgroundCopy(path, offset, n_bytes)
    except OSError:
        return read_file(path, offset, n_bytes, n_threads)


class BackgroundCopy:
    """A file that is mapped first and copied into huge-page memory by a background thread.

    If the copy fails midway, the rest stays mapped and `notices` says so.
    """

    def __init__(self, path: Path, offset: int, n_bytes: int) -> None:
        """Raises FileChanged, and OSError if this system cannot replace mapped pages."""
        self._file = path.open("rb", buffering=0)
        try:
            check_length(self._file, offset + n_bytes)
            self._mapped = _native.map_file(self._file.fileno(), offset + n_bytes)
        except BaseException:
            self._file.close()
            raise
        self.buffer: Buffer = self._mapped[offset:]
        self.is_mapped = True  # at least a part
        self.notices: tuple[str, ...] = ()
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._move, name="hybrid-weights", daemon=True)
        self._thread.start()

    @property
    def is_copying(self) -> bool:
        """Whether the copy is still running."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the copy has finished or failed."""
        self._thread.join()

    def stop(self) -> None:
        """Stop the copy and leave the rest mapped."""
        self._stops.set()
        self._thread.join()

    def _move(self) -> None:
        size = self._mapped.size
        with self._file:
            for first in range(0, size, MOVE_BYTES):
                if self._stops.is_set():
                    return
                part = min(MOVE_BYTES, size - first)
                try:
                    _native.move_into_memory(self._mapped, first, part, self._file.fileno())
                except OSError as error:
                    self.notices = (
                        f"{size - first} of {size} bytes of weights stay mapped from disk, which "
                        f"may be slower: {error.strerror}",
                    )
                    return
            self.is_mapped = False
