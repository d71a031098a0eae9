"""Reference executor: the forward pass in plain NumPy, for any number of tokens.

It is the oracle of tests and self-checks, not the product. With `format=None` everything is fp32.
With a format, weights, activations and the KV cache are rounded as the native kernels round them.
The two then differ only by the order of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import overload

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.kernels import Activation, Format, KvFormat, reference
from hybrid.model.config import ModelConfig
from hybrid.model.forward import forward
from hybrid.model.weights import LayerWeights, ModelWeights, read_layer
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.formats import round_weights
from hybrid.weights.matrix_scale import check_finite, find_matrix_scale

Array = NDArray[np.float32]


ROUNDED_ROWS = 512  # rows that are rounded at once; keeps NumPy's temporary arrays small


def read_weights(checkpoint: Checkpoint, format: Format | None) -> ModelWeights[Array]:
    """Return all weights of a checkpoint as fp32 arrays, rounded to what `format` stores."""
    layers = tuple(
        read_layer(partial(_read, checkpoint), layer, partial(_rounded, format))
        for layer in range(checkpoint.config.n_layers)
    )
    return _with_layers(checkpoint, format, layers)


def stream_weights(
    checkpoint: Checkpoint, format: Format | None, *, progress: Progress = ignore_progress
) -> ModelWeights[Array]:
    """Like `read_weights`, but a layer is read only when `forward` needs it, and is not kept.

    A model of 7 B parameters in fp32 would fill the memory of most machines. `progress` counts
    bytes in fp32. The checkpoint must stay open.
    """
    return _with_layers(checkpoint, format, StreamedLayers(checkpoint, format, progress))


class StreamedLayers(Sequence[LayerWeights[Array]]):
    """The layers of a checkpoint. Each access reads the layer again."""

    def __init__(
        self, checkpoint: Checkpoint, format: Format | None, progress: Progress = ignore_progress
    ) -> None:
        self._checkpoint, self._format, self._progress = checkpoint, format, progress

    def __len__(self) -> int:
        return self._checkpoint.config.n_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights[Array]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights[Array]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> LayerWeights[Array] | Sequence[LayerWeights[Array]]:
        layers = range(len(self))[index]
        if isinstance(layers, range):
            return [self[layer] for layer in layers]
        read = partial(_read, self._checkpoint)
        weights = read_layer(read, layers, partial(_rounded, self._format))
        arrays = [getattr(weights, field.name) for field in fields(weights)]
        layer_bytes = sum(of.nbytes for of in arrays if isinstance(of, np.ndarray))
        self._progress("computing the oracle", (layers + 1) * layer_bytes, len(self) * layer_bytes)
        return weights


def _with_layers(
    checkpoint: Checkpoint, format: Format | None, layers: Sequence[LayerWeights[Array]]
) -> ModelWeights[Array]:
    embedding = _rounded(format, _read(checkpoint, "embedding"))
    head = embedding
    if not checkpoint.config.has_tied_head:
        head = _rounded(format, _read(checkpoint, "head"))
    return ModelWeights(embedding, layers, _read(checkpoint, "norm"), head)


def _read(checkpoint: Checkpoint, role: str, layer: int | None = None) -> Array:
    """Read a role's weights. Raises InvalidCheckpoint if they are not finite."""
    w = checkpoint.read(role, layer)
    check_finite(w, role if layer is None else f"{role} of layer {layer}")
    return w


def _rounded(format: Format | None, w: Array) -> Array:
    """Round a whole matrix as it is packed."""
    if format is None:
        return w
    scale = np.float32(find_matrix_scale(format, w, "a matrix"))
    rounded = np.empty(w.shape, np.float32)
    for first in range(0, len(w), ROUNDED_ROWS):  # no block reaches beyond its row
        part = slice(first, first + ROUNDED_ROWS)
        rounded[part] = round_weights(format, w[part] / scale) * scale
    return rounded


class ReferenceSession:
    """One sequence: its KV cache, and the masks of active neurons from the latest call."""

    def __init__(
        self,
        weights: ModelWeights[Array],
        config: ModelConfig,
        format: Format | None = None,
        kv: KvFormat = KvFormat.fp16,
    ) -> None:
        """Without a format, neither activations nor keys and values are rounded."""
        self.weights, self.config, self.format, self.kv = weights, config, format, kv
        self.position = 0
        self.tokens: NDArray[np.int64] = np.empty(0, np.int64)
        self.active: list[NDArray[np.bool_]] = []  # per layer (tokens, n_neurons)
        empty = np.empty((0, config.n_kv_heads, config.head_dim), np.float32)
        self._k = [empty] * config.n_layers
        self._v = [empty] * config.n_layers

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Append tokens and return all their logits (tokens, vocab)."""
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
        return x if self.format is None else reference.round_kv(self.kv, x)


class SideBySide:
    """`forward.Operations` that run several sessions in one pass over the weights.

    If layers are streamed, each layer is read once for all sessions.
    """

    def __init__(self, sessions: Sequence[ReferenceSession]) -> None:
        self.sessions = sessions

    def prefill(
        self, tokens: Sequence[int], weights: ModelWeights[Array], config: ModelConfig
    ) -> list[Array]:
        """Return what each session's own `prefill` would return with `weights`."""
        for session in self.sessions:
            session.tokens, session.active = np.asarray(tokens, np.int64), []
        logits = forward(self, weights, config)
        for session in self.sessions:
            session.position += len(tokens)
        return logits

    def embed(self, weights: ModelWeights[Array], scale: float) -> list[Array]:
        return [session.embed(weights, scale) for session in self.sessions]

    def qkv(self, x: list[Array], weights: LayerWeights[Array], layer: int) -> list[Array]:
        return [s.qkv(own, weights, layer) for s, own in zip(self.sessions, x, strict=True)]

    def attend(
        self,
        x: list[Array],
        q: list[Array],
        weights: LayerWeights[Array],
        layer: int,
        scale: float,
    ) -> list[Array]:
        sessions = zip(self.sessions, x, q, strict=True)
        return [s.attend(own, own_q, weights, layer, scale) for s, own, own_q in sessions]

    def ffn(
        self, x: list[Array], weights: LayerWeights[Array], layer: int, scale: float
    ) -> list[Array]:
        return [s.ffn(own, weights, layer, scale) for s, own in zip(self.sessions, x, strict=True)]

    def head(self, x: list[Array], weights: ModelWeights[Array], scale: float) -> list[Array]:
        return [s.head(own, weights, scale) for s, own in zip(self.sessions, x, strict=True)]
