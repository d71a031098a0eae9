"""Counts the bytes of all files of one download while they are written, for one Progress.

huggingface_hub counts each file separately, starts from zero at every attempt, and draws a bar of
its own. It gets a bar that does nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from hybrid.progress import Progress


class CallerRaised(BaseException):
    """Carries an error of the caller's Progress past `except Exception` and `except OSError`.

    Such an error comes neither from the network nor from the disk.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error


class Tally:
    """Adds up the bytes that are here and the sizes of all files, and reports to a Progress."""

    def __init__(self, task: str, sizes: dict[str, tuple[int, int]], progress: Progress) -> None:
        self._task = task
        self._done = {name: done for name, (done, _) in sizes.items()}
        self._sizes = {name: size for name, (_, size) in sizes.items()}
        self._progress = progress
        self._tell()

    def file_has(self, name: str, n_bytes: int) -> None:
        n_bytes = min(n_bytes, self._sizes[name])  # an unknown size is 0
        if n_bytes != self._done[name]:
            self._done[name] = n_bytes
            self._tell()

    def file_is_whole(self, name: str) -> None:
        self.file_has(name, self._sizes[name])

    def _tell(self) -> None:
        try:
            self._progress(self._task, sum(self._done.values()), sum(self._sizes.values()))
        except Exception as error:
            raise CallerRaised(error) from error


class ToldFile(io.BufferedWriter):
    """A file opened for appending that reports its length after each write.

    It accepts at most `max_bytes`. huggingface_hub checks the size only at the end, and a server
    may send for ever. Raises OSError beyond that.
    """

    def __init__(
        self, path: Path, max_bytes: int | None, tell_length: Callable[[int], None]
    ) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._max_bytes = max_bytes
        self._tell_length = tell_length

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        n_bytes = super().write(data)
        length = self.tell()
        if self._max_bytes is not None and length > self._max_bytes:
            raise OSError(f"the server sends more than the {self._max_bytes:,} bytes it announced")
        self._tell_length(length)
        return n_bytes


class SilentBar:
    """A bar that shows nothing, in place of huggingface_hub's own."""

    def update(self, n_bytes: int) -> None:
        pass
