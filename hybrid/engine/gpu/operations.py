"""The GPU's side of a pass: the operations that the scheduler calls, as kernel launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hybrid.engine.gpu.device import copy
from hybrid.engine.gpu.hand_off import HandOffs
from hybrid.kernels import Activation
from hybrid.kernels.gpu.torch_kernels import Gating, Neurons, TorchKernels, Vectors

if TYPE_CHECKING:
    from hybrid.engine.gpu.executor import HybridExecutor, SessionLane
    from hybrid.engine.gpu.weights import Lane


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over the layers computes."""

    n_tokens: int
    n_visible: int  # positions that attention reads; at least up to the pass's last position
    is_decode: bool
    computes_all: bool  # all neurons, for comparisons


class GpuSide:
    """One pass through the parts that the plan puts on the device."""

    def __init__(
        self, executor: HybridExecutor, lane: SessionLane, hand_offs: HandOffs, shape: Pass
    ) -> None:
        self.device, self.weights = executor.device, executor.weights
        self.kernels: TorchKernels = (
            executor.decode_kernels if shape.is_decode else executor.prefill_kernels
        )
        self.hand_offs, self.config, self.plan = hand_offs, executor.config, executor.plan
        self.n_visible, self.computes_all = shape.n_visible, shape.computes_all
        self.gating = Gating(Activation[self.config.activation], self.config.threshold)
        n, exchange = shape.n_tokens, lane.exchange
        self.host_x, self.host_h, self.host_y = exchange.x[:n], exchange.h[:n], exchange.y[:n]
        self.host_gates = exchange.gates[:n]
        self._view(lane.tensors, n)
        self.has_logits = False

    def _view(self, lane: Lane, n: int) -> None:
        """Take views of the lane's tensors for `n` tokens."""
        self.x, self.h, self.y = lane.x[:n], lane.h[:n], lane.y[:n]
        self.h_quant, self.attention_quant = (
            vectors.tokens(n) for vectors in (lane.h_quant, lane.attention_quant)
        )
        self.qkv_out, self.q, self.attention = lane.qkv[:n], lane.q[:n], lane.attention[:n]
        n_splits = self.kernels.n_splits
        self.partials = lane.decode_partials if n == 1 else lane.partials[:n_splits, :n]
        self.gates, self.values = lane.gates[:n], lane.values[:n]
        self.lane = lane

    def start_token(self) -> None:
        """Signal the CPU to compute the embedding and the layers before the first GPU layer."""
        self.hand_offs.start()

    def take_x(self) -> None:
        self.hand_offs.finish((self.x, self.host_x))

    def send_x(self) -> None:
        self.hand_offs.start((self.host_x, self.x))

    def end_token(self) -> None:
        self.hand_offs.close()

    def qkv(self, layer: int) -> None:
        weights, lane, launch = self.weights.layers[layer], self.lane, self.device.launch
        self._norm(weights.attention_norm, 1.0, self.x, self.h, self.h_quant)
        launch(self.kernels.linear, weights.qkv, self.h_quant, self.qkv_out)
        launch(
            self.kernels.rope_and_cache,
            self.qkv_out,
            self.weights.rope,
            lane.position,
            self.q,
            lane.caches[layer],
        )

    def attend(self, layer: int, scale: float) -> None:
        weights, lane, launch = self.weights.layers[layer], self.lane, self.device.launch
        launch(
            self.kernels.attend,
            self.q,
            lane.caches[layer],
            lane.position,
            self.n_visible,
            self.attention,
            self.attention_quant,
        )
        launch(self.kernels.add_linear, weights.o, self.attention_quant, scale, self.x)

    def norm_ffn(self, layer: int) -> None:
        self._norm(self.weights.layers[layer].ffn_norm, 1.0, self.x, self.h, self.h_quant)

    def find_active(self, layer: int) -> None:
        """Compute the gates that a split layer has on the GPU."""
        placement = self.plan.layers[layer]
        if placement.n_gate > 0:
            self.device.launch(
                self.kernels.gates,
                self.weights.layers[layer].gate,
                self.h_quant,
                self.gating,
                self.gates[:, : placement.n_gate],
            )

    def start_cold(self, layer: int) -> None:
        """Send the CPU the FFN's input and the cold gates that the GPU computed, then signal it.

        The gates tell the CPU which of those neurons fire.
        """
        placement = self.plan.layers[layer]
        # For one token copy the cold gates only. For several tokens copy whole rows, because only
        # whole rows are contiguous.
        is_one = len(self.h) == 1
        cold = slice(placement.n_hot, placement.n_gate) if is_one else slice(None)
        copies = [(self.host_h, self.h)]
        if placement.n_gate > placement.n_hot:
            copies.append((self.host_gates[:, cold], self.gates[:, cold]))
        self.hand_offs.start(*copies)

    def add_hot(self, layer: int) -> None:
        """Compute the partial sum of the hot neurons, whose gates are known."""
        weights, n_hot = self.weights.layers[layer], self.plan.layers[layer].n_hot
        if n_hot == 0:
            return
        hot = Neurons(self.gates[:, :n_hot], self.values[:, :n_hot], self.lane.counts[layer])
        launch, computes_all = self.device.launch, self.computes_all
        activation = self.gating.activation
        launch(self.kernels.up, weights.up, self.h_quant, activation, computes_all, hot)
        launch(self.kernels.down, weights.down, hot.values, computes_all, self.partials)

    def whole_ffn(self, layer: int) -> None:
        """Compute the sum over all neurons of a layer that is whole on the GPU."""
        weights = self.weights.layers[layer]
        self.device.launch(
            self.kernels.gates_and_up,
            weights.gate,
            weights.up,
            self.h_quant,
            self.gating,
            self.computes_all,
            Neurons(self.gates, self.values, self.lane.counts[layer]),
        )
        self.device.launch(
            self.kernels.down, weights.down, self.values, self.computes_all, self.partials
        )

    def finish_cold(self) -> None:
        self.hand_offs.finish((self.y, self.host_y))

    def finish_ffn(self, layer: int, scale: float) -> None:
        """Add both partial sums: x += scale * (hot sum + cold sum)."""
        placement = self.plan.layers[layer]
        partials = self.partials if placement.n_hot > 0 else None
        cold = self.y if self.plan.is_split(placement) else None
        self.device.launch(self.kernels.merge, partials, cold, scale, self.x)

    def head(self, scale: float) -> None:
        """Compute the last token's logits."""
        self.head_of(len(self.x) - 1, scale)
        self.has_logits = True

    def head_of(self, token: int, scale: float) -> None:
        """Compute the logits of one token of the pass. Its residual stream must still be in `x`."""
        assert self.weights.norm is not None
        row = slice(token, token + 1)
        h, quant = self.h[row], _row(self.h_quant, row)
        self._norm(self.weights.norm, scale, self.x[row], h, quant)
        self.device.launch(self.kernels.linear, self.weights.head, quant, self.lane.logits)

    def fetch(self, *copies: tuple[object, object]) -> None:
        for target, source in copies:
            self.device.launch(copy, target, source)

    def _norm(self, weight: Tensor, scale: float, x: Tensor, out: Tensor, quant: Vectors) -> None:
        eps = self.config.rms_norm_eps
        self.device.launch(self.kernels.norm, x, weight, eps, scale, out, quant)


def _row(vectors: Vectors, row: slice) -> Vectors:
    scales = None if vectors.scales is None else vectors.scales[row]
    return Vectors(vectors.values[row], scales)
