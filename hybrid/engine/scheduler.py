"""Scheduler: which device computes which part of a layer, and when they exchange data.

It does no arithmetic: `forward` calls it, and it calls the CPU's side and the GPU's side. In a
layer whose FFN is split, the GPU computes its gates and signals the CPU to begin with the cold
neurons. Meanwhile the GPU adds up the hot neurons. `finish_ffn` adds both partial sums.
"""

from __future__ import annotations

from typing import Any, Literal

from hybrid.model.weights import LayerWeights, ModelWeights
from hybrid.placement.plan import LayerPlacement, PlacementPlan

Place = Literal["cpu", "gpu"]  # the device that holds the residual stream


class Scheduler:
    """`forward.Operations` over two sides, of which one may be `SILENT`.

    The GPU's side is silent while the CPU's program is recorded. The CPU's side is silent while the
    GPU's work is launched or recorded.
    """

    def __init__(self, plan: PlacementPlan, cpu: Any, gpu: Any) -> None:
        self.plan, self.cpu, self.gpu = plan, cpu, gpu

    def embed(self, weights: ModelWeights[Any], scale: float) -> Place:
        self.gpu.start_token()
        self.cpu.embed(weights, scale)
        return "cpu"

    def qkv(self, x: Place, weights: LayerWeights[Any], layer: int) -> None:
        if self._on_gpu(layer):
            self._move(x, "gpu")
            self.gpu.qkv(layer)
        else:
            self._move(x, "cpu")
            self.cpu.qkv(None, weights, layer)

    def attend(
        self, x: Place, q: None, weights: LayerWeights[Any], layer: int, scale: float
    ) -> Place:
        if self._on_gpu(layer):
            self.gpu.attend(layer, scale)
            return "gpu"
        self.cpu.attend(None, None, weights, layer, scale)
        return "cpu"

    def ffn(self, x: Place, weights: LayerWeights[Any], layer: int, scale: float) -> Place:
        placement = self.plan.layers[layer]
        if not placement.is_on_gpu:
            self.cpu.ffn(None, weights, layer, scale)
            return "cpu"
        self.gpu.norm_ffn(layer)
        if self.plan.is_split(placement):
            self._split_ffn(weights, layer, placement)
        else:
            self.gpu.whole_ffn(layer)
        self.gpu.finish_ffn(layer, scale)
        return "gpu"

    def _split_ffn(self, weights: LayerWeights[Any], layer: int, placement: LayerPlacement) -> None:
        # The CPU begins as early as possible: before the GPU's gates, unless it needs some of them.
        needs_gates = placement.n_gate > placement.n_hot
        if needs_gates:
            self.gpu.find_active(layer)
        self.gpu.start_cold(layer)
        self.cpu.cold_ffn(weights, layer, placement.n_hot, placement.n_gate)
        self.cpu.end_segment(sends_x=False)
        if not needs_gates:
            self.gpu.find_active(layer)
        self.gpu.add_hot(layer)
        self.gpu.finish_cold()

    def head(self, x: Place, weights: ModelWeights[Any], scale: float) -> None:
        if self.plan.is_head_on_gpu:
            self._move(x, "gpu")
            self.gpu.head(scale)
        else:
            self._move(x, "cpu")
            self.cpu.head(None, weights, scale)
        self.gpu.end_token()

    def _on_gpu(self, layer: int) -> bool:
        return self.plan.layers[layer].is_on_gpu

    def _move(self, x: Place, to: Place) -> None:
        if x == to:
            return
        if to == "gpu":
            self.cpu.end_segment(sends_x=True)
            self.gpu.take_x()
        else:
            self.gpu.send_x()
            self.cpu.receive_x()


class Silent:
    """A side that accepts every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


SILENT = Silent()
