"""Markers: the texts that separate messages in a prompt, and texts of a user that spell them.

While a chat template runs, each character of a user's text that could be part of a marker is
replaced by a character that no text can contain (a lone surrogate). In the rendered prompt, markers
of the template and imitations are then told apart by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hybrid.errors import UnsupportedModel

_FIRST_TWIN, _LAST_TWIN = 0xD800, 0xDFFE  # lone surrogates; the last one, 0xDFFF, marks an end
Span = tuple[int, int]  # characters [first, last) of a text


class Markers:
    """The control texts of a model and a template: special tokens, and what the template writes."""

    def __init__(self, texts: Iterable[str]) -> None:
        markers = sorted(
            {text for text in texts if text.strip()}, key=lambda text: (-len(text), text)
        )
        self.texts: tuple[str, ...] = tuple(markers)
        pattern = "|".join(map(re.escape, markers)) or "(?!)"
        self._anywhere = re.compile(f"(?=({pattern}))")  # overlapping ones, too
        self._next = re.compile(pattern)
        characters = sorted({char for text in markers for char in text if not char.isspace()})
        if len(characters) > _LAST_TWIN - _FIRST_TWIN:
            raise UnsupportedModel("the special tokens have more than 2,000 different characters")
        twins = {char: chr(_FIRST_TWIN + n) for n, char in enumerate(characters)}
        self._twins = twins
        self._originals = str.maketrans({twin: char for char, twin in twins.items()})
        self._has_twin = re.compile(f"[\\u{_FIRST_TWIN:x}-\\u{_LAST_TWIN:x}]")
        self._beginnings = {text[:n] for text in markers for n in range(1, len(text))}
        self._ends = {text[n:] for text in markers for n in range(1, len(text))}
        self._joined = "\0".join(markers)
        self._longest = max(map(len, markers), default=0)

    def taint(self, text: str) -> str:
        """Replace what could be part of a marker, here or together with the text around it."""
        places = [match.span(1) for match in self._anywhere.finditer(text)]
        left, right = len(text) - len(text.lstrip()), len(text.rstrip())
        inner = text[left:right]
        if inner and len(inner) < self._longest and inner in self._joined:
            places.append((left, right))
        for n in range(1, min(self._longest, len(inner) + 1)):
            if inner[:n] in self._ends:
                places.append((left, left + n))
            if inner[-n:] in self._beginnings:
                places.append((right - n, right))
        if not places:
            return text
        characters = list(text)
        for first, last in places:
            for at in range(first, last):
                characters[at] = self._twins.get(text[at], text[at])
        return "".join(characters)

    def taint_all(self, value: Any) -> Any:
        """Return a copy of JSON data with its texts tainted, and keys if they spell a marker."""
        if isinstance(value, str):
            return self.taint(value)
        if isinstance(value, list):
            return [self.taint_all(item) for item in value]
        if isinstance(value, dict):
            return {
                self.taint(key) if self._next.search(key) else key: self.taint_all(item)
                for key, item in value.items()
            }
        return value

    def restore(self, text: str) -> str:
        """Return the text with the original characters; every one keeps its position."""
        return text.translate(self._originals)

    def is_tainted(self, text: str) -> bool:
        return self._has_twin.search(text) is not None

    def spans(self, text: str) -> list[Span]:
        """Return where the text has markers; of several that begin at a place, the longest."""
        return [match.span() for match in self._next.finditer(text)]

    def imitations(self, tainted: str) -> list[Span]:
        """Return where a rendered text spells markers that the template did not write."""
        if not self.is_tainted(tainted):
            return []
        genuine = set(self.spans(tainted))
        found: list[Span] = []
        text = self.restore(tainted)
        at = 0
        while match := self._next.search(text, at):
            span = match.span()
            if span not in genuine:
                found.append(span)
                at = span[0] + 1  # another may begin inside
            else:
                at = span[1]
        return found
