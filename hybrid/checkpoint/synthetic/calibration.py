"""Calibrates a synthetic model: finds gate biases with which neurons fire as often as wanted.

Layers are calibrated in order. The input of each is the output of the calibrated layers before it
for random tokens. Weights and activations are rounded as the format rounds them. The weights of one
layer are in memory at a time.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.synthetic.weights import ACTIVE_FRACTION, BIAS_DIMS, SyntheticWeights
from hybrid.kernels import Format, reference
from hybrid.limits import allowed_threads
from hybrid.model.families import expected_tensors
from hybrid.model.forward import forward_layer
from hybrid.model.weights import LayerWeights, read_layer
from hybrid.progress import Progress
from hybrid.weights.formats import round_weights

CALIBRATION_SHAPE = (8, 128)  # sequences, tokens
HELD_OUT_SHAPE = (2, 128)
_CHUNK_ROWS = 128  # rows rounded at a time, so that NumPy's temporary arrays stay in the cache

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Calibration:
    gate_bias: Array  # (n_layers, n_neurons), bf16 values
    active_fraction: float  # on held-out tokens


def calibrate(
    weights: SyntheticWeights, format: Format, progress: Progress, task: str
) -> Calibration:
    """Find the gate biases. This takes a minute for 1 B parameters.

    `progress` counts bytes as if the weights came from a bf16 file.
    """
    config = weights.config
    sizes = [0] * config.n_layers
    for _, layer, _, shape in expected_tensors(config):
        if layer is not None:
            sizes[layer] += 2 * int(np.prod(shape))
    progress(task, 0, sum(sizes))
    with ThreadPoolExecutor(allowed_threads()) as workers:
        batch = _Batch(weights, format, workers)
        x = batch.embed()
        for layer in range(config.n_layers):
            x = forward_layer(
                batch,
                x,
                read_layer(weights.make, layer, batch.rounded),  # gates without bias
                layer,
                config.residual_scale,
            )
            progress(task, sum(sizes[: layer + 1]), sum(sizes))
    n_held_out = HELD_OUT_SHAPE[0] * HELD_OUT_SHAPE[1] * config.n_layers * config.n_neurons
    return Calibration(np.stack(batch.biases), batch.n_active / n_held_out)


class _Batch:
    """`forward.LayerOperations` over all calibration and held-out tokens.

    `ffn` finds the layer's biases before it uses them.
    """

    def __init__(self, weights: SyntheticWeights, format: Format, workers: Executor) -> None:
        self.weights, self.config, self.format = weights, weights.config, format
        self._workers = workers
        self.biases: list[Array] = []  # per layer (n_neurons,)
        self.n_active = 0  # (neuron, token) pairs of the held-out tokens that fire
        calibration = weights.token_ids("calibration", CALIBRATION_SHAPE)
        self._ids = np.concatenate((calibration, weights.token_ids("held_out", HELD_OUT_SHAPE)))
        self._n_calibration = calibration.size
        n_sequences, n_tokens = self._ids.shape
        cos, sin = reference.rope_tables(self.config.head_dim, self.config.rope_theta, n_tokens)
        self._cos, self._sin = np.tile(cos, (n_sequences, 1)), np.tile(sin, (n_sequences, 1))

    def embed(self) -> Array:
        rows = self.weights.make("embedding", None)[self._ids.reshape(-1)]
        return self.rounded(rows) * np.float32(self.config.embedding_scale)

    def qkv(self, x: Array, weights: LayerWeights[Array], layer: int) -> tuple[Array, Array, Array]:
        config = self.config
        h = self._normed(x, weights.attention_norm)
        ends = np.cumsum([config.n_heads, config.n_kv_heads]) * config.head_dim
        # Keep three products: BLAS may sum one large product in another order, which the frozen
        # recipe forbids.
        q, k, v = (
            (h @ w.T).reshape(len(h), -1, config.head_dim) for w in np.split(weights.qkv, ends)
        )
        k = reference.rope(k, self._cos, self._sin)
        return reference.rope(q, self._cos, self._sin), _cached(k), _cached(v)

    def attend(
        self,
        x: Array,
        q: tuple[Array, Array, Array],
        weights: LayerWeights[Array],
        layer: int,
        scale: float,
    ) -> Array:
        # Use our own threads, because BLAS would start and stop its own for each small product.
        split = [np.split(part, len(self._ids)) for part in q]
        results = self._workers.map(lambda q, k, v: reference.attention(q, k, v, 0), *split)
        y = np.concatenate(list(results)).reshape(len(x), -1)
        return x + np.float32(scale) * (reference.round_activation(self.format, y) @ weights.o.T)

    def ffn(self, x: Array, weights: LayerWeights[Array], layer: int, scale: float) -> Array:
        threshold = np.float32(self.config.threshold)
        h = self._normed(x, weights.ffn_norm)
        gate = h @ weights.gate.T  # still without bias
        constant = h[:, :BIAS_DIMS].sum(-1, keepdims=True)  # the factor of a bias
        # A neuron fires if gate + bias * constant >= threshold, which means margin >= -bias.
        margin = ((gate - threshold) / constant)[: self._n_calibration]
        mean, std = margin.mean(0), margin.std(0)
        quantile = self.weights.firing_quantiles(layer)
        # Margins are not exactly normal, so one shift for all neurons corrects the layer's mean.
        shift = -np.quantile((margin - mean) / std + quantile, 1 - ACTIVE_FRACTION)
        bias = reference.bf16_values(
            reference.bf16_bits(std * (quantile + np.float32(shift)) - mean)
        )
        gate += constant * self.rounded(np.tile(bias[:, None], BIAS_DIMS))[:, 0]
        active = gate >= threshold
        gate *= h @ weights.up.T
        gate *= active
        self.biases.append(bias)
        self.n_active += int(np.count_nonzero(active[self._n_calibration :]))
        return x + np.float32(scale) * (gate @ weights.down)

    def _normed(self, x: Array, weight: Array) -> Array:
        h = reference.rms_norm(x, weight, self.config.rms_norm_eps)
        return reference.round_activation(self.format, h)

    def rounded(self, w: Array) -> Array:
        """Round `w` in place to the values that the format stores, and return it."""

        def round_rows(first: int) -> None:
            part = slice(first, first + _CHUNK_ROWS)
            w[part] = round_weights(self.format, w[part])

        if self.format is not Format.bf16:  # all weights are bf16 values
            for _ in self._workers.map(round_rows, range(0, len(w), _CHUNK_ROWS)):
                pass
        return w


def _cached(x: Array) -> Array:
    """Round to fp16, as the KV cache does."""
    return x.astype(np.float16).astype(np.float32)
