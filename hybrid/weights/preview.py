"""Preview of the head: a 2-bit copy of its rows, from which all logits are estimated.

With a large vocabulary the head is a fifth of the bytes that decode reads, but almost no logit
matters. So all logits are estimated from the preview. The rows of the likeliest logits, the
shortlist, are then computed in full. The method is SVD-softmax (Shim et al., NIPS 2017), whose
preview has fewer columns; ours has fewer bits. csrc/kernels/kernels.h describes the layout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import _native
from hybrid.kernels._native import Preview

TILE = _native.PREDICT_TILE  # rows per tile
COLS = 16  # columns per line
LINE_BYTES = 4 * TILE
CHUNK_TILES = 16  # tiles packed at once, so that temporary arrays stay in the cache
# Smaller heads get no preview: they are read quickly or stay in the cache.
LEAST_ROWS = 16_384
# About this share of the rows is computed in full if logits are normally distributed. The rule is
# in csrc/session/head.cpp.
SHORTLISTED = 0.042
# The best step of four levels for a normal distribution of standard deviation 1 (Max, 1960).
NORMAL_STEP = 0.9957


def preview_bytes(n_rows: int, n_cols: int) -> int:
    """Return the bytes of all tiles; each token reads all of them."""
    return -(-n_rows // TILE) * LINE_BYTES * (-(-n_cols // COLS) + 1)


def round_preview(w: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round w (n, cols) to codes 0 to 3 (n, cols) and scales (n,): (code - 1.5) * scale."""
    scale = NORMAL_STEP * np.sqrt(np.mean(np.square(w), axis=1))
    for _ in range(2):  # alternately fit the codes to the scale and the scale to the codes
        codes = _codes(w, scale)
        levels = codes - np.float32(1.5)
        product = np.einsum("ij,ij->i", w, levels)
        scale = product / np.einsum("ij,ij->i", levels, levels)
    # That scale is best for the weights, but it shrinks a logit to 0.88 of its size, plus noise. So
    # take the scale with which the rounded row projected on the row itself has the row's length.
    squares = np.einsum("ij,ij->i", w, w)
    scale = np.divide(squares, product, out=np.zeros_like(product), where=product > 0)
    return codes, scale.astype(np.float32)


def _codes(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    steps = np.floor(w * inverse[:, None]) + 2
    return np.clip(steps, 0, 3, out=steps).astype(np.uint8)


def pack_preview_into(
    w: NDArray[np.float32], tiles: NDArray[np.uint8], *, matrix_scale: float = 1.0
) -> None:
    """Pack w (n_rows, n_cols), times `matrix_scale`, into `tiles` (bytes of all tiles,)."""
    for first in range(0, len(w), CHUNK_TILES * TILE):
        rows = w[first : first + CHUNK_TILES * TILE]
        n_bytes = preview_bytes(*rows.shape)
        begin = first // TILE * preview_bytes(TILE, w.shape[1])
        part = tiles[begin : begin + n_bytes].reshape(-(-len(rows) // TILE), -1)
        _pack_tiles(rows, part, matrix_scale)


def _pack_tiles(w: NDArray[np.float32], tiles: NDArray[np.uint8], matrix_scale: float) -> None:
    """Pack w (n_rows, n_cols), times `matrix_scale`, into `tiles` (n_tiles, bytes per tile)."""
    codes, scales = round_preview(w)
    n_tiles, n_lines = len(tiles), -(-w.shape[1] // COLS)
    padded = np.zeros((n_tiles * TILE, n_lines * COLS), np.uint8)
    padded[: len(w), : w.shape[1]] = codes
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    packed = np.bitwise_or.reduce(padded.reshape(-1, n_lines, 4, 4) << shifts, axis=2)
    lines = packed.reshape(n_tiles, TILE, n_lines, 4).swapaxes(1, 2)
    tiles[:, :-LINE_BYTES] = lines.reshape(n_tiles, -1)
    tile_scales = np.zeros(n_tiles * TILE, np.float32)
    tile_scales[: len(w)] = scales * np.float32(matrix_scale)
    tiles[:, -LINE_BYTES:] = tile_scales.view(np.uint8).reshape(n_tiles, -1)


def pack_preview(w: NDArray[np.float32]) -> Preview:
    """Pack a preview into new memory, for tests of kernels."""
    memory = _native.allocate_bytes(preview_bytes(*w.shape))
    pack_preview_into(w, memory)
    return Preview(n_rows=w.shape[0], n_cols=w.shape[1], tiles=memory)
