"""The one tolerance table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native

# Kernels and their oracle see the same rounded inputs: they differ by the order of fp32 sums alone.
SUM_ORDER = 3e-6  # of the sum of absolute terms


def assert_close(actual: NDArray, expected: NDArray, *, scale: float | NDArray) -> None:
    """Equal within SUM_ORDER times `scale`, the magnitude of what was summed."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error = np.abs(actual - expected)
    assert (error <= SUM_ORDER * scale).all(), f"off by {error.max():.2e}, summed {scale}"


def quantize_tokens(format: Format, x: NDArray) -> NDArray:
    """(tokens, n) fp32 → one quantised vector each."""
    return np.stack([_native.quantize(format, token) for token in x])
