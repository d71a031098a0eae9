"""The GPU's kernels as plain torch operations: for every device that torch knows, and the reference
of `triton_kernels`. Importing this module loads torch.

One contract for both. Every kernel writes into tensors that it is given, none allocates what
outlives it, and none waits: so a whole token can be captured into one CUDA graph. Activations are
fp32 (T, n) for T tokens. `Vectors` hold what the CPU's kernels would make of them (see
`csrc/kernels/kernels.h`): gates computed on either device meet the same quantised x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.kernels import Activation, Format

BLOCK = 32  # weights, or activations, that share a scale
CHUNK_VALUES = 1 << 22  # dequantised at a time: 16 MiB, whatever the matrix


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """Rows of weights on a device, in natural order and without padding."""

    format: Format
    # q8: int8 (n_rows, n_cols). bf16: bfloat16 (n_rows, n_cols). q4: uint8 (n_rows, n_cols / 2);
    # byte i of a block's 16 holds element i in its low nibble, 16 + i in its high one, each + 8.
    values: Tensor
    scales: Tensor | None  # q8, q4: fp16 (n_rows, n_cols / 32)

    @property
    def n_rows(self) -> int:
        return int(self.values.shape[0])

    @property
    def n_cols(self) -> int:
        return int(self.values.shape[1]) * (2 if self.format is Format.q4 else 1)

    @property
    def n_bytes(self) -> int:
        scale_bytes = 0 if self.scales is None else self.scales.nbytes
        return int(self.values.nbytes) + scale_bytes

    def rows(self, first: int, last: int) -> DeviceMatrix:
        """A view of rows [first, last)."""
        scales = None if self.scales is None else self.scales[first:last]
        return DeviceMatrix(self.format, self.values[first:last], scales)

    def dequantize(self) -> Tensor:
        """fp32 (n_rows, n_cols)."""
        if self.scales is None:
            return self.values.float()
        if self.format is Format.q8:
            blocks = self.values.view(self.n_rows, -1, BLOCK).float()
        else:
            packed = self.values.view(self.n_rows, -1, BLOCK // 2)
            blocks = torch.cat((packed & 15, packed >> 4), -1).float() - 8.0
        return (blocks * self.scales.float()[..., None]).view(self.n_rows, -1)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, each small enough to be dequantised at once."""
        step = max(1, CHUNK_VALUES // self.n_cols)
        for first in range(0, self.n_rows, step):
            yield first, min(first + step, self.n_rows)


@dataclass(frozen=True, slots=True)
class Vectors:
    """Quantised activations of T tokens."""

    values: Tensor  # q8, q4: int8 (T, n). bf16: bfloat16 (T, n)
    scales: Tensor | None  # q8, q4: fp32 (T, n / 32)

    def tokens(self, n: int) -> Vectors:
        """A view of the first n."""
        return Vectors(self.values[:n], None if self.scales is None else self.scales[:n])

    def dequantize(self) -> Tensor:
        """fp32 (T, n)."""
        if self.scales is None:
            return self.values.float()
        blocks = self.values.view(*self.scales.shape, BLOCK).float()
        return (blocks * self.scales[..., None]).view(self.values.shape)


def empty_vectors(format: Format, n_tokens: int, n: int, device: torch.device) -> Vectors:
    """Room for T vectors of n elements."""
    if format is Format.bf16:
        return Vectors(torch.zeros(n_tokens, n, dtype=torch.bfloat16, device=device), None)
    return Vectors(
        torch.zeros(n_tokens, n, dtype=torch.int8, device=device),
        torch.zeros(n_tokens, n // BLOCK, dtype=torch.float32, device=device),
    )


class TorchKernels:
    """For any number of tokens, on any device."""

    name = "torch"
    n_splits = 1  # partial sums that `down` leaves

    def n_counts(self, n_rows: int) -> int:
        """Counters that `up` needs for so many rows."""
        return 1

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, scale: float, out: Tensor, quant: Vectors
    ) -> None:
        """out (T, hidden) = weight * x / rms(x) * scale, and what it is once quantised."""
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale
        torch.mul(weight, x * inverse, out=out)
        self.quantize(out, quant)

    def quantize(self, x: Tensor, out: Vectors) -> None:
        """x (T, n) → blocks of 32: int8 = round(x * 127 / max|x|); bf16: rounded."""
        if out.scales is None:
            out.values.copy_(x)
            return
        blocks = x.view(*out.scales.shape, BLOCK)
        largest = blocks.abs().amax(-1, keepdim=True)
        inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
        out.values.copy_(torch.round(blocks * inverse).view(x.shape))
        torch.div(largest[..., 0], 127.0, out=out.scales)

    def linear(self, matrix: DeviceMatrix, x: Vectors, out: Tensor) -> None:
        """out (T, n_rows) = x @ matrix.T."""
        values = x.dequantize()
        for first, last in matrix.chunks():
            out[:, first:last] = values @ matrix.rows(first, last).dequantize().T

    def add_linear(self, matrix: DeviceMatrix, x: Vectors, scale: float, residual: Tensor) -> None:
        """residual (T, n_rows) += scale * (x @ matrix.T)."""
        residual += scale * (x.dequantize() @ matrix.dequantize().T)

    def gates(
        self,
        matrix: DeviceMatrix,
        x: Vectors,
        activation: Activation,
        threshold: float,
        out: Tensor,
    ) -> None:
        """out (T, n_rows): what each gate comes to where its neuron fires, else 0.

        A NaN fires, so that it is seen.
        """
        self.linear(matrix, x, out)
        if activation is Activation.relu:
            out.masked_fill_(out <= 0, 0.0)
        elif activation is Activation.fatrelu:
            out.masked_fill_(out < threshold, 0.0)

    def up(
        self,
        matrix: DeviceMatrix,
        x: Vectors,
        gates: Tensor,
        activation: Activation,
        computes_all: bool,
        out: Tensor,
        counts: Tensor,
    ) -> None:
        """out (T, n_rows) = act(gate) * (x @ matrix.T), 0 where `gates` are 0: unless
        `computes_all`, rows of those are not read by kernels that can skip. `counts` (n_counts,)
        grow in sum by the number of gates that are not 0.
        """
        self.linear(matrix, x, out)
        silu = activation is Activation.silu
        value = torch.nn.functional.silu(gates) if silu else gates
        torch.where(gates == 0, torch.zeros_like(out), value * out, out=out)
        counts[0] += torch.count_nonzero(gates)

    def gates_and_up(
        self,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        x: Vectors,
        activation: Activation,
        threshold: float,
        computes_all: bool,
        gates: Tensor,
        out: Tensor,
        counts: Tensor,
    ) -> None:
        """`gates`, then `up`, of the same neurons."""
        self.gates(gate, x, activation, threshold, gates)
        self.up(up, x, gates, activation, computes_all, out, counts)

    def down(
        self, matrix: DeviceMatrix, values: Tensor, computes_all: bool, partials: Tensor
    ) -> None:
        """partials (n_splits, T, hidden): sums over neurons of value * row, split by neuron."""
        partials.zero_()
        for first, last in matrix.chunks():
            partials[0] += values[:, first:last] @ matrix.rows(first, last).dequantize()

    def merge(
        self, partials: Tensor | None, cold: Tensor | None, scale: float, residual: Tensor
    ) -> None:
        """residual (T, hidden) += scale * (partials, in order, + cold): once an FFN."""
        total = cold
        if partials is not None:
            total = partials[0]
            for partial in partials[1:]:
                total = total + partial
            if cold is not None:
                total = total + cold
        if total is not None:
            residual += scale * total

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        position: Tensor,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        """Rotates the halves of the heads in qkv (T, heads * head_dim), tokens at positions
        position[0] + t. q (T, n_heads, head_dim) is divided by sqrt(head_dim); keys and values go
        into the caches, fp16 (n_kv_heads, n_context, head_dim). cos, sin (context, head_dim / 2).
        """
        n_tokens, n_heads, head_dim = q.shape
        n_kv_heads = k_cache.shape[0]
        positions = position + torch.arange(n_tokens, device=qkv.device)
        heads = qkv.view(n_tokens, -1, head_dim)
        rotated = heads[:, : n_heads + n_kv_heads]
        first, second = rotated[..., : head_dim // 2], rotated[..., head_dim // 2 :]
        c, s = cos[positions][:, None], sin[positions][:, None]
        rotated = torch.cat((first * c - second * s, second * c + first * s), -1)
        torch.mul(rotated[:, :n_heads], head_dim**-0.5, out=q)
        k_cache.index_copy_(1, positions, rotated[:, n_heads:].transpose(0, 1).half())
        v_cache.index_copy_(1, positions, heads[:, n_heads + n_kv_heads :].transpose(0, 1).half())

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        position: Tensor,
        n_visible: int,
        out: Tensor,
        quant: Vectors,
    ) -> None:
        """out (T, n_heads * head_dim): causal attention of token t, at position[0] + t, over the
        first `n_visible` positions of the caches, which reach beyond all tokens; and what it is
        once quantised.
        """
        n_tokens, n_heads, _ = q.shape
        group = n_heads // k_cache.shape[0]
        k = k_cache[:, :n_visible].float().repeat_interleave(group, 0)  # (heads, context, dim)
        v = v_cache[:, :n_visible].float().repeat_interleave(group, 0)
        scores = torch.einsum("thd,hcd->htc", q, k)
        positions = position + torch.arange(n_tokens, device=q.device)
        unseen = torch.arange(n_visible, device=q.device) > positions[:, None]
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        # Caches hold nothing yet beyond the last token: weights are 0 there, values may be NaN.
        v = v.masked_fill((torch.arange(n_visible, device=q.device) > positions[-1])[:, None], 0.0)
        out.view(n_tokens, n_heads, -1).copy_(torch.einsum("htc,hcd->thd", weights, v))
        self.quantize(out, quant)
