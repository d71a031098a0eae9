"""What identifies a model: its config and the whole content of its weight files.

Hashing gigabytes takes a second, so a model is hashed only if something needs its hash, all cores
share the work, and the result is remembered. A file counts as unchanged while its device, inode,
size, and times of modification and change are the same. The system sets the time of change itself,
so tools that set a file's modification time (`cp -p`, package stores) cannot hide a new content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import NamedTuple

from hybrid.errors import InvalidCheckpoint
from hybrid.files import open_file, read_bytes, write_atomically
from hybrid.limits import allowed_threads
from hybrid.model.config import ModelConfig
from hybrid.threads import map_on_threads
from predictors.schema import Malformed, integer, read_json, record, text

CHUNK_BYTES = 4 << 20  # hashed by one thread; a file's hash is that of its chunks' hashes
READ_BYTES = 256 << 10  # read at once, so that the bytes are hashed from the cache
# A file that changed so recently may change again without another time of change. File systems
# count in steps of up to two seconds.
SETTLED_NS = 2_000_000_000
_MEMORY_VERSION = 1
_NOT_WEIGHTS = ("bos_id", "eos_ids")  # fields of a config that do not affect what weights compute


class SourceFile(NamedTuple):
    """What identifies the state of a file."""

    name: str
    n_bytes: int
    modified_ns: int
    changed_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        return cls._of(path.name, path.stat())

    @classmethod
    def _of(cls, name: str, stat: os.stat_result) -> SourceFile:
        times = stat.st_mtime_ns, stat.st_ctime_ns
        return cls(name, stat.st_size, *times, stat.st_dev, stat.st_ino)


class _Stopped(Exception):
    """The caller no longer needs the hash."""


class ModelIdentity:
    """The hash of a model, computed when it is first needed. Threads may share it."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        sources: tuple[SourceFile, ...],
        memory: Path | None = None,
    ) -> None:
        """`sources` must have been recorded before the weights were opened. `memory` is the folder
        in which hashes of files are remembered; None remembers nothing.
        """
        self.folder, self.config, self.sources, self.memory = folder, config, sources, memory
        self._lock = threading.Lock()
        self._stops = threading.Event()
        self._hash: str | None = None

    @property
    def weights_hash(self) -> str:
        """SHA-256 that identifies the model, independent of its folder.

        It covers the config, and the name, size and content of each file of weights. Raises
        InvalidCheckpoint if a file cannot be read, or is no longer the one that was opened.
        """
        with self._lock:
            if self._hash is None:
                self._hash = self._compute()
            return self._hash

    @property
    def is_hashed(self) -> bool:
        """Whether the hash is known, so that no weights need be read for it."""
        if self._hash is not None:
            return True
        return all(self._remembered(source) is not None for source in self.sources)

    @contextlib.contextmanager
    def hashing(self) -> Iterator[None]:
        """Hash in the background while the body runs. Raises what `weights_hash` raises.

        Then the files are what they were when they were opened, even if the hash was known before.
        If the body raises, or the wait for the hash is interrupted, hashing stops.
        """
        worker = ThreadPoolExecutor(1, "hybrid-hash")
        try:
            future = worker.submit(lambda: self.weights_hash)
        except RuntimeError:  # the system starts no further thread
            future = None
        try:
            yield
            if future is None:
                _ = self.weights_hash
            else:
                future.result()
        except BaseException:
            self._stops.set()
            try:
                worker.shutdown(cancel_futures=True)
            finally:
                self._stops.clear()
            raise
        worker.shutdown(cancel_futures=True)
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises InvalidCheckpoint if a file is no longer the one that was opened."""
        for source in self.sources:
            path = self.folder / source.name
            try:
                is_same = SourceFile.of(path) == source
            except OSError as error:
                raise InvalidCheckpoint(f"{path}: {error.strerror}") from error
            if not is_same:
                raise _changed(path)

    def _compute(self) -> str:
        digest = hashlib.sha256(_describe(self.config).encode())
        for source in self.sources:
            content = self._remembered(source)
            if content is None:
                content = self._hash_file(source)
                self._remember(source, content)
            digest.update(f"\0{source.name}\0{source.n_bytes}\0{content}".encode())
        self.check_unchanged()
        return digest.hexdigest()

    def _hash_file(self, source: SourceFile) -> str:
        path = self.folder / source.name
        try:
            with open_file(path) as file:
                if SourceFile._of(source.name, os.fstat(file.fileno())) != source:
                    raise _changed(path)
                return hash_content(file.fileno(), source.n_bytes, self._stops)
        except OSError as error:
            raise InvalidCheckpoint(f"{path}: {error.strerror}") from error

    def _memory_path(self, source: SourceFile) -> Path | None:
        if self.memory is None:
            return None
        return self.memory / f"{source.device:x}-{source.inode:x}.json"

    def _remembered(self, source: SourceFile) -> str | None:
        path = self._memory_path(source)
        if path is None:
            return None
        try:
            found = read_json(read_bytes(path, 4096), _REMEMBERED)
        except (OSError, Malformed):
            return None
        state = {key: found[key] for key in ("n_bytes", "modified_ns", "changed_ns")}
        is_same = all(getattr(source, key) == value for key, value in state.items())
        return found["content"] if is_same and found["version"] == _MEMORY_VERSION else None

    def _remember(self, source: SourceFile, content: str) -> None:
        """Keep a file's hash, unless the file is too fresh. Without a home it is hashed again."""
        path = self._memory_path(source)
        if path is None or time.time_ns() - source.changed_ns < SETTLED_NS:
            return
        known = {
            "version": _MEMORY_VERSION,
            "n_bytes": source.n_bytes,
            "modified_ns": source.modified_ns,
            "changed_ns": source.changed_ns,
            "content": content,
        }
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known).encode())


_REMEMBERED = record(
    {
        **dict.fromkeys(("version", "n_bytes"), integer()),
        **dict.fromkeys(("modified_ns", "changed_ns"), integer(-(2**63), 2**63)),
        "content": text(64),
    }
)


def hash_content(descriptor: int, n_bytes: int, stops: threading.Event | None = None) -> str:
    """Return the SHA-256 of the SHA-256 of each chunk of an open file.

    All cores that this process may use share the work. Raises OSError if the file is shorter than
    `n_bytes`.
    """
    local = threading.local()

    def hash_chunk(first: int) -> bytes:
        if stops is not None and stops.is_set():
            raise _Stopped
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(READ_BYTES))
        chunk, end = hashlib.sha256(), min(first + CHUNK_BYTES, n_bytes)
        while first < end:
            n = os.preadv(descriptor, [local.buffer[: end - first]], first)
            if n == 0:
                raise OSError(0, "became shorter while it was read")
            chunk.update(local.buffer[:n])
            first += n
        return chunk.digest()

    firsts = range(0, n_bytes, CHUNK_BYTES)
    digest = hashlib.sha256()
    n_threads = min(allowed_threads(), len(firsts))
    for part in map_on_threads(hash_chunk, firsts, n_threads or 1):
        digest.update(part)
    return digest.hexdigest()


def _describe(config: ModelConfig) -> str:
    """Return the config's fields as text.

    A field that holds its default is left out. So a field that a later version adds, with a default
    that means what was computed before, does not change the hash of a model.
    """
    values = asdict(config)
    described = {}
    for field in fields(config):
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        if field.name not in _NOT_WEIGHTS and (
            default is MISSING or getattr(config, field.name) != default
        ):
            described[field.name] = values[field.name]
    return json.dumps(described, sort_keys=True, default=repr)


def _changed(path: Path) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{path}: was changed or replaced while it was read; load the model again"
    )
