"""Predictors in the layout of the native kernels (csrc/kernels/kernels.h)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native
from hybrid.kernels._native import Predictor
from hybrid.model.config import ModelConfig
from hybrid.model.stored_predictors import StoredPredictors
from hybrid.weights.formats import has_blocks, row_bytes
from hybrid.weights.packed_rows import pack_matrix
from predictors.predictors import WIDE_RANK, LowRank

TILE = _native.PREDICT_TILE  # neurons per tile


def pack_predictor(format: Format, predictor: LowRank, margin: float) -> Predictor:
    """Pack a predictor for a model in `format`. Neurons must be in the model's packed order."""
    n_neurons, rank = predictor.b.shape
    wide = _tiles(predictor.b[:, :WIDE_RANK].astype(np.int16) + 128, 128).astype(np.uint8)
    n_lines = -(-(rank - WIDE_RANK) // 8)
    narrow = np.full((n_neurons, 8 * n_lines), 8, np.uint8)
    narrow[:, : rank - WIDE_RANK] = predictor.b[:, WIDE_RANK:] + 8
    columns = _tiles(narrow, 8).astype(np.uint8).reshape(len(wide), TILE, n_lines, 2, 4)
    lines = (columns[:, :, :, 0] | columns[:, :, :, 1] << 4).swapaxes(1, 2)
    limits = [
        _tiles(np.ascontiguousarray(predictor.b_scale[:, 0]), 0.0),
        _tiles(np.ascontiguousarray(predictor.b_scale[:, 1]), 0.0),
        # Padding neurons get scores below zero, so they are never named.
        _tiles(predictor.bias + np.float32(margin), -np.inf),
    ]
    parts = [
        wide,
        lines.reshape(len(wide), -1),
        *(limit.view(np.uint8) for limit in limits),
    ]
    return Predictor(
        format=format,
        n_neurons=n_neurons,
        tiles=_huge(np.concatenate(parts, axis=1)),
        first_matrix=pack_matrix(_first_format(format), predictor.a),
    )


def _first_format(format: Format) -> Format:
    """Return the format of the first matrix. It is multiplied with the same vectors as the gate."""
    return Format.q4 if has_blocks(format) else format


def _tiles(rows: NDArray[np.generic], fill: float) -> NDArray[np.generic]:
    """Reshape (n_neurons, …) to (tiles, TILE * …); `fill` pads the last tile."""
    padding = [(0, -len(rows) % TILE)] + [(0, 0)] * (rows.ndim - 1)
    padded = np.pad(rows, padding, constant_values=fill)
    return np.ascontiguousarray(padded.reshape(len(padded) // TILE, -1))


def _huge(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    memory = _native.allocate_bytes(tiles.size)
    memory[:] = tiles.ravel()
    return memory


def predictor_bytes(format: Format, predictor: LowRank, hidden_size: int) -> int:
    """Return the bytes that predicting for one token reads."""
    n_tiles = -(-len(predictor.b) // TILE)
    rank = predictor.rank
    width = sum(row_bytes(_first_format(format), hidden_size))
    return rank * width + n_tiles * TILE * (WIDE_RANK + 4 * -(-(rank - WIDE_RANK) // 8) + 12)


def stored_predictor_bytes(stored: StoredPredictors, config: ModelConfig) -> int:
    """Return the bytes that predicting for one token reads in all layers, for a file's own."""
    n_rows = -(-config.n_neurons // TILE) * TILE
    return sum(
        rank * sum(row_bytes(Format.q8, config.hidden_size))
        + n_rows * sum(row_bytes(Format.q8, rank))
        for rank in stored.ranks
    )
