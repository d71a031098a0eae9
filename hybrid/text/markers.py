"""Markers: the texts that separate messages in a prompt, and texts of a user that spell them.

While a chat template runs, each character of a user's text that could be part of a marker is
replaced by a character that no text can contain (a lone surrogate). In the rendered prompt, markers
of the template and imitations are then distinguished by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hybrid.errors import UnsupportedModel

_FIRST_TWIN, _LAST_TWIN = 0xD800, 0xDFFE  # lone surrogates; the last one, 0xDFFF, marks an end
_TWINS = re.compile("[\ud800-\udffe]")
Span = tuple[int, int]  # characters [first, last) of a text


class MarkedText(NamedTuple):
    """A text, and where it has markers. The spans are in order."""

    text: str
    genuine: Sequence[Span] = ()  # written by a template
    imitated: Sequence[Span] = ()  # spelled by a message; they may overlap


class Markers:
    """The control texts of a model and a template: special tokens, and what the template writes."""

    def __init__(self, texts: Iterable[str], of_answers: Iterable[str] = ()) -> None:
        """An answer may contain `of_answers`, such as <think>, which models write themselves.

        Nobody else's text may. Raises UnsupportedModel for more than 2,000 different characters.
        """
        own = set(of_answers)
        self._all, self._others = _Finder({*texts, *own}), _Finder(set(texts) - own)
        characters = sorted({c for text in self._all.texts for c in text if not c.isspace()})
        if len(characters) > _LAST_TWIN - _FIRST_TWIN:
            raise UnsupportedModel("the special tokens have more than 2,000 different characters")
        self._twins = {char: chr(_FIRST_TWIN + n) for n, char in enumerate(characters)}
        self._originals = {twin: char for char, twin in self._twins.items()}

    @property
    def texts(self) -> tuple[str, ...]:
        """The markers, the longest first."""
        return self._all.texts

    def taint(self, text: str, *, is_answer: bool = False) -> str:
        """Replace what could be part of a marker, here or together with the text around it."""
        places = (self._others if is_answer else self._all).places(text)
        if not places:
            return text
        characters = list(text)
        for first, last in places:
            for at in range(first, last):
                characters[at] = self._twins.get(text[at], text[at])
        return "".join(characters)

    def taint_all(self, value: Any, *, is_answer: bool = False) -> Any:
        """Return a copy of JSON data with its texts tainted, and keys if they spell a marker.

        A field "type" holds a word of JSON schemas or of chats, such as "function", which templates
        compare.
        """
        if isinstance(value, str):
            return self.taint(value, is_answer=is_answer)
        if isinstance(value, list):
            return [self.taint_all(item, is_answer=is_answer) for item in value]
        if isinstance(value, dict):
            return {
                self.taint(key) if self._all.next(key) else key: item
                if key == "type" and isinstance(item, str) and item.isalpha()
                else self.taint_all(item, is_answer=is_answer)
                for key, item in value.items()
            }
        return value

    def restore(self, text: str) -> str:
        """Return the text with the original characters; every one keeps its position."""
        return _TWINS.sub(lambda match: self._originals[match[0]], text)

    def read(self, tainted: str) -> MarkedText:
        """Return a rendered text with the places of its markers."""
        genuine = self._all.spans(tainted)
        text = self.restore(tainted)
        return MarkedText(text, genuine, self._imitations(text, genuine, has_any=text != tainted))

    def _imitations(self, text: str, genuine: list[Span], *, has_any: bool) -> list[Span]:
        if not has_any:
            return []
        known = set(genuine)
        found: list[Span] = []
        at = 0
        while span := self._all.next(text, at):
            if span in known:
                at = span[1]
            else:
                found.append(span)
                at = span[0] + 1  # another may begin inside
        return found


class _Finder:
    """Finds markers in texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        markers = sorted({text for text in texts if text.strip()}, key=lambda t: (-len(t), t))
        self.texts: tuple[str, ...] = tuple(markers)
        pattern = "|".join(map(re.escape, markers)) or "(?!)"
        self._anywhere = re.compile(f"(?=({pattern}))")  # overlapping ones, too
        self._pattern = re.compile(pattern)
        self._beginnings = {text[:n] for text in markers for n in range(1, len(text))}
        self._ends = {text[n:] for text in markers for n in range(1, len(text))}
        self._joined = "\0".join(markers)
        self._longest = max(map(len, markers), default=0)

    def spans(self, text: str) -> list[Span]:
        """Return where the text has markers; of several that begin at a place, the longest."""
        return [match.span() for match in self._pattern.finditer(text)]

    def next(self, text: str, at: int = 0) -> Span | None:
        match = self._pattern.search(text, at)
        return match.span() if match else None

    def places(self, text: str) -> list[Span]:
        """Return what could be part of a marker, here or together with the text around it."""
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
        return places
