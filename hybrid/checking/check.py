"""What a check says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warning", "failed"]
Figures = Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    message: str  # one line of plain English
    advice: str = ""  # what to do, where the verdict is not ok
    figures: Figures = field(default_factory=dict)
