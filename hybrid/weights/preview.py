"""A preview of the head: its rows in 2 bits, which say of each token which rows are worth reading.

Of a large vocabulary the head is a fifth of what decode reads, for logits of which almost none
matter. So all logits are computed from the preview, and the likeliest again from the rows
themselves (SVD-softmax, Shim et al., NIPS 2017: theirs previews in fewer columns, ours in fewer
bits). csrc/kernels/kernels.h has the layout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import _native
from hybrid.kernels._native import Preview

TILE = _native.PREDICT_TILE  # rows
COLS = 16  # of a line
LINE_BYTES = 4 * TILE
# Smaller heads are soon read, or stay in the cache.
LEAST_ROWS = 16_384
# The step of four levels that is best for a normal distribution of deviation 1 (Max, 1960).
NORMAL_STEP = 0.9957


def preview_bytes(n_rows: int, n_cols: int) -> int:
    """Bytes of the tiles: all of them are read for each token."""
    return -(-n_rows // TILE) * LINE_BYTES * (n_cols // COLS + 1)


def round_preview(w: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(n, cols) → codes 0 to 3 (n, cols), which stand for code - 1.5, and scales (n,)."""
    scale = NORMAL_STEP * np.sqrt(np.mean(np.square(w), axis=1))
    codes = _codes(w, scale)
    for _ in range(2):  # the scale that fits these codes best, and the codes that fit it
        codes = _codes(w, scale)
        levels = codes - np.float32(1.5)
        scale = np.einsum("ij,ij->i", w, levels) / np.einsum("ij,ij->i", levels, levels)
    return codes, scale.astype(np.float32)


def _codes(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    steps = np.floor(w * inverse[:, None]) + 2
    return np.clip(steps, 0, 3, out=steps).astype(np.uint8)


def pack_preview_into(w: NDArray[np.float32], tiles: NDArray[np.uint8]) -> None:
    """`tiles` (tiles, bytes of one) of some rows, a multiple of TILE but for the last ones."""
    codes, scales = round_preview(w)
    n_tiles, n_lines = len(tiles), w.shape[1] // COLS
    padded = np.zeros((n_tiles * TILE, n_lines, 4, 4), np.uint8)
    padded[: len(w)] = codes.reshape(len(w), n_lines, 4, 4)
    lines = tiles[:, :-LINE_BYTES].reshape(n_tiles, n_lines, TILE, 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    packed = np.bitwise_or.reduce(padded << shifts, axis=2)
    lines[:] = packed.reshape(n_tiles, TILE, n_lines, 4).swapaxes(1, 2)
    tile_scales = np.zeros(n_tiles * TILE, np.float32)
    tile_scales[: len(w)] = scales
    tiles[:, -LINE_BYTES:] = tile_scales.view(np.uint8).reshape(n_tiles, -1)


def pack_preview(w: NDArray[np.float32]) -> Preview:
    """In memory of its own: for tests and benchmarks of kernels."""
    n_rows, n_cols = w.shape
    memory = _native.allocate_bytes(preview_bytes(n_rows, n_cols))
    pack_preview_into(w, memory.reshape(-(-n_rows // TILE), -1))
    return Preview(n_rows=n_rows, n_cols=n_cols, tiles=memory)
