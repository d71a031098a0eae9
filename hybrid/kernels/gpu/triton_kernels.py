"""The GPU's kernels in Triton, for one token. The contract is that of `torch_kernels`.

Weights stay quantised until they are in registers. Rows of inactive neurons are not read. Nothing
is added atomically: a sum that several programs share is split into partials, which are added in
order. The same token therefore gives the same bits each time.

Importing this module loads torch and triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hybrid.kernels import Activation, Format
from hybrid.kernels.gpu import triton_rows
from hybrid.kernels.gpu.torch_kernels import (
    BLOCK,
    DeviceMatrix,
    Gating,
    LayerCache,
    Neurons,
    Rope,
    TorchKernels,
    Vectors,
)
from hybrid.kernels.gpu.triton_attention import attend_span, merge_spans, rope_and_cache

ROWS = 8  # rows of a matrix per program
CHUNK_BLOCKS = 16  # blocks of 32 columns at a time
DOWN_COLS, DOWN_ROWS = 128, 32
SPAN = 32  # context positions per program of attention

# Values that are then quantised must be rounded as on the CPU: after the product, then after the
# sum.
ROUNDS_EACH = {"enable_fp_fusion": False}
MAY_FUSE = {"enable_fp_fusion": True}

STORE, ADD, GATE = range(3)  # what `gemv` does with a dot product
BF16, Q8, Q4 = range(3)
_FORMATS = {Format.bf16: BF16, Format.q8: Q8, Format.q4: Q4}
RELU, FATRELU, SILU = range(3)
_ACTIVATIONS = {Activation.relu: RELU, Activation.fatrelu: FATRELU, Activation.silu: SILU}


class TritonKernels(TorchKernels):
    """The kernels for one token at a time. All tensors are contiguous and hold one token's row."""

    name = "triton"
    n_splits = 16

    def __init__(self) -> None:
        self._spans: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def n_counts(self, n_rows: int) -> int:
        return max(1, -(-n_rows // ROWS))

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, scale: float, out: Tensor, quant: Vectors
    ) -> None:
        values, scales = _arguments(quant.values, quant.scales)
        triton_rows.norm[(1,)](
            x,
            weight,
            out,
            values,
            scales,
            eps,
            scale,
            N=weight.numel(),
            N_BLOCKS=16,
            IS_BF16=quant.scales is None,
            **ROUNDS_EACH,
        )

    def quantize(self, x: Tensor, out: Vectors) -> None:
        values, scales = _arguments(out.values, out.scales)
        grid = (triton.cdiv(triton.cdiv(x.numel(), BLOCK), 8),)
        is_bf16 = out.scales is None
        triton_rows.quantize[grid](
            x, values, scales, N=x.numel(), N_BLOCKS=8, IS_BF16=is_bf16, **ROUNDS_EACH
        )

    def linear(self, matrix: DeviceMatrix, x: Vectors, out: Tensor) -> None:
        self._gemv(matrix, x, out, STORE, 0.0)

    def add_linear(self, matrix: DeviceMatrix, x: Vectors, scale: float, residual: Tensor) -> None:
        self._gemv(matrix, x, residual, ADD, scale)

    def gates(self, matrix: DeviceMatrix, x: Vectors, gating: Gating, out: Tensor) -> None:
        self._gemv(matrix, x, out, GATE, gating.threshold, _ACTIVATIONS[gating.activation])

    def up(
        self,
        matrix: DeviceMatrix,
        x: Vectors,
        activation: Activation,
        computes_all: bool,
        neurons: Neurons,
    ) -> None:
        self._up(None, matrix, x, Gating(activation, 0.0), computes_all, neurons)

    def gates_and_up(
        self,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        x: Vectors,
        gating: Gating,
        computes_all: bool,
        neurons: Neurons,
    ) -> None:
        self._up(gate, up, x, gating, computes_all, neurons)

    def down(
        self, matrix: DeviceMatrix, values: Tensor, computes_all: bool, partials: Tensor
    ) -> None:
        packed, scales = _arguments(matrix.values, matrix.scales)
        per_split = triton.cdiv(triton.cdiv(matrix.n_rows, self.n_splits), DOWN_ROWS) * DOWN_ROWS
        hidden = int(partials.shape[-1])
        triton_rows.down[(triton.cdiv(hidden, DOWN_COLS), self.n_splits)](
            packed,
            scales,
            values,
            partials,
            matrix.n_rows,
            per_split,
            N=hidden,
            N_STORED=matrix.n_cols,
            N_ROWS=DOWN_ROWS,
            N_COLS=DOWN_COLS,
            FORMAT=_FORMATS[matrix.format],
            SKIPS=not computes_all,
            **MAY_FUSE,
        )

    def merge(
        self, partials: Tensor | None, cold: Tensor | None, scale: float, residual: Tensor
    ) -> None:
        n = residual.numel()
        triton_rows.merge[(triton.cdiv(n, 256),)](
            residual if partials is None else partials,
            residual if cold is None else cold,
            residual,
            scale,
            N=n,
            N_SPLITS=0 if partials is None else self.n_splits,
            HAS_COLD=cold is not None,
            WIDTH=256,
            **MAY_FUSE,
        )

    def rope_and_cache(
        self, qkv: Tensor, rope: Rope, position: Tensor, q: Tensor, cache: LayerCache
    ) -> None:
        n_heads, head_dim = int(q.shape[-2]), int(q.shape[-1])
        n_kv_heads, n_context = int(cache.k.shape[0]), int(cache.k.shape[1])
        rope_and_cache[(n_heads + 2 * n_kv_heads,)](
            qkv,
            *rope,
            position,
            q,
            *cache,
            head_dim**-0.5,
            n_context,
            N_HEADS=n_heads,
            N_KV_HEADS=n_kv_heads,
            HALF=head_dim // 2,
            WIDTH=triton.next_power_of_2(head_dim // 2),
            **MAY_FUSE,
        )

    def attend(
        self,
        q: Tensor,
        cache: LayerCache,
        position: Tensor,
        n_visible: int,
        out: Tensor,
        quant: Vectors,
    ) -> None:
        n_heads, head_dim = int(q.shape[-2]), int(q.shape[-1])
        n_kv_heads, n_context = int(cache.k.shape[0]), int(cache.k.shape[1])
        n_spans = triton.cdiv(n_visible, SPAN)
        largest, sums, values = self._span_scratch(n_spans, n_heads, head_dim, q.device)
        sizes = {"N_HEADS": n_heads, "DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim)}
        group = n_heads // n_kv_heads
        attend_span[(n_kv_heads, n_spans)](
            q,
            *cache,
            position,
            largest,
            sums,
            values,
            n_context,
            GROUP=group,
            GROUP_WIDTH=triton.next_power_of_2(group),
            SPAN=SPAN,
            **sizes,
            **MAY_FUSE,
        )
        merge_spans[(n_heads,)](largest, sums, values, out, n_spans, CHUNK=32, **sizes, **MAY_FUSE)
        self.quantize(out, quant)

    def _span_scratch(
        self, n_spans: int, n_heads: int, head_dim: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The scratch tensors between `attend_span` and `merge_spans`; all layers share them."""
        key = (n_spans, n_heads, head_dim, device)
        if key not in self._spans:
            shape = n_spans * n_heads
            self._spans[key] = (
                torch.zeros(shape, device=device),
                torch.zeros(shape, device=device),
                torch.zeros(shape * head_dim, device=device),
            )
        return self._spans[key]

    def _gemv(
        self,
        matrix: DeviceMatrix,
        x: Vectors,
        out: Tensor,
        then: int,
        number: float,
        activation: int = SILU,
    ) -> None:
        values, scales = _arguments(matrix.values, matrix.scales)
        x_values, x_scales = _arguments(x.values, x.scales)
        triton_rows.gemv[(triton.cdiv(matrix.n_rows, ROWS),)](
            values,
            scales,
            x_values,
            x_scales,
            out,
            number,
            matrix.n_rows,
            N=matrix.n_cols,
            N_ROWS=ROWS,
            N_BLOCKS=CHUNK_BLOCKS,
            FORMAT=_FORMATS[matrix.format],
            THEN=then,
            ACTIVATION=activation,
            **MAY_FUSE,
        )

    def _up(
        self,
        gate: DeviceMatrix | None,
        up: DeviceMatrix,
        x: Vectors,
        gating: Gating,
        computes_all: bool,
        neurons: Neurons,
    ) -> None:
        values, scales = _arguments(up.values, up.scales)
        gate_values, gate_scales = values, scales
        if gate is not None:
            gate_values, gate_scales = _arguments(gate.values, gate.scales)
        x_values, x_scales = _arguments(x.values, x.scales)
        triton_rows.up[(triton.cdiv(up.n_rows, ROWS),)](
            gate_values,
            gate_scales,
            values,
            scales,
            x_values,
            x_scales,
            *neurons,
            gating.threshold,
            up.n_rows,
            N=up.n_cols,
            N_ROWS=ROWS,
            N_BLOCKS=CHUNK_BLOCKS,
            FORMAT=_FORMATS[up.format],
            ACTIVATION=_ACTIVATIONS[gating.activation],
            HAS_GATES=gate is None,
            SKIPS=not computes_all,
            **MAY_FUSE,
        )


def _arguments(values: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """A kernel's two tensors. bf16 is passed as its bits, also in place of the missing scales."""
    if scales is None:
        bits = values.view(torch.int16)
        return bits, bits
    return values, scales
