"""ModelWeights: the tensors of one model, by role.

The type of a matrix depends on the executor: a NumPy array for the reference, packed rows for the
CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Preview

Matrix = TypeVar("Matrix")


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[Matrix]):
    attention_norm: NDArray[np.float32]  # (hidden,)
    qkv: Matrix  # (n_heads + 2 n_kv_heads) * head_dim rows of hidden: q, then k, then v
    o: Matrix  # hidden rows of n_heads * head_dim
    ffn_norm: NDArray[np.float32]  # (hidden,)
    gate: Matrix  # n_neurons rows of hidden
    up: Matrix  # n_neurons rows of hidden
    down: Matrix  # n_neurons rows of hidden: row j is what neuron j adds to the output


@dataclass(frozen=True, slots=True)
class ModelWeights(Generic[Matrix]):
    embedding: Matrix  # vocab rows of hidden
    layers: Sequence[LayerWeights[Matrix]]
    norm: NDArray[np.float32]  # (hidden,)
    head: Matrix  # vocab rows of hidden; the embedding itself if they are tied
    preview: Preview | None = None  # of the head, if one is used
