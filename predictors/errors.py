"""What predictors raise for a broken file or data that nothing can be learned from."""

from __future__ import annotations


class PredictorError(Exception):
    """A trace or a predictor is broken, does not fit, or cannot be made; the message says why."""
