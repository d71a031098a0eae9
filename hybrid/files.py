"""Files that are opened safely, and files that appear under their name only when complete."""

from __future__ import annotations

import contextlib
import glob
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from predictors.reading import open_file, read_bytes, read_safetensors

__all__ = [
    "has_files",
    "open_file",
    "read_bytes",
    "read_safetensors",
    "replacing",
    "write_atomically",
]

_ABANDONED_S = 3600  # older temporary files are deleted; no writing takes that long


def has_files(folder: Path) -> bool:
    """Return whether anything is in a folder that need not exist."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


@contextlib.contextmanager
def replacing(path: Path, n_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` if the body ends without an exception.

    Several processes may write at once: each has a temporary file of its own, and the last one
    wins. `n_bytes` of disk space are reserved first, so that a full disk raises OSError before any
    work and leaves no partial file. Raises OSError, also if the folder does not exist.
    """
    # A killed process leaves its temporary file.
    for abandoned in path.parent.glob(f".{glob.escape(path.stem)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > _ABANDONED_S:
                abandoned.unlink()
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w+b") as file:
            if n_bytes:
                file.truncate(n_bytes)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, or replace it. A reader sees the old content or the new. Raises OSError."""
    with replacing(path) as file:
        file.write(content)
