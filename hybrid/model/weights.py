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


def read_layer(
    read: Callable[[str, int], Array], layer: int, rounded: Callable[[Array], Array]
) -> LayerWeights[Array]:
    """Return a layer of a checkpoint, whose `read` takes a role and a layer.

    `rounded` rounds each matrix along its rows, possibly in place.
    """

    def matrix(role: str) -> Array:
        return rounded(read(role, layer))

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
