"""Memory for the bytes of a packed file: mapped, copied, or mapped first and copied later.

Whichever way the bytes come, their checksums are compared: at once if they are read, and otherwise
by a background thread while the model is already in use.

Huge-page memory of our own is read fastest, but copying a gigabyte into it takes a second. So the
file is mapped first, which takes no time. A thread then copies it in the background, part by part,
to the same addresses.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hybrid.errors import InvalidArtifact, OutOfMemory
from hybrid.files import open_file
from hybrid.kernels import _native
from hybrid.threads import map_on_threads
from hybrid.weights.packed_rows import Buffer

READ_BYTES = 32 << 20  # bytes of one read
CHECK_BYTES = 1 << 20  # read at once to be checked only: little, and checked from the cache
MOVE_BYTES = 16 << 20  # bytes copied at once in the background; whole huge pages
# The background's work begins so late that a first short prompt has all cores and the memory's
# whole speed: its answer then begins 0.25 to 0.4 s earlier (1B, two cores).
BACKGROUND_DELAY_S = 0.5
SYNC_BYTES = 32 << 20  # bytes written before they are forced to the disk


class FileChanged(Exception):
    """The file became shorter after its size was checked."""


class FileDamaged(Exception):
    """Bytes of the file differ from those that were packed. The message is for the user."""


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


def map_file(path: Path, offset: int, checksums: Checksums) -> tuple[Buffer, BackgroundCheck]:
    """Map a file's bytes from `offset` on, for reading, and check them in the background.

    Raises FileChanged, OSError.
    """
    n_bytes = offset + checksums.spans[-1].end
    file = open_file(path)
    try:
        check_length(file, n_bytes)
        mapping = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
    except BaseException:
        file.close()
        raise
    buffer = np.frombuffer(mapping, np.uint8)[offset:]  # the array keeps the mapping alive
    return buffer, BackgroundCheck(file, offset, checksums)


def read_file(path: Path, offset: int, checksums: Checksums, n_threads: int) -> Buffer:
    """Read a file's bytes from `offset` on into huge-page memory, and check them.

    Several threads read, because one thread copies more slowly than the memory can stream. Raises
    FileChanged, FileDamaged, OSError, OutOfMemory.
    """
    n_bytes = checksums.spans[-1].end
    buffer = allocate(n_bytes)
    with open_file(path) as file:

        def read(first: int) -> None:
            part = buffer.data[first : first + READ_BYTES]
            while part:
                n = os.preadv(file.fileno(), [part], offset + first)
                if n == 0:
                    raise FileChanged
                first, part = first + n, part[n:]

        list(map_on_threads(read, range(0, n_bytes, READ_BYTES), n_threads))
    check_all(buffer, checksums, n_threads)
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
    path: Path, offset: int, checksums: Checksums, n_threads: int
) -> Buffer | BackgroundCopy:
    """Map a file, and copy it into memory and check it in the background.

    If this system cannot do that, read the file instead. Raises FileChanged, FileDamaged, OSError,
    OutOfMemory.
    """
    try:
        return BackgroundCopy(path, offset, checksums)
    except OSError:
        return read_file(path, offset, checksums, n_threads)


class Span(NamedTuple):
    """A stretch of packed weights, and what its bytes must be."""

    name: str
    first: int  # byte in the buffer
    end: int
    crc: int


class Checksums(NamedTuple):
    """The spans of a packed file, which cover its buffer in order."""

    path: Path
    spans: tuple[Span, ...]

    def damage(self, name: str, todo: str) -> str:
        return (
            f"{self.path}: the packed weights {name!r} are damaged: their checksum differs; {todo}"
        )


def checksums_of(buffer: Buffer, spans: Iterable[tuple[int, int]], n_threads: int = 1) -> list[int]:
    """Return the CRC-32 of each span (first, end) of a buffer."""

    def checksum(span: tuple[int, int]) -> int:
        return _native.crc32(buffer[span[0] : span[1]])

    return list(map_on_threads(checksum, spans, n_threads))


def check_all(buffer: Buffer, checksums: Checksums, n_threads: int) -> None:
    """Raises FileDamaged if the buffer is not what was packed."""
    places = [(span.first, span.end) for span in checksums.spans]
    for span, crc in zip(checksums.spans, checksums_of(buffer, places, n_threads), strict=True):
        if crc != span.crc:
            raise FileDamaged(checksums.damage(span.name, "they were packed again"))


class BackgroundCheck:
    """Checks a packed file's bytes in a background thread, or at once if the system starts none.

    The thread begins after `BACKGROUND_DELAY_S`, or when it is waited for.

    `damage` says what is wrong, if anything is. The damaged file is then removed, so that the next
    load packs the model again.
    """

    def __init__(self, file: BinaryIO, offset: int, checksums: Checksums) -> None:
        """`file` is open, and is closed when the work has ended."""
        self._file, self._offset, self._checksums = file, offset, checksums
        self.is_mapped = True  # at least a part
        self.notices: tuple[str, ...] = ()
        self.damage: str | None = None
        self._running = _RunningCheck(checksums)
        self._stops, self._is_awaited = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="hybrid-weights", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system starts no further thread
            self._is_awaited.set()
            self._work()

    @property
    def is_copying(self) -> bool:
        """Whether bytes are still being copied into memory."""
        return False

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all bytes have been checked, or the first damage was found.

        Return whether that is so: after `seconds` the wait ends.
        """
        self._is_awaited.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop, and leave the rest unchecked."""
        self._stops.set()
        self.wait()

    def raise_damage(self) -> None:
        """Raises InvalidArtifact if damage has been found."""
        if self.damage is not None:
            raise InvalidArtifact(self.damage)

    def _work(self) -> None:
        try:
            with self._file:
                self._is_awaited.wait(BACKGROUND_DELAY_S)
                self._run()
        except Exception as error:  # weights that could not be checked do not count as sound
            self.damage = f"{self._checksums.path}: could not be checked: {error!r}"

    def _run(self) -> None:
        self._check_file()

    def _check_file(self) -> None:
        """Read the bytes that were not checked yet. A file that shrinks is no danger here."""
        end = self._checksums.spans[-1].end
        buffer = np.empty(min(CHECK_BYTES, end), np.uint8)
        while self._running.at < end and not self._stops.is_set():
            part = buffer[: min(buffer.size, end - self._running.at)]
            try:
                n = os.preadv(self._file.fileno(), [part.data], self._offset + self._running.at)
            except OSError as error:
                self.damage = f"{self._checksums.path}: cannot be read: {error.strerror}"
                return
            damaged = self._running.add(part[:n]) if n else self._running.name
            if damaged is not None:
                self._report(damaged)
                return

    def _report(self, name: str) -> None:
        todo = "load the model again, which packs them again"
        try:
            # Another process may have replaced the file meanwhile.
            if os.path.samestat(os.fstat(self._file.fileno()), self._checksums.path.stat()):
                self._checksums.path.unlink()
        except OSError:
            todo = "delete the file and load the model again, which packs them again"
        self.damage = self._checksums.damage(name, todo)


class _RunningCheck:
    """Compares checksums of bytes that come in order."""

    def __init__(self, checksums: Checksums) -> None:
        self._spans, self._index, self._crc = checksums.spans, 0, 0
        self.at = 0  # byte of the buffer that comes next

    @property
    def name(self) -> str:
        """The name of the span that is being added, which must not have ended."""
        return self._spans[self._index].name

    def add(self, part: Buffer) -> str | None:
        """Add bytes. Return the name of a span that ended and is damaged."""
        while part.size:
            span = self._spans[self._index]
            n = min(part.size, span.end - self.at)
            self._crc = _native.crc32(part[:n], self._crc)
            self.at += n
            part = part[n:]
            if self.at == span.end:
                if self._crc != span.crc:
                    return span.name
                self._index, self._crc = self._index + 1, 0
        return None


class BackgroundCopy(BackgroundCheck):
    """A file that is mapped first, and copied into huge-page memory and checked by a background
    thread.

    If the copy fails midway, the rest stays mapped and `notices` says so. It is checked all the
    same.
    """

    def __init__(self, path: Path, offset: int, checksums: Checksums) -> None:
        """Raises FileChanged, and OSError if this system cannot replace mapped pages."""
        n_bytes = offset + checksums.spans[-1].end
        file = open_file(path)
        try:
            check_length(file, n_bytes)
            self._mapped = _native.map_file(file.fileno(), n_bytes)
        except BaseException:
            file.close()
            raise
        self.buffer: Buffer = self._mapped[offset:]
        super().__init__(file, offset, checksums)

    @property
    def is_copying(self) -> bool:
        return self.is_mapped and self._thread.is_alive()

    def _run(self) -> None:
        size = self._mapped.size
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
                self._check_file()
                return
            # What was copied is checked, not what is in the file: it is what is used.
            moved = self._mapped[max(first, self._offset) : first + part]
            damaged = self._running.add(moved)
            if damaged is not None:
                self._report(damaged)
                return
        self.is_mapped = False
