"""Checks what our own JSON holds: a file's fields are declared once, and read through this.

    PLAN = record({"version": integer(1, 1), "layers": list_of(LAYER)}, optional={"name": text()})
    plan = read_json(content, PLAN)

A check is a function that returns the value, or raises Malformed. Every other mistake that a file
can hold is also Malformed: broken JSON, deep nesting, a name that occurs twice, NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

Check = Callable[[Any], Any]


class Malformed(ValueError):
    """A value is not what was declared. The message says where, what was expected and found."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(f"{where.lstrip('.')}: {what}" if where else what)
        self.what, self.where = what, where

    def within(self, place: str) -> Malformed:
        return Malformed(self.what, place + self.where)


def parse_json(content: bytes | str, *, keeps_constants: bool = False) -> Any:
    """Parse UTF-8 JSON. Raises Malformed, also for NaN and Infinity unless `keeps_constants`."""
    constant = None if keeps_constants else _refuse
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, parse_constant=constant, object_pairs_hook=_unique)
    except Malformed:
        raise
    except RecursionError:
        raise Malformed("is not sound JSON: it is nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"is not JSON: {error}") from error


def read_json(content: bytes | str, check: Check) -> Any:
    """Parse JSON and check it. Raises Malformed."""
    return check(parse_json(content))


def field_of(value: Any, name: str) -> Any:
    """Return a field of what may not be an object; None: there is none.

    A file's version is read so, before the rest is checked: another version has other fields.
    """
    return value.get(name) if isinstance(value, dict) else None


def anything(value: Any) -> Any:
    return value


def boolean(value: Any) -> bool:
    if type(value) is not bool:
        _fail("true or false", value)
    return value


def integer(least: int = 0, most: int = 2**62) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            _fail(f"an integer from {least} to {most}" if most < 2**62 else "a count", value)
        return value

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """Return a check of finite numbers from `least` to `most`."""

    def check(value: Any) -> float:
        try:
            is_sound = type(value) in (int, float) and math.isfinite(value)
        except OverflowError:  # an integer beyond the range of floats
            is_sound = False
        if not is_sound or not least <= value <= most:
            expected = "a finite number"
            if least > -math.inf:
                limit = f" to {most:g}" if most < math.inf else " on"
                expected = f"a number from {least:g}{limit}"
            _fail(expected, value)
        return value

    return check


def text(max_length: int = 10_000) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > max_length:
            _fail("text", value)
        return value

    return check


def nullable(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def list_of(check: Check, least: int = 0, most: int = 1_000_000) -> Check:
    """Return a check of lists of `least` to `most` elements."""

    def check_list(value: Any) -> list[Any]:
        if type(value) is not list or not least <= len(value) <= most:
            _fail("a list" if most == 1_000_000 else f"a list of {least} to {most}", value)
        return [_at(f"[{index}]", check, element) for index, element in enumerate(value)]

    return check_list


def mapping(check_key: Callable[[str], Any], check: Check, least: int = 0) -> Check:
    """Return a check of objects with any keys; `check_key` returns what a key stands for."""

    def check_mapping(value: Any) -> dict[Any, Any]:
        if type(value) is not dict or len(value) < least:
            _fail("an object", value)
        found = {
            _at(f".{key:.40}", check_key, key): _at(f".{key:.40}", check, element)
            for key, element in value.items()
        }
        if len(found) < len(value):
            raise Malformed("has two names for one key")
        return found

    return check_mapping


def record(
    required: Mapping[str, Check],
    optional: Mapping[str, Check] | None = None,
    *,
    others: Check | None = None,
) -> Check:
    """Return a check of objects with these fields. `others` checks further fields; None: none."""
    known = {**required, **(optional or {})}

    def check_record(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            _fail("an object", value)
        missing = [name for name in required if name not in value]
        if missing:
            raise Malformed(f"lacks {', '.join(missing)}")
        found = {}
        for name, element in value.items():
            check = known.get(name, others)
            if check is None:
                raise Malformed(f"has an unknown field {name[:40]!r}")
            found[name] = _at(f".{name:.40}", check, element)
        return found

    return check_record


def _at(place: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except Malformed as error:
        raise error.within(place) from None


def _fail(expected: str, value: Any) -> NoReturn:
    shown = type(value).__name__ if isinstance(value, dict | list) else _short(value)
    raise Malformed(f"expected {expected}, found {shown}")


def _short(value: Any) -> str:
    """Return a short repr. Converting a huge integer to decimal would raise or take seconds."""
    if type(value) is int and abs(value) >= 2**64:
        return "a huge integer"
    return f"{value!r:.60}"


def _refuse(constant: str) -> NoReturn:
    raise Malformed(f"is not JSON: {constant} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # rare, so a large vocabulary is not searched
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise Malformed(f"has the field {name[:40]!r} twice")
            seen.add(name)
    return found
