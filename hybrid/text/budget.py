"""What one rendering of a chat template may use: seconds, bytes, and the size of single values.

Whatever makes a value pays for it before it is made, and looks at the clock.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError

SECONDS = 0.8  # of one rendering
BYTES = 32 << 20  # that one rendering may make, in all its objects together
BYTES_PER_CHARACTER = 200  # as many more for each character of the variables
MAX_LIST = 100_000  # elements of a list that an operator or a filter makes
MAX_NODES = 100_000  # elements, nested ones too, of a container that is compared or written
MAX_BITS = 4096  # of an integer
MAX_WIDTH = 1000  # characters that a field is padded to

# The fields of a format whose width is given by an argument, or has four digits.
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)")


class TemplateLimit(Exception):
    """A template used up its time or its bytes."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.deadline = time.perf_counter() + SECONDS
        self.n_bytes = BYTES
        self.given: dict[int, int] = {}  # characters of each of the variables' containers, by id
        self.n_bytes += BYTES_PER_CHARACTER * self._note(variables)

    def _note(self, value: object) -> int:
        """Return the number of characters of a variable, and remember its containers."""
        if isinstance(value, str):
            return len(value)
        items: list[object] = []
        if isinstance(value, dict):
            items = [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            items = [*value]
        else:
            return 1
        self.given[id(value)] = n = 1 + sum(map(self._note, items))
        return n

    def tick(self) -> None:
        if time.perf_counter() > self.deadline:
            raise TemplateLimit(f"it took longer than {SECONDS} s")

    def pay(self, n_bytes: int) -> None:
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise TemplateLimit("it made more text than a chat can have")

    def pay_for(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, list, tuple, dict)):
            self.pay(sys.getsizeof(value))
            if not isinstance(value, (str, bytes)) and len(value) > MAX_LIST:
                raise TemplateLimit(f"it made a list of more than {MAX_LIST:,} elements")
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TemplateLimit(f"it made a number of more than {MAX_BITS:,} bits")
        return value

    def check_size(self, value: object) -> int:
        """Return the characters of a value with all its elements, which may share parts."""
        n_characters = n_nodes = 0
        left = [value]
        while left:
            item = left.pop()
            if isinstance(item, str):
                n_characters += len(item)
            elif id(item) in self.given:
                n_characters += self.given[id(item)]
            elif isinstance(item, (list, tuple, dict)):
                n_nodes += len(item)
                if n_nodes > MAX_NODES:
                    raise TemplateLimit(f"it used a value of more than {MAX_NODES:,} elements")
                left += [*item, *item.values()] if isinstance(item, dict) else [*item]
        return n_characters


current: ContextVar[Budget] = ContextVar("budget")


def check_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise TemplateLimit(f"it made a number of more than {MAX_BITS:,} bits")
        return
    sequence, n = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(n, int) and isinstance(sequence, (str, list, tuple)):
        if not isinstance(sequence, str) and len(sequence) * n > MAX_LIST:
            raise TemplateLimit(f"it made a list of more than {MAX_LIST:,} elements")
        budget.pay(max(0, len(sequence) * n))


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
        raise TemplateLimit(f"it made a number of more than {MAX_BITS:,} bits")


def check_format(budget: Budget, wide: re.Pattern[str], text: str, arguments: object) -> None:
    if wide.search(text):
        raise TemplateLimit(f"it pads a field to more than {MAX_WIDTH:,} characters")
    budget.pay(budget.check_size(arguments) * (1 + text.count("%") + text.count("{")))


def check_method(budget: Budget, text: str, name: str, arguments: list[Any]) -> None:
    """Pay for what a method of a string will make, before it is made."""
    first = arguments[0] if arguments else None
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        if isinstance(first, int) and first > MAX_WIDTH:
            raise TemplateLimit(f"it pads a field to more than {MAX_WIDTH:,} characters")
    elif name in ("split", "rsplit"):
        n = text.count(first) if isinstance(first, str) and first else len(text) // 2
        budget.pay(64 * n)
    elif name == "splitlines":
        budget.pay(64 * text.count("\n"))
    elif name == "replace" and len(arguments) >= 2:
        pay_for_replacement(budget, text, *arguments[:2])
    elif name == "join":
        pay_for_join(budget, text, first)
    elif name in ("translate", "encode", "maketrans"):
        raise SecurityError(f"a chat template may not call {name}()")


def pay_for_replacement(budget: Budget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.pay((text.count(old) if old else len(text) + 1) * len(new))


def pay_for_join(budget: Budget, separator: str, items: Any) -> None:
    if isinstance(items, (list, tuple, dict)):
        budget.pay(budget.check_size(items) + len(separator) * len(items))
    elif isinstance(items, str):
        budget.pay(len(items) * (1 + len(separator)))
