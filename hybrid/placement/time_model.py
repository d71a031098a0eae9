"""Time model: predicts how long a token takes under a plan.

The time is bytes over measured bandwidths, plus fixed costs per layer, kernel and hand-off. The
solver minimises it, and `hybrid.plan` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.placement.machine import Machine
from hybrid.placement.plan import BUCKET, LayerPlacement, PlacementPlan
from hybrid.placement.sizes import ModelSizes

# Kernels per part of a decode graph (engine/gpu/operations.py). Attention: norm, qkv, rope,
# attention, its merge, output. Gates: norm, gates. Hot: up, down. Merge: merge. Head: norm, rows,
# copy.
ATTENTION_NODES, GATE_NODES, HOT_NODES, MERGE_NODES, HEAD_NODES = 6, 2, 2, 1, 3


@dataclass(frozen=True, slots=True)
class PredictorCost:
    """Cost of a layer's predictor on the CPU."""

    n_bytes: int  # bytes that the predictor reads per token
    predicted_fraction: float  # share of the neurons whose gates it names


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer for one token. `hot` and `cold` run at the same time."""

    before: float  # attention, and the GPU's gates
    hot: float
    cold: float  # the CPU's segment with its hand-off; 0 if it has none
    after: float

    @property
    def total(self) -> float:
        return self.before + max(self.hot, self.cold) + self.after


class TimeModel:
    """Seconds per token of any plan of one model on one machine."""

    def __init__(
        self,
        machine: Machine,
        sizes: ModelSizes,
        frequencies: NDArray[np.float64],
        *,
        n_positions: int = 512,
        predictors: tuple[PredictorCost | None, ...] | None = None,
    ) -> None:
        """`frequencies` (n_layers, n_neurons): share of tokens for which each neuron fires.

        Neurons are in packed order. `n_positions` is the number of positions that a token attends
        to.
        """
        self.machine, self.sizes, self.n_positions = machine, sizes, n_positions
        self.frequencies = frequencies
        self.predictors = predictors or (None,) * sizes.config.n_layers
        zero = np.zeros((len(frequencies), 1))
        # [layer, n]: expected number of active neurons among the first n.
        self._active = np.concatenate((zero, frequencies.cumsum(1)), 1)

    def plan(self, plan: PlacementPlan) -> float:
        """Return the seconds per token."""
        total, on_gpu = 0.0, False
        for layer, placement in enumerate(plan.layers):
            total += self.layer(layer, placement).total
            if placement.is_on_gpu != on_gpu:
                total += self.switch
            on_gpu = placement.is_on_gpu
        if plan.is_head_on_gpu != on_gpu:
            total += self.switch
        return total + self.head(plan.is_head_on_gpu)

    @property
    def switch(self) -> float:
        """Seconds to send the residual stream to the other device."""
        return 0.0 if self.machine.gpu is None else self.machine.gpu.hand_off_us * 1e-6

    def head(self, is_on_gpu: bool) -> float:
        gpu = self.machine.gpu
        if is_on_gpu:
            assert gpu is not None
            seconds = self.sizes.head_rows / gpu.stream_gbs * 1e-9
            return seconds + HEAD_NODES * gpu.node_us * 1e-6
        return self.sizes.cpu_head / self.machine.cpu.stream_gbs * 1e-9

    def layer(self, layer: int, placement: LayerPlacement) -> LayerTime:
        c, sizes, cpu = self.sizes.config, self.sizes, self.machine.cpu
        n = c.n_neurons
        if not placement.is_on_gpu:
            attention = (
                sizes.cpu_attention / cpu.stream_gbs + sizes.kv(self.n_positions) / cpu.kv_gbs
            )
            ffn = self.cold_gates(layer, 0, n) + self.cold_rows(layer, 0, n)
            return LayerTime(attention * 1e-9 + cpu.layer_us * 1e-6, 0.0, ffn, 0.0)
        gpu = self.machine.gpu
        assert gpu is not None
        attention = (sizes.attention + sizes.kv(self.n_positions)) / gpu.stream_gbs
        gates = placement.n_gate * sizes.neuron / gpu.stream_gbs
        nodes = ATTENTION_NODES + GATE_NODES
        before = (attention + gates) * 1e-9 + nodes * gpu.node_us * 1e-6
        hot = self.hot_rows(layer, 0, placement.n_hot)
        hot += HOT_NODES * gpu.node_us * 1e-6 if placement.n_hot else 0.0
        cold = 0.0
        if placement.n_hot < n:
            cold = gpu.hand_off_us * 1e-6 + 0.5 * cpu.layer_us * 1e-6
            cold += self.cold_gates(layer, placement.n_gate, n)
            cold += self.cold_rows(layer, placement.n_hot, n)
        return LayerTime(before, hot, cold, MERGE_NODES * gpu.node_us * 1e-6)

    def active(self, layer: int, first: int, last: int) -> float:
        """Return the expected number of active neurons in [first, last)."""
        return float(self._active[layer, last] - self._active[layer, first])

    def cold_gates(self, layer: int, first: int, last: int) -> float:
        """Return the seconds that the CPU needs to find the active neurons of [first, last)."""
        row, cpu = self.sizes.cpu_neuron, self.machine.cpu
        predictor = self.predictors[layer]
        if predictor is None or first == last:
            return (last - first) * row / cpu.stream_gbs * 1e-9
        share = (last - first) / self.sizes.config.n_neurons
        named = predictor.predicted_fraction * (last - first) * row / cpu.gather_gbs
        return (share * predictor.n_bytes / cpu.stream_gbs + named) * 1e-9

    def cold_rows(self, layer: int, first: int, last: int) -> float:
        """Return the seconds for up and down rows of active neurons on the CPU."""
        n_bytes = 2 * self.sizes.cpu_neuron * self.active(layer, first, last)
        return n_bytes / self.machine.cpu.gather_gbs * 1e-9

    def hot_rows(self, layer: int, first: int, last: int) -> float:
        """Return the seconds for up and down rows of active neurons on the GPU."""
        assert self.machine.gpu is not None
        n_bytes = 2 * self.sizes.neuron * self.active(layer, first, last)
        return n_bytes / self.machine.gpu.gather_gbs * 1e-9


def flat_frequencies(n_layers: int, n_neurons: int, mean: float) -> NDArray[np.float64]:
    """Return equal frequencies for all neurons, for models without a profile."""
    return np.full((n_layers, n_neurons), mean)


def buckets(n_neurons: int, n_buckets: int = 15) -> list[tuple[int, int]]:
    """Return about `n_buckets` ranges of neurons that begin at multiples of BUCKET."""
    step = max(1, round(n_neurons / BUCKET / n_buckets)) * BUCKET
    return [(first, min(first + step, n_neurons)) for first in range(0, n_neurons, step)]
