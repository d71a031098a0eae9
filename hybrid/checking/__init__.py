"""Checks whether a model works correctly on this machine.

`model` runs the checks of `setting`, `activations` and `arithmetic` in order; `hybrid.selfcheck`
prints them.
"""

from __future__ import annotations

from hybrid.checking.check import Check
from hybrid.checking.model import check_model

__all__ = ["Check", "check_model"]
