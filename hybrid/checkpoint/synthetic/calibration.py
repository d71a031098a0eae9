"""Calibrates a synthetic model: finds gate biases with which neurons fire as often as wanted.

Layers are calibrated in order. The input of each is the output of the calibrated layers before it
for random tokens. Weights and activations are rounded as the format rounds them. The forward pass
is that of `hybrid.model.forward` for whole batches, with the weights of one layer in memory.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.synthetic.weights import ACTIVE_FRACTION, BIAS_DIMS, SyntheticWeights
from hybrid.kernels import Format, reference
from hybrid.model.families import expected_tensors
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
    biases, n_active = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        batch = _Batch(weights, format, workers)
        for layer in range(config.n_layers):
            batch.attend(layer)
            bias, n = batch.calibrate_ffn(layer)
            biases.append(bias)
            n_active += n
            progress(task, sum(sizes[: layer + 1]), sum(sizes))
    n_held_out = HELD_OUT_SHAPE[0] * HELD_OUT_SHAPE[1] * config.n_layers * config.n_neurons
    return Calibration(np.stack(biases), n_active / n_held_out)


class _Batch:
    """The residual of all calibration and held-out tokens, which passes through the layers."""

    def __init__(self, weights: SyntheticWeights, format: Format, workers: Executor) -> None:
        self.weights, self.config, self.format = weights, weights.config, format
        self._workers = workers
        calibration = weights.token_ids("calibration", CALIBRATION_SHAPE)
        ids = np.concatenate((calibration, weights.token_ids("held_out", HELD_OUT_SHAPE)))
        self._n_calibration = calibration.size
        self._n_sequences, n_tokens = ids.shape
        rows = weights.make("embedding", None)[ids.reshape(-1)]
        self.x = self._rounded(rows) * np.float32(self.config.embedding_scale)
        cos, sin = reference.rope_tables(self.config.head_dim, self.config.rope_theta, n_tokens)
        self._cos, self._sin = np.tile(cos, (len(ids), 1)), np.tile(sin, (len(ids), 1))

    def attend(self, layer: int) -> None:
        config = self.config
        h = self._normed()

        def heads(role: str) -> Array:  # (sequences * tokens, heads, head_dim)
            w = self._rounded(self.weights.make(role, layer))
            return (h @ w.T).reshape(len(h), -1, config.head_dim)

        q = reference.rope(heads("q"), self._cos, self._sin)
        k, v = _cached(reference.rope(heads("k"), self._cos, self._sin)), _cached(heads("v"))
        # Use our own threads, because BLAS would start and stop its own for each small product.
        split = [np.split(part, self._n_sequences) for part in (q, k, v)]
        results = self._workers.map(lambda q, k, v: reference.attention(q, k, v, 0), *split)
        y = np.concatenate(list(results)).reshape(len(h), -1)
        o = self._rounded(self.weights.make("o", layer))
        self.x += np.float32(config.residual_scale) * (
            reference.round_activation(self.format, y) @ o.T
        )

    def calibrate_ffn(self, layer: int) -> tuple[Array, int]:
        """Return the layer's biases, and the number of active neurons on the held-out tokens."""
        threshold = np.float32(self.config.threshold)
        h = self._normed()
        gate = h @ self._rounded(self.weights.make("gate", layer)).T  # still without bias
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
        gate += constant * self._rounded(np.tile(bias[:, None], BIAS_DIMS))[:, 0]
        active = gate >= threshold
        gate *= h @ self._rounded(self.weights.make("up", layer)).T
        gate *= active
        down = np.ascontiguousarray(self.weights.make("down", layer).T)
        self.x += np.float32(self.config.residual_scale) * (gate @ self._rounded(down))
        return bias, int(np.count_nonzero(active[self._n_calibration :]))

    def _normed(self) -> Array:
        ones = np.ones(self.config.hidden_size, np.float32)  # the recipe's norms
        h = reference.rms_norm(self.x, ones, self.config.rms_norm_eps)
        return reference.round_activation(self.format, h)

    def _rounded(self, w: Array) -> Array:
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
