"""The result of a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warning", "failed"]
Figures = Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    verdict: Verdict
    message: str  # one line of plain English
    advice: str = ""  # what to do, if the verdict is not ok
    figures: Figures = field(default_factory=dict)
    table: tuple[str, ...] = ()  # lines to show below the message
