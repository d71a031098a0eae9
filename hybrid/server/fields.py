"""Fields: the fields of a request's JSON object, read by name with their types and ranges.

Unknown fields are ignored, and null means that a field is not given: clients send both. What is out
of range raises ApiError with status 400.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

from hybrid.server.api_error import ApiError, wrong
from predictors.schema import Malformed, parse_json

MAX_DEPTH = 64  # of nested objects and lists
MAX_VALUES = 500_000  # in one body


class Fields:
    """A JSON object. `where` is its name in messages, such as "stream_options."."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self._where = values, where

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """Return a field of any type; None if it is not given."""
        return self.values.get(name)

    @overload
    def integer(self, name: str, least: int, most: int, default: int) -> int: ...
    @overload
    def integer(self, name: str, least: int, most: int) -> int | None: ...
    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some clients write 1.0
        if type(value) is not int or not least <= value <= most:
            raise wrong(self._where + name, f"an integer from {least} to {most}", value)
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not least <= value <= most:
            raise wrong(self._where + name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise wrong(self._where + name, "true or false", value)
        return value

    @overload
    def text(self, name: str, default: str) -> str: ...
    @overload
    def text(self, name: str) -> str | None: ...
    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong(self._where + name, "a string", value)
        return value

    def texts(self, name: str, most: int, most_length: int) -> tuple[str, ...] | None:
        """Return strings from one string or a list of up to `most`."""
        value = self.values.get(name)
        if value is None:
            return None
        texts = [value] if isinstance(value, str) else value
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise wrong(self._where + name, "a string or a list of strings", value)
        if len(texts) > most or any(len(text) > most_length for text in texts):
            raise ApiError(
                400,
                f"{self._where}{name}: expected at most {most} strings of {most_length} characters",
                param=name,
            )
        return tuple(text for text in texts if text)

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong(self._where + name, "an object", value)
        return Fields(value, f"{self._where}{name}.")

    def items(self, name: str, most: int) -> Sequence[Any] | None:
        """Return a list of up to `most` values."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise wrong(self._where + name, "a list", value)
        if len(value) > most:
            raise wrong(self._where + name, f"at most {most} entries", len(value))
        return value

    def needed_items(self, name: str, most: int) -> Sequence[Any]:
        """Return a list of up to `most` values, which must be given."""
        items = self.items(name, most)
        if items is None:
            raise self.needs(name)
        return items

    def needs(self, name: str) -> ApiError:
        """Return the error of a field that is missing."""
        return ApiError(400, f"{self._where}{name}: it is missing", param=self._where + name)


def parse_fields(body: bytes) -> Fields:
    """Return the JSON object of a request's body. Raises ApiError."""
    try:
        values = parse_json(body)
    except Malformed as error:
        raise ApiError(400, f"the request's body {error.what}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the request's body: expected a JSON object", code="invalid_json")
    _check_size(values)
    return Fields(values)


def _check_size(values: dict[str, Any]) -> None:
    n_values, level = 0, [iter([values])]
    while level:
        if len(level) > MAX_DEPTH:
            raise ApiError(400, f"the request's body: nested deeper than {MAX_DEPTH} levels")
        value = next(level[-1], _END)
        if value is _END:
            level.pop()
            continue
        n_values += 1
        if n_values > MAX_VALUES:
            raise ApiError(400, f"the request's body: more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            level.append(iter([*value, *value.values()]))
        elif isinstance(value, str):
            _check_text(value)
        elif isinstance(value, list):
            level.append(iter(value))
        elif isinstance(value, float) and not math.isfinite(value):  # such as 1e999
            raise ApiError(400, "the request's body: a number is too large")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a}"
        raise ApiError(400, f"the request's body: found the lone surrogate {found}") from None


_END = object()
