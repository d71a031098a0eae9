"""Counts the bytes of all files of one download while they are written, for one Progress."""

from __future__ import annotations

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
        n_bytes = min(n_bytes, self._sizes[name])
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
