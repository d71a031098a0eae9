"""The weights of a synthetic model, made from (seed, role, layer) alone, without a file.

This is recipe 1, and it is frozen. A change makes a new benchmark, which needs a new number.

- Residual dimensions 0-31 are one whole quantisation block. They hold a constant that no layer
  writes to, and serve as the bias of every neuron, which `calibration` sets.
- gate = C·F + 0.3·noise, where F has 127 rows, so a small predictor can predict much of it.
- Branches of a layer add about 0.15 of the first residual, so activations stay of order 1.
- Attention selects a few positions, however long the context is. If it averaged over all, its
  output would shrink with the context's length, and the active fraction would change with it.

Numbers are the raw bits of a generator, which NumPy keeps stable, mapped through tables. This takes
seconds for a billion weights. `standard_normal` takes a quarter of a minute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels.reference import bf16_bits, bf16_values
from hybrid.model.config import ModelConfig

RECIPE = 1
ACTIVE_FRACTION = 0.1211  # 1 - the sparsity that MiniCPM-S-1B's authors published
BIAS_DIMS = 32

_BETA = 0.6  # a neuron's probability to fire is Beta(0.6, 0.6 (1 - p) / p): few hot, many cold
_RAREST = 1e-4  # least probability: a thousand tokens cannot calibrate rarer neurons
_MAX_RANK = 127
_NOISE = 0.3
_BRANCH = 0.15
_QK_STD = 3.0  # standard deviation of a query's and a key's elements
_CHUNK = 1 << 18  # weights made at a time, so that temporary arrays stay in the cache

# Streams of random numbers. The index in this list is part of the recipe.
_STREAMS = (
    *("embedding", "q", "k", "v", "o", "gate", "up", "down"),
    *("gate_mix", "gate_projection", "neuron_order", "calibration", "held_out"),
)

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SyntheticWeights:
    """The tensors of a model of `config`'s shape. Each call makes its tensor again."""

    config: ModelConfig
    seed: int

    def make(self, role: str, layer: int | None, bias: Array | None = None) -> Array:
        """Return bf16 values as float32, in the shapes of `families.expected_tensors`.

        `bias` (n_neurons,) is the gate's value in the columns of the constant dimensions.
        """
        config = self.config
        hidden, n_neurons = config.hidden_size, config.n_neurons
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        unit = hidden**-0.5  # gives outputs of deviation 1, because the input is normed
        branch = _BRANCH / config.residual_scale
        match role:
            case "norm" | "attention_norm" | "ffn_norm":
                return np.ones(hidden, np.float32)
            case "embedding":
                std = 1 / config.embedding_scale
                w = self._normal(role, None, (config.vocab_size, hidden), std)
                w[:, :BIAS_DIMS] = _bf16(np.float32(std))
            case "head":
                w = self._normal("embedding", 1, (config.vocab_size, hidden), unit)
            case "q":
                w = self._normal(role, layer, (queries, hidden), unit * _QK_STD)
            case "k":
                w = self._normal(role, layer, (keys, hidden), unit * _QK_STD)
            case "v":
                w = self._normal(role, layer, (keys, hidden), unit)
            case "o":
                w = self._normal(role, layer, (hidden, queries), branch * queries**-0.5)
                w[:BIAS_DIMS] = 0
            case "up":
                w = self._normal(role, layer, (n_neurons, hidden), unit)
            case "down":
                power = n_neurons * _mean_square_activation(n_neurons)
                w = self._normal(role, layer, (hidden, n_neurons), branch * power**-0.5)
                w[:BIAS_DIMS] = 0
            case "gate":
                w = self._gate(layer)
                w[:, :BIAS_DIMS] = 0 if bias is None else bias[:, None]
            case _:
                raise AssertionError(role)
        return w

    def token_ids(self, stream: str, shape: tuple[int, int]) -> NDArray[np.int64]:
        """Return uniform random ids of a stream, "calibration" or "held_out"."""
        raw = self._source(stream, None).random_raw(shape[0] * shape[1])
        return (raw % np.uint64(self.config.vocab_size)).astype(np.int64).reshape(shape)

    def firing_quantiles(self, layer: int) -> Array:
        """Return, per neuron, the normal quantile of the probability that it should fire with."""
        n_neurons = self.config.n_neurons
        raw = self._source("neuron_order", layer).random_raw(n_neurons)
        return firing_quantiles(n_neurons)[np.argsort(raw, kind="stable")]

    def _gate(self, layer: int | None) -> Array:
        hidden, n_neurons = self.config.hidden_size, self.config.n_neurons
        rank = min(_MAX_RANK, hidden // 4)
        # These integers are so small that their sums are exact in fp32. So every BLAS gives the
        # same weights.
        levels = np.rint(32 * _normal_levels()).astype(np.float32)
        mix = self._sample("gate_mix", layer, (n_neurons, rank), levels)
        projection = self._sample("gate_projection", layer, (rank, hidden), levels)
        planted_std = ((1 + _NOISE**2) * hidden) ** -0.5
        power = float(np.square(levels, dtype=np.float64).mean())
        w = mix @ projection
        w *= np.float32(planted_std / (rank**0.5 * power))
        w += self._normal("gate", layer, w.shape, planted_std * _NOISE)
        bits = w.view(np.uint32)
        bits += np.uint32(0x8000)  # round to the nearest bf16, in place
        bits &= np.uint32(0xFFFF0000)
        return w

    def _normal(self, stream: str, layer: int | None, shape: tuple[int, int], std: float) -> Array:
        return self._sample(stream, layer, shape, _bf16(_normal_levels() * np.float32(std)))

    def _sample(
        self, stream: str, layer: int | None, shape: tuple[int, int], levels: Array
    ) -> Array:
        """Draw each weight independently and uniformly from the 65,536 `levels`."""
        source = self._source(stream, layer)
        w = np.empty(shape, np.float32)
        flat = w.reshape(-1)
        for first in range(0, flat.size, _CHUNK):
            part = flat[first : first + _CHUNK]
            raw = source.random_raw(-(-part.size // 4)).astype("<u8", copy=False)
            part[:] = levels[raw.view("<u2")[: part.size]]
        return w

    def _source(self, stream: str, layer: int | None) -> np.random.SFC64:
        key = (_STREAMS.index(stream), 0 if layer is None else layer)
        return np.random.SFC64(np.random.SeedSequence(self.seed, spawn_key=key))


@cache
def firing_quantiles(n_neurons: int) -> Array:
    """Return the normal quantiles of evenly spaced quantiles of the Beta distribution, ascending.

    They represent the distribution itself rather than a draw from it, so that small layers also
    reach the wanted active fraction.
    """
    other = _BETA * (1 - ACTIVE_FRACTION) / ACTIVE_FRACTION
    u = np.linspace(0, 1, (1 << 16) + 1)  # u = p ** _BETA has a density without a pole
    density = (1 - u ** (1 / _BETA)) ** (other - 1)
    cdf = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    levels = (np.arange(n_neurons) + 0.5) / n_neurons
    p = np.interp(levels, cdf / cdf[-1], u) ** (1 / _BETA)
    inverse = NormalDist().inv_cdf
    return np.array([inverse(q) for q in np.clip(p, _RAREST, 1 - _RAREST)], np.float32)


@cache
def _mean_square_activation(n_neurons: int) -> float:
    """Return the mean over neurons of E[x²; x > 0].

    x is normal with deviation 1, and its mean gives the wanted probability to fire.
    """
    normal = NormalDist()
    z = firing_quantiles(n_neurons).tolist()
    return math.fsum((q * q + 1) * normal.cdf(q) + q * normal.pdf(q) for q in z) / n_neurons


@cache
def _normal_levels() -> Array:
    """Return 65,536 equally likely values that together have the normal distribution."""
    inverse = NormalDist().inv_cdf
    lower = np.array([inverse((i + 0.5) / 65536) for i in range(32768)], np.float32)
    return np.concatenate((lower, -lower[::-1]))


def _bf16(x: Array | np.float32) -> Array:
    return bf16_values(bf16_bits(np.asarray(x, np.float32)))
