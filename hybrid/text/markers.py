"""Markers: the texts that separate messages in a prompt, and texts of a user that spell them.

While a chat template runs, each character of a user's text that could be part of a marker is
replaced by a character that no text can contain (a lone surrogate). In the rendered prompt, markers
of the template and imitations are then distinguished by position.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from hybrid.errors import UnsupportedModel

_FIRST_TWIN, _LAST_TWIN = 0xD800, 0xDFFE  # lone surrogates; the last one, 0xDFFF, marks an end
_TWINS = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u[d][89a-f][0-9a-f]{2}")
# Values of fields named "type", which templates compare.
_TYPES = frozenset(("array", "boolean", "function", "integer", "null", "number", "object"))
_TYPES |= {"string", "text"}
_MAX_TOTAL = 20_000_000  # of the squares of the markers' lengths, which the work on them takes
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
        texts, own = set(texts), set(of_answers)
        if sum(len(text) ** 2 for text in texts | own) > _MAX_TOTAL:
            raise UnsupportedModel("the special tokens are too long or too many")
        self._all, self._others = _Finder({*texts, *own}), _Finder(set(texts) - own)
        characters = sorted({c for text in self._all.texts for c in text if not c.isspace()})
        if len(characters) > _LAST_TWIN - _FIRST_TWIN:
            raise UnsupportedModel("the special tokens have more than 2,000 different characters")
        self._twins = {char: chr(_FIRST_TWIN + n) for n, char in enumerate(characters)}
        # The words of markers are words of texts, too. Their other characters are rare there.
        own_characters = set("".join(own))
        signs = {char: twin for char, twin in self._twins.items() if not char.isalnum()}
        self._signs = str.maketrans(signs)
        self._signs_of_answers = str.maketrans(
            {char: twin for char, twin in signs.items() if char not in own_characters}
        )
        self._originals = {twin: char for char, twin in self._twins.items()}

    @property
    def texts(self) -> tuple[str, ...]:
        """The markers, the longest first."""
        return self._all.texts

    def taint(self, text: str, *, is_answer: bool = False, is_said: bool = False) -> str:
        """Replace what could be part of a marker, here or together with the text around it.

        In what is said in a message, also every sign that markers have: a template that changes the
        case, removes parts or decodes HTML could make a marker of other characters.
        """
        places = (self._others if is_answer else self._all).places(text)
        if places:
            characters = list(text)
            for first, last in places:
                for at in range(first, last):
                    characters[at] = self._twins.get(text[at], text[at])
            text = "".join(characters)
        if not is_said:
            return text
        return text.translate(self._signs_of_answers if is_answer else self._signs)

    def has_word(self, word: str) -> bool:
        """Return whether a marker is this word between signs, such as <|word|>."""
        return any(re.sub(r"^\W+|\W+$", "", text) == word for text in self._all.texts)

    def is_escaped(self, text: str, given: object) -> bool:
        """Return whether a text has escapes, such as \\ud800, of what was tainted in `given`."""
        escapes = set(_ESCAPE.findall(text.lower()))
        if not escapes:
            return False
        parts = "".join(_strings(given))
        return any(
            chr(int(escape[2:], 16)) in parts and escape not in parts.lower() for escape in escapes
        )

    def taint_all(self, value: Any, *, is_answer: bool = False, is_said: bool = False) -> Any:
        """Return a copy of JSON data with its texts tainted, and keys if they spell a marker.

        A field "type" holds a word of JSON schemas or of chats, such as "function", which templates
        compare.
        """
        if isinstance(value, str):
            return self.taint(value, is_answer=is_answer, is_said=is_said)
        if isinstance(value, list):
            return [self.taint_all(item, is_answer=is_answer, is_said=is_said) for item in value]
        if isinstance(value, dict):
            return {
                self.taint(key) if self._all.next(key) else key: item
                if key == "type" and isinstance(item, str) and item in _TYPES
                else self.taint_all(item, is_answer=is_answer, is_said=is_said)
                for key, item in value.items()
            }
        return value

    def restore(self, text: str) -> str:
        """Return the text with the original characters; every one keeps its position."""
        return _TWINS.sub(lambda match: self._originals.get(match[0], "\ufffd"), text)

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


def _strings(value: object) -> Iterator[str]:
    """Yield all texts in JSON data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
