"""Adds up recorded masks. numba compiles the loop once, and runs the layers in parallel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid import MissingPackage
from hybrid.placement.profile import POSITION_BUCKETS

_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.int64)
_SIGNATURE = "void(u1[:,:,::1], i8[:,::1], i8[:,::1], i8[::1], i8[::1], i8[::1])"


@cache
def compiled_sums() -> Callable[..., None]:
    """Return the compiled loop, which adds the masks of one window to the sums.

    The first call takes seconds if numba finds no cache of an earlier run. Raises MissingPackage if
    numba is not installed.
    """
    try:
        from numba import njit, prange
    except ImportError as error:
        raise MissingPackage(
            f"recording needs numba ({error}): pip install 'hybrid-inference[train]'"
        ) from error

    def add(masks, counts, position_active, overlap, overlap_base, buckets):  # type: ignore[no-untyped-def]
        n_layers, n_tokens, n_bytes = masks.shape
        for layer in prange(n_layers):
            for token in range(n_tokens):
                active = both = 0
                for at in range(n_bytes):
                    byte = masks[layer, token, at]
                    if byte == 0:
                        continue
                    active += _BITS[byte]
                    if token > 0:
                        both += _BITS[byte & masks[layer, token - 1, at]]
                    for bit in range(8):
                        if byte >> bit & 1:
                            counts[layer, 8 * at + bit] += 1
                position_active[layer, buckets[token]] += active
                if token > 0:
                    overlap[layer] += both
                    overlap_base[layer] += active

    options: dict[str, Any] = {"parallel": True}
    try:
        compile_cached = njit(_SIGNATURE, cache=True, **options)
        return compile_cached(add)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return njit(_SIGNATURE, **options)(add)


class ActivationSums:
    """Running sums of one recording. Neurons are in packed order."""

    ARRAYS = ("text_counts", "position_active", "position_tokens", "overlap", "overlap_base")

    def __init__(self, n_texts: int, n_layers: int, n_neurons: int) -> None:
        padded = -(-n_neurons // 8) * 8  # masks have whole bytes
        self.n_neurons = n_neurons
        self.text_counts = np.zeros((n_texts, n_layers, padded), np.int64)
        self.position_active = np.zeros((n_layers, POSITION_BUCKETS), np.int64)
        self.position_tokens = np.zeros(POSITION_BUCKETS, np.int64)
        self.overlap = np.zeros(n_layers, np.int64)
        self.overlap_base = np.zeros(n_layers, np.int64)

    @property
    def n_tokens(self) -> int:
        return int(self.position_tokens.sum())

    def add(self, masks: NDArray[np.uint8], text: int) -> None:
        """Add the masks (n_layers, n, bytes) of one whole window of `text`."""
        buckets = position_buckets(masks.shape[1])
        self.position_tokens += np.bincount(buckets, minlength=POSITION_BUCKETS)
        compiled_sums()(
            masks,
            self.text_counts[text],
            self.position_active,
            self.overlap,
            self.overlap_base,
            buckets,
        )


def position_buckets(n: int) -> NDArray[np.int64]:
    """Return the bucket of each position. Buckets are powers of two: see POSITION_BUCKETS."""
    exponents = np.frexp(np.arange(1, n + 1, dtype=np.float64))[1].astype(np.int64) - 1
    return np.minimum(exponents, POSITION_BUCKETS - 1)
