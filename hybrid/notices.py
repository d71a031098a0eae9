"""Notices: lines that a user should see, such as what is slower or was not applied, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


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
