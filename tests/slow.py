"""Which cases of a parametrised test the default run leaves out: `pytest -m slow` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: all `values`, those not in `fast` marked slow."""
    return [
        value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
