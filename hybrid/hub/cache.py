"""Writes into huggingface_hub's cache, and nowhere else.

Other programs and users may write there too. A link in it may lead anywhere, so nothing is written,
emptied or removed through a link that leads out of the cache. The cache's own folder may be a link:
the user chose it.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

from hybrid.errors import DownloadFailed
from hybrid.hub.transfer import BadAnswer


def make_folder(folder: Path, cache: Path) -> None:
    """Make a folder of the cache, or accept it. Raises DownloadFailed if it is outside."""
    if not is_inside(folder, cache):
        raise DownloadFailed(
            f"{folder} leads to {folder.resolve()}, out of the cache {cache}, so nothing is "
            "written there. Remove that link, or set HF_HOME to the folder that is meant."
        )
    folder.mkdir(parents=True, exist_ok=True)


def is_inside(path: Path, cache: Path) -> bool:
    """Return whether a path is in the cache after all its links are followed."""
    return path.resolve().is_relative_to(cache.resolve())


def discard(path: Path, cache: Path) -> None:
    """Remove a file of the cache, and what it links to if that is in the cache. Raises OSError."""
    target = path.resolve()  # a blob may be a link into the cache's store of shared blobs
    for file in (target, path):
        if is_inside(file.parent, cache):
            file.unlink(missing_ok=True)


def length_of_partial(path: Path) -> int:
    """Return the bytes of a partial file; 0 if it is missing or cannot be continued."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_size if _is_our_own(status) else 0


def _is_our_own(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1  # neither a link nor a device


class PartialFile(io.BufferedWriter):
    """A partial file, opened for appending, that reports its length after each write.

    It is a regular file of one name. Anything else in its place, such as a link, is replaced. It
    accepts at most `max_bytes`, since a server may send for ever, and raises BadAnswer beyond that.
    """

    def __init__(self, path: Path, max_bytes: int, tell_length: Callable[[int], None]) -> None:
        if length_of_partial(path) == 0:
            path.unlink(missing_ok=True)
        super().__init__(io.FileIO(path, "ab", opener=_open_without_links))
        self._max_bytes = max_bytes
        self._tell_length = tell_length
        if self.tell() > max_bytes:
            self.restart()

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        length = self.tell() + len(data)
        if length > self._max_bytes:
            raise BadAnswer(
                f"the server sends more than the {self._max_bytes:,} bytes it announced"
            )
        super().write(data)
        self._tell_length(length)
        return len(data)

    def restart(self) -> None:
        """Forget all bytes."""
        self.seek(0)
        self.truncate()
        self._tell_length(0)


def _open_without_links(path: str, flags: int) -> int:
    # Windows has neither flag. O_NONBLOCK: opening a pipe would wait for its reader.
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    if not _is_our_own(os.fstat(descriptor)):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor
