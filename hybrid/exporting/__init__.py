"""Writes a model in formats that other engines read: Hugging Face's, llama.cpp's, PowerInfer's.

This package never packs and never prints. It holds a few megabytes of one tensor at a time.
"""

from __future__ import annotations

from hybrid.exporting.encoding import TYPES
from hybrid.exporting.export import TARGETS, Exported, Request, export_model

__all__ = ["TARGETS", "TYPES", "Exported", "Request", "export_model"]
