"""Mark cases of a parametrised test as slow: only `pytest -m slow` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Return `values` for `pytest.mark.parametrize`. Those that are not in `fast` are slow."""
    return [
        value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
