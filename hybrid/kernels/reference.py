"""What every kernel computes, in plain NumPy fp32: the oracle of all tests.

Quantised arithmetic is emulated by rounding. `round_activation` and `weights.formats.round_weights`
give the fp32 values that a format's activations and weights stand for. The same plain mathematics
then runs on those values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels._native import BLOCK, Activation, Format, KvFormat

# The variance of what 2 bits leave out of a normally distributed weight, in scales squared. It is
# kPreviewVariance of csrc/kernels/kernels.h.
PREVIEW_VARIANCE = 0.107

Array = NDArray[np.float32]


def bf16_bits(x: Array) -> NDArray[np.uint16]:
    """fp32 → bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_activation(format: Format | None, x: Array) -> Array:
    """The values of (…, n) activations after quantisation; f16 and `None` leave them in fp32.

    bf16: the values are rounded to bf16. q8 and q4: blocks of 32 along n, with
    int8 = round(x * 127 / max|x|) and one fp32 scale per block.
    """
    if format is None or format is Format.f16:
        return x
    if format is Format.bf16:
        return bf16_values(bf16_bits(x))
    n = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    rounded = np.rint(blocks * inverse) * (largest / np.float32(127))
    return rounded.reshape(padded.shape)[..., :n].astype(np.float32)


def round_kv(kv: KvFormat, x: Array) -> Array:
    """The values of keys or values in the KV cache. Those beyond its range become infinite."""
    if kv is KvFormat.bf16:
        return bf16_values(bf16_bits(x))
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """The norm over the last axis, as in Llama."""
    inverse = 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True, dtype=np.float32) + np.float32(eps))
    return weight * (x * inverse.astype(np.float32))


def rope_tables(
    head_dim: int, theta: float, n_positions: int, first_position: int = 0
) -> tuple[Array, Array]:
    """cos and sin (n_positions, head_dim / 2). Angles are in fp32, as in the models' training.

    The bits of a position do not depend on where the tables begin.
    """
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    # A range of floats would add up to other values where fp32 holds not every integer.
    positions = np.arange(first_position, first_position + n_positions).astype(np.float32)
    angles = np.outer(positions, inverse.astype(np.float32))
    return np.cos(angles), np.sin(angles)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the halves of (tokens, heads, head_dim) by tables (tokens, head_dim / 2)."""
    first, second = np.split(x, 2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, first_position: int) -> Array:
    """Causal attention of (tokens, heads, head_dim) queries over (context, kv_heads, head_dim).

    Query t is at position `first_position + t` and sees the positions up to its own.
    """
    n_tokens, n_heads, head_dim = q.shape
    group = n_heads // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("thd,chd->htc", q, k) / np.float32(np.sqrt(head_dim))
    positions = first_position + np.arange(n_tokens)
    unseen = np.arange(k.shape[0]) > positions[:, None]
    scores = np.where(unseen, np.float32(-np.inf), scores)
    return np.einsum("htc,chd->thd", softmax(scores), v)


def fires(activation: Activation, gate: Array, threshold: float) -> NDArray[np.bool_]:
    """Which neurons are active: gate > 0 (relu), gate >= threshold (fatrelu), all (silu)."""
    if activation is Activation.relu:
        return gate > 0
    if activation is Activation.fatrelu:
        return gate >= np.float32(threshold)
    return np.ones(gate.shape, np.bool_)


def neuron_values(
    gate: Array, up: Array, x: Array, activation: Activation, threshold: float
) -> tuple[Array, NDArray[np.bool_]]:
    """The weights of the neurons' down rows, and the mask of active neurons.

    Both are (tokens, n_neurons). A weight is act(gate x) * up x, or 0 if the neuron is inactive.
    """
    g = x @ gate.T
    active = fires(activation, g, threshold)
    if activation is Activation.silu:
        g = g / (1 + np.exp(-g))
    return np.where(active, g * (x @ up.T), np.float32(0)), active


def sparse_ffn(
    gate: Array, up: Array, down: Array, x: Array, activation: Activation, threshold: float
) -> tuple[Array, NDArray[np.bool_]]:
    """FFN of (tokens, hidden) over neuron-major matrices (n_neurons, hidden).

    Returns the output (tokens, hidden) and the mask of active neurons (tokens, n_neurons).
    """
    values, active = neuron_values(gate, up, x, activation, threshold)
    return values @ down, active


def preview_logits(codes: NDArray[np.uint8], scales: Array, x: Array) -> Array:
    """Logits (rows,) of a head's rows in 2 bits for x (n_cols,), which is rounded to int8.

    Noise of variance v in a logit makes its probability exp(v / 2) times as large on average. So
    v / 2 is subtracted: the probabilities of all rows together are then right on average.
    """
    largest = np.float32(np.abs(x).max())
    integers = np.rint(x * (np.float32(127) / largest if largest > 0 else np.float32(0)))
    dots = codes.astype(np.float64) @ integers - 1.5 * integers.sum()
    unit = scales * (largest / np.float32(127))
    noise = unit * PREVIEW_VARIANCE * np.square(integers).sum()
    return ((dots - 0.5 * noise) * unit).astype(np.float32)
