"""The tolerance of all kernel tests, and helpers to compare and quantise arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native

# A kernel and its oracle get the same rounded inputs, so only the order of fp32 sums differs.
SUM_ORDER = 3e-6  # relative to the sum of absolute terms


def assert_close(actual: NDArray, expected: NDArray, *, scale: float | NDArray) -> None:
    """Assert that both are equal within SUM_ORDER times `scale`, the sum of absolute terms."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error = np.abs(actual - expected)
    assert (error <= SUM_ORDER * scale).all(), f"off by {error.max():.2e}, summed {scale}"


def quantize_tokens(format: Format, x: NDArray) -> NDArray:
    """Quantise (tokens, n) fp32; returns one packed vector per token."""
    return np.stack([_native.quantize(format, token) for token in x])
