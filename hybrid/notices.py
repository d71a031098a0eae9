"""Notices: lines that a user should see, such as what is slower or was not applied, and why."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Sequence

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


class Notices:
    """Collects lines in order, each once. Functions that have something to say receive it."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = dict.fromkeys(lines)

    def add(self, *lines: str) -> None:
        self._lines.update(dict.fromkeys(lines))

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


def short_list(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, quoted, and the number of the others. Its length is bounded."""
    shown = ", ".join(map(_SHORT.repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
