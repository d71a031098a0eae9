"""Says what a model is, from the headers of its files; `hybrid.inspect` prints it.

`model` collects the facts of a `Report`: `stored` lists tensors, `shapes` reads sizes, `predictors`
ranks, and `content` reads all bytes if the user wants that.
"""

from __future__ import annotations

from hybrid.inspecting.model import inspect_model
from hybrid.inspecting.report import Report

__all__ = ["Report", "inspect_model"]
