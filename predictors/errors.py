"""The exception of this package, for broken files and for data without anything to learn."""

from __future__ import annotations


class PredictorError(Exception):
    """A trace or a predictor is broken, does not fit, or cannot be made; the message says why."""
