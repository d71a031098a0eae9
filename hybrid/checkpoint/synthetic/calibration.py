"""Calibration of a synthetic model: the gate biases with which its neurons fire as often as asked.

Layers are calibrated in order, each on what the calibrated layers before it give for random tokens,
with weights and activations as the format rounds them. The forward pass is that of
`engine.forward` for whole batches, one layer of weights in memory at a time.
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
_CHUNK_ROWS = 128  # rounded at a time: what NumPy makes on the way stays in the cache

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Calibration:
    gate_bias: Array  # (n_layers, n_neurons), bf16 values
    active_fraction: float  # on tokens that the biases were not set with


def calibrate(
    weights: SyntheticWeights, format: Format, progress: Progress, task: str
) -> Calibration:
    """Work for a minute at 1 B parameters; `progress` counts weights as if they came from a file
    of bf16.
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
    """The residual of all calibration and held-out tokens, taken through the layers."""

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
        # On our own threads: BLAS would start and stop its own for each small product.
        split = [np.split(part, self._n_sequences) for part in (q, k, v)]
        results = self._workers.map(lambda q, k, v: reference.attention(q, k, v, 0), *split)
        y = np.concatenate(list(results)).reshape(len(h), -1)
        o = self._rounded(self.weights.make("o", layer))
        self.x += np.float32(config.residual_scale) * (
            reference.round_activation(self.format, y) @ o.T
        )

    def calibrate_ffn(self, layer: int) -> tuple[Array, int]:
        """The layer's biases, and how many neurons were active on the held-out tokens."""
        threshold = np.float32(self.config.threshold)
        h = self._normed()
        gate = h @ self._rounded(self.weights.make("gate", layer)).T  # still without bias
        constant = h[:, :BIAS_DIMS].sum(-1, keepdims=True)  # what a bias is multiplied with
        # A neuron fires where gate + bias * constant >= threshold: where margin >= -bias.
        margin = ((gate - threshold) / constant)[: self._n_calibration]
        mean, std = margin.mean(0), margin.std(0)
        quantile = self.weights.firing_quantiles(layer)
        # Margins are not quite normal: one shift for all neurons sets the layer's mean exactly.
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
        """What the format stores for `w`, into `w` itself."""

        def round_rows(first: int) -> None:
            part = slice(first, first + _CHUNK_ROWS)
            w[part] = round_weights(self.format, w[part])

        if self.format is not Format.bf16:  # all weights are bf16 values
            for _ in self._workers.map(round_rows, range(0, len(w), _CHUNK_ROWS)):
                pass
        return w


def _cached(x: Array) -> Array:
    """As the KV cache holds it."""
    return x.astype(np.float16).astype(np.float32)
