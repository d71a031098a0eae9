"""The reference executor: the forward pass in plain NumPy, for any number of tokens. The oracle,
not the product.

With `format=None` everything is fp32. With a format, weights, activations and the KV cache are
rounded as the native kernels round them, so that the two differ only by the order of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.engine.forward import forward
from hybrid.kernels import Activation, Format, reference
from hybrid.model_config import ModelConfig
from hybrid.weights.model_weights import LayerWeights, ModelWeights
from hybrid.weights.quant import round_weights

Array = NDArray[np.float32]


def read_weights(checkpoint: Checkpoint, format: Format | None) -> ModelWeights[Array]:
    """All weights of a checkpoint as fp32 arrays, rounded to what `format` stores."""

    def matrix(role: str, layer: int | None = None) -> Array:
        return round_weights(format, checkpoint.read(role, layer))

    layers = tuple(
        LayerWeights(
            attention_norm=checkpoint.read("attention_norm", layer),
            qkv=np.concatenate([matrix(role, layer) for role in ("q", "k", "v")]),
            o=matrix("o", layer),
            ffn_norm=checkpoint.read("ffn_norm", layer),
            gate=matrix("gate", layer),
            up=matrix("up", layer),
            # Blocks of down run along hidden: transposed first, rounded then.
            down=round_weights(format, np.ascontiguousarray(checkpoint.read("down", layer).T)),
        )
        for layer in range(checkpoint.config.n_layers)
    )
    embedding = matrix("embedding")
    head = embedding if checkpoint.config.has_tied_head else matrix("head")
    return ModelWeights(embedding, layers, checkpoint.read("norm"), head)


class ReferenceSession:
    """One sequence: its KV cache and the masks of active neurons of the latest call."""

    def __init__(
        self, weights: ModelWeights[Array], config: ModelConfig, format: Format | None = None
    ) -> None:
        self.weights, self.config, self.format = weights, config, format
        self.position = 0
        self.tokens: NDArray[np.int64] = np.empty(0, np.int64)
        self.active: list[NDArray[np.bool_]] = []  # per layer (tokens, n_neurons)
        empty = np.empty((0, config.n_kv_heads, config.head_dim), np.float32)
        self._k = [empty] * config.n_layers
        self._v = [empty] * config.n_layers

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Append tokens; returns all their logits (tokens, vocab)."""
        self.tokens, self.active = np.asarray(tokens, np.int64), []
        logits = forward(self, self.weights, self.config)
        self.position += len(self.tokens)
        return logits

    def embed(self, weights: ModelWeights[Array], scale: float) -> Array:
        return weights.embedding[self.tokens] * np.float32(scale)

    def qkv(self, x: Array, weights: LayerWeights[Array], layer: int) -> Array:
        config, n = self.config, len(self.tokens)
        h = self._round(reference.rms_norm(x, weights.attention_norm, config.rms_norm_eps))
        heads = (h @ weights.qkv.T).reshape(n, -1, config.head_dim)
        q, k, v = np.split(heads, [config.n_heads, config.n_heads + config.n_kv_heads], 1)
        cos, sin = reference.rope_tables(config.head_dim, config.rope_theta, self.position + n)
        cos, sin = cos[self.position :], sin[self.position :]
        self._k[layer] = np.concatenate((self._k[layer], self._cached(reference.rope(k, cos, sin))))
        self._v[layer] = np.concatenate((self._v[layer], self._cached(v)))
        return reference.rope(q, cos, sin)

    def attend(
        self, x: Array, q: Array, weights: LayerWeights[Array], layer: int, scale: float
    ) -> Array:
        y = reference.attention(q, self._k[layer], self._v[layer], self.position)
        y = self._round(y.reshape(len(self.tokens), -1))
        return x + np.float32(scale) * (y @ weights.o.T)

    def ffn(self, x: Array, weights: LayerWeights[Array], layer: int, scale: float) -> Array:
        config = self.config
        h = self._round(reference.rms_norm(x, weights.ffn_norm, config.rms_norm_eps))
        activation = Activation[config.activation]
        y, active = reference.sparse_ffn(
            weights.gate, weights.up, weights.down, h, activation, config.threshold
        )
        self.active.append(active)
        return x + np.float32(scale) * y

    def head(self, x: Array, weights: ModelWeights[Array], scale: float) -> Array:
        h = reference.rms_norm(x, weights.norm, self.config.rms_norm_eps) * np.float32(scale)
        return self._round(h) @ weights.head.T

    def _round(self, x: Array) -> Array:
        return reference.round_activation(self.format, x)

    def _cached(self, x: Array) -> Array:
        return x if self.format is None else x.astype(np.float16).astype(np.float32)
