"""ModelWeights: the tensors of one model, by role.

The type of a matrix depends on the executor: a NumPy array for the reference, packed rows for the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Preview

Matrix = TypeVar("Matrix")
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[Matrix]):
    attention_norm: Array  # (hidden,)
    qkv: Matrix  # (n_heads + 2 n_kv_heads) * head_dim rows of hidden: q, then k, then v
    o: Matrix  # hidden rows of n_heads * head_dim
    ffn_norm: Array  # (hidden,)
    gate: Matrix  # n_neurons rows of hidden
    up: Matrix  # n_neurons rows of hidden
    down: Matrix  # n_neurons rows of hidden: row j is what neuron j adds to the output
    # Of packed rows: what the rows of q, k and v are multiplied with. Other rows say so themselves.
    qkv_scales: tuple[float, ...] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class ModelWeights(Generic[Matrix]):
    embedding: Matrix  # vocab rows of hidden
    layers: Sequence[LayerWeights[Matrix]]
    norm: Array  # (hidden,)
    head: Matrix  # vocab rows of hidden; the embedding itself if they are tied
    preview: Preview | None = None  # of the head, if one is used


# The KV cache is 16 bits wide. Typical keys and values from 2**-8 to 2**10 are left as they are.
_LEAST_KV_EXPONENT, _MOST_KV_EXPONENT = -8, 10
KV_SAMPLED_ROWS = 256  # of a projection, which say how large its keys or values typically are
# Which projection's size decides for a role, and whether the role is divided or multiplied.
_BALANCED = {"q": ("k", 1), "k": ("k", -1), "v": ("v", -1), "o": ("v", 1)}


def read_balanced(read: Callable[[str, int], Array], role: str, layer: int) -> Array:
    """Return a role's weights, scaled so that the KV cache can hold keys and values.

    Ordinary weights are returned as they are.
    """
    w = read(role, layer)
    if role not in _BALANCED:
        return w

    def sample(name: str, layer: int) -> Array:
        weights = w if name == role else read(name, layer)
        if weights.ndim == 1:
            return weights
        return weights[sampled_rows(len(weights), KV_SAMPLED_ROWS)]

    factor = balancing_factor(sample, role, layer)
    if factor == 1.0:
        return w
    with np.errstate(over="ignore"):
        return w * np.float32(factor)


def balancing_factor(sample: Callable[[str, int], Array], role: str, layer: int) -> float:
    """Return the power of two that a role's weights are multiplied with, for the KV cache.

    If typical keys are very small or very large, k is divided by a power of two and q multiplied by
    it, which changes no score. The same is done to v and o, which changes no output. `sample`
    returns KV_SAMPLED_ROWS `sampled_rows` of a matrix, or all of attention_norm.
    """
    if role not in _BALANCED:
        return 1.0
    of, sign = _BALANCED[role]
    power = _typical_exponent(sample(of, layer), sample("attention_norm", layer))
    if _LEAST_KV_EXPONENT <= power <= _MOST_KV_EXPONENT:
        return 1.0
    return float(2.0 ** (sign * power))


def sampled_rows(n_rows: int, n_samples: int) -> slice:
    """Return about `n_samples` evenly spread rows of a matrix, which stand for all of them."""
    return slice(0, n_rows, max(1, n_rows // n_samples))


def _typical_exponent(sample: Array, norm: Array) -> int:
    """Return the exponent of 2 of what a row (of some rows of hidden) typically gives; 0: zeros."""
    rows = sample.astype(np.float64) * norm
    sizes = np.sqrt(np.square(rows).sum(1))  # the norm's output has a root mean square of `norm`
    sizes = sizes[sizes > 0]
    if sizes.size == 0 or not np.isfinite(sizes).all():
        return 0
    return int(np.clip(np.frexp(np.median(sizes))[1], -126, 126))


def read_layer(
    read: Callable[[str, int], Array], layer: int, rounded: Callable[[Array], Array]
) -> LayerWeights[Array]:
    """Return a layer of a checkpoint, whose `read` takes a role and a layer.

    `rounded` rounds each matrix along its rows, possibly in place.
    """

    def matrix(role: str) -> Array:
        return rounded(read_balanced(read, role, layer))

    return LayerWeights(
        attention_norm=read("attention_norm", layer),
        qkv=np.concatenate([matrix(role) for role in ("q", "k", "v")]),
        o=matrix("o"),
        ffn_norm=read("ffn_norm", layer),
        gate=matrix("gate"),
        up=matrix("up"),
        # Blocks of down run along hidden, so it is transposed before it is rounded.
        down=rounded(np.ascontiguousarray(read("down", layer).T)),
    )
