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
CHUNK_TILES = 16  # packed at a time: what NumPy makes on the way stays in the cache
# Smaller heads are soon read, or stay in the cache.
LEAST_ROWS = 16_384
# About this share of the rows is computed in full (csrc/session/session.h's rule, normal logits).
SHORTLISTED = 0.042
# The step of four levels that is best for a normal distribution of deviation 1 (Max, 1960).
NORMAL_STEP = 0.9957


def pays(n_rows: int) -> bool:
    return n_rows >= LEAST_ROWS


def preview_bytes(n_rows: int, n_cols: int) -> int:
    """Bytes of the tiles: all of them are read for each token."""
    return -(-n_rows // TILE) * LINE_BYTES * (n_cols // COLS + 1)


def round_preview(w: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(n, cols) → codes 0 to 3 (n, cols), which stand for code - 1.5, and scales (n,)."""
    scale = NORMAL_STEP * np.sqrt(np.mean(np.square(w), axis=1))
    for _ in range(2):  # the scale that fits these codes best, and the codes that fit it
        codes = _codes(w, scale)
        levels = codes - np.float32(1.5)
        product = np.einsum("ij,ij->i", w, levels)
        scale = product / np.einsum("ij,ij->i", levels, levels)
    # That scale is best for the weights; but of a logit it leaves 0.88, and the rest is noise. So
    # the one with which a row is as long as itself along its own direction.
    squares = np.einsum("ij,ij->i", w, w)
    scale = np.divide(squares, product, out=np.zeros_like(product), where=product > 0)
    return codes, scale.astype(np.float32)


def _codes(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    steps = np.floor(w * inverse[:, None]) + 2
    return np.clip(steps, 0, 3, out=steps).astype(np.uint8)


def pack_preview_into(w: NDArray[np.float32], tiles: NDArray[np.uint8]) -> None:
    """`tiles` (bytes of all,)."""
    for first in range(0, len(w), CHUNK_TILES * TILE):
        rows = w[first : first + CHUNK_TILES * TILE]
        n_bytes = preview_bytes(*rows.shape)
        begin = first // TILE * preview_bytes(TILE, w.shape[1])
        _pack_tiles(rows, tiles[begin : begin + n_bytes].reshape(-(-len(rows) // TILE), -1))


def _pack_tiles(w: NDArray[np.float32], tiles: NDArray[np.uint8]) -> None:
    """`tiles` (tiles, bytes of one)."""
    codes, scales = round_preview(w)
    n_tiles, n_lines = len(tiles), w.shape[1] // COLS
    padded = np.zeros((n_tiles * TILE, n_lines, 4, 4), np.uint8)
    padded[: len(w)] = codes.reshape(len(w), n_lines, 4, 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    packed = np.bitwise_or.reduce(padded << shifts, axis=2)
    lines = packed.reshape(n_tiles, TILE, n_lines, 4).swapaxes(1, 2)
    tiles[:, :-LINE_BYTES] = lines.reshape(n_tiles, -1)
    tile_scales = np.zeros(n_tiles * TILE, np.float32)
    tile_scales[: len(w)] = scales
    tiles[:, -LINE_BYTES:] = tile_scales.view(np.uint8).reshape(n_tiles, -1)


def pack_preview(w: NDArray[np.float32]) -> Preview:
    """In memory of its own: for tests of kernels."""
    memory = _native.allocate_bytes(preview_bytes(*w.shape))
    pack_preview_into(w, memory)
    return Preview(n_rows=w.shape[0], n_cols=w.shape[1], tiles=memory)
