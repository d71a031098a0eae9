"""What all formats share while they are written: counting bytes, and the rules about the target."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hybrid.errors import InvalidOption
from hybrid.progress import Progress


class Meter:
    """Reports how many bytes are written."""

    def __init__(self, task: str, total: int, progress: Progress) -> None:
        self._task, self._total, self._progress = task, max(total, 1), progress
        self._done = 0
        progress(task, 0, self._total)

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._progress(self._task, min(self._done, self._total), self._total)


def check_target(out: Path, sources: Iterable[Path], *, is_folder: bool, may_replace: bool) -> None:
    """Raise InvalidOption if `out` is of another kind, is the model itself, or may not be replaced.

    `sources` are the files that the model is read from, and its folder.
    """
    if not out.parent.is_dir():
        raise InvalidOption(f"{out}: there is no folder {str(out.parent)!r}; make it first")
    if any(_is_same(out, source) for source in sources):
        raise InvalidOption(f"{out}: is the model that is read; choose another name")
    if not out.exists():
        return
    if out.is_dir() != is_folder:
        kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise InvalidOption(f"{out}: expected the name of {kinds[0]}, and it is {kinds[1]}")
    if not may_replace and (not is_folder or any(out.iterdir())):
        raise InvalidOption(f"{out}: exists already; choose another name, or --force replaces it")


def _is_same(out: Path, source: Path) -> bool:
    return out.exists() and source.exists() and out.samefile(source)
