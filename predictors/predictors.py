"""The predictor of one layer in NumPy: the native kernels' arithmetic, and the arrays of files.

It approximates the gate's product with x by two small matrices: b (a x) + bias >= 0. The idea is
that of Deja Vu (https://arxiv.org/abs/2310.17157) and PowerInfer (https://arxiv.org/abs/2312.12456),
but without a nonlinearity between the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
BLOCK = 32  # weights of `a` that share a scale
WIDE_RANK = 4  # columns of `b` that are int8
RANK_STEP = 4  # ranks are multiples of it: the rows of `a` are packed in tiles of four


@dataclass(frozen=True, slots=True)
class LowRank:
    """Neuron j is predicted if b[j] z + bias[j] + margin >= 0.

    z is a x, rounded to int8 with one scale. Row j of b holds integers. Their scale is
    b_scale[j, 0] in the first WIDE_RANK columns, and b_scale[j, 1] in the others, which have 4
    bits.
    """

    a: Array  # (rank, hidden): values that `round_blocks` does not change
    b: NDArray[np.int8]  # (n_neurons, rank): -127 to 127; from column WIDE_RANK on -8 to 7
    b_scale: Array  # (n_neurons, 2)
    bias: Array  # (n_neurons,)

    @property
    def rank(self) -> int:
        return len(self.a)

    def scores(self, x: NDArray[np.floating]) -> Array:
        """Map (n, hidden) inputs to (n, n_neurons) scores.

        With margin 0 a neuron is predicted if its score is not negative.
        """
        z = x.astype(np.float32) @ self.a.T
        largest = np.abs(z).max(1, keepdims=True)
        scale = largest / np.float32(127)
        rounded = np.rint(z / np.where(scale > 0, scale, 1))
        wide = rounded[:, :WIDE_RANK] @ self.b[:, :WIDE_RANK].T.astype(np.float32)
        narrow = rounded[:, WIDE_RANK:] @ self.b[:, WIDE_RANK:].T.astype(np.float32)
        return scale * (wide * self.b_scale[:, 0] + narrow * self.b_scale[:, 1]) + self.bias


def round_blocks(a: Array) -> Array:
    """Round (rank, hidden) weights to 4-bit blocks of 32 with an fp16 scale.

    The value with the largest magnitude of a block becomes -8. Rounding the result again, when
    weights are packed as q4, changes nothing.
    """
    n_rows, n_cols = a.shape
    blocks = np.pad(a, ((0, 0), (0, -n_cols % BLOCK))).reshape(n_rows, -1, BLOCK)
    at = np.abs(blocks).argmax(-1, keepdims=True)
    scale = (np.take_along_axis(blocks, at, -1) / np.float32(-8)).astype(np.float16)
    scale = scale.astype(np.float32)
    integers = np.clip(np.rint(blocks / np.where(scale != 0, scale, 1)), -8, 7)
    return (integers * scale).reshape(n_rows, -1)[:, :n_cols].astype(np.float32)


def quantize_lowrank(a: Array, b: Array, bias: Array, x: NDArray[np.floating]) -> LowRank:
    """Round trained matrices. The columns of `b` must be in falling order of size.

    z is rounded with one scale. So its elements are first scaled to the same size on `x`
    (n, hidden), which are some inputs.
    """
    size = np.sqrt(np.mean((x.astype(np.float32) @ a.T) ** 2, 0)) + np.float32(1e-12)
    a, b = round_blocks(a / size[:, None]), b * size
    scale = column_scales(b)
    integers = np.rint(b / column_units(scale, b.shape[1]))
    integers[:, WIDE_RANK:] = np.clip(integers[:, WIDE_RANK:], -8, 7)
    return LowRank(a, integers.astype(np.int8), scale, bias.astype(np.float32))


def column_scales(b: Array) -> Array:
    """Map (n_neurons, rank) to the scales of the integers, as in `LowRank.b_scale`."""
    wide = np.abs(b[:, :WIDE_RANK]).max(1) / np.float32(127)
    return np.stack([wide, _narrow_scale(b)], 1).astype(np.float32)


def column_units(scales: Array, rank: int) -> Array:
    """Return the scale of each element of b, for divisions: rows of zeros get 1."""
    units = scales[:, np.where(np.arange(rank) < WIDE_RANK, 0, 1)]
    return np.where(units > 0, units, np.float32(1))


def _narrow_scale(b: Array) -> Array:
    """Map (n_neurons, rank) to (n_neurons,) scales of the columns from WIDE_RANK on.

    They minimise the mean square error of 4-bit rounding.
    """
    narrow = b[:, WIDE_RANK:]
    if not narrow.size:
        return np.zeros(len(b), np.float32)
    whole = np.abs(narrow).max(1) / np.float32(7.5)
    best, least = whole, np.full(len(b), np.inf, np.float32)
    for share in np.linspace(0.4, 1.0, 13, dtype=np.float32):
        scale = whole * share
        unit = np.where(scale > 0, scale, 1)[:, None]
        error = np.square(np.clip(np.rint(narrow / unit), -8, 7) * unit - narrow).sum(1)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of a layer's predictor on tokens that it was not made from."""

    recall: float  # share of the active (neuron, token) pairs that is predicted
    weighted_recall: float  # the same weighted by |activation|: the share of the output kept
    precision: float  # share of the predicted pairs that is active
    predicted: float  # share of all pairs that is predicted


def measure_quality(
    scores: Array, active: NDArray[np.bool_], magnitude: Array, margin: float
) -> Quality:
    """Compare predictions with the truth.

    `scores`, `active` and `magnitude` (the gate's activation) are (n, n_neurons).
    """
    predicted = scores + np.float32(margin) >= 0
    hits = predicted & active
    n_active, n_predicted = int(active.sum()), int(predicted.sum())
    weight = float(magnitude[active].sum(dtype=np.float64))
    return Quality(
        recall=int(hits.sum()) / n_active if n_active else 1.0,
        weighted_recall=float(magnitude[hits].sum(dtype=np.float64)) / weight if weight else 1.0,
        precision=int(hits.sum()) / n_predicted if n_predicted else 1.0,
        predicted=n_predicted / predicted.size,
    )


def margin_for_recall(scores: Array, active: NDArray[np.bool_], recall: float) -> float:
    """Return the least margin with which a share `recall` of the active pairs is predicted."""
    values = np.sort(scores[active])
    if not values.size:
        return 0.0
    missed = min(int((1.0 - recall) * values.size), values.size - 1)
    return float(np.nextafter(-values[missed], np.float32(np.inf)))
