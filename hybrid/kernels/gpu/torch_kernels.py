"""The GPU's kernels as plain torch operations, for every device that torch supports.

They are the reference of `triton_kernels`, which has the same contract. A kernel writes into the
tensors that it is given. It allocates nothing that outlives it, and it never waits. A whole token
can therefore be captured into one CUDA graph.

Activations are fp32 (T, n) for T tokens. `Vectors` hold them quantised, with the values that the
CPU's kernels give (see `csrc/kernels/kernels.h`). The gates of both devices are therefore computed
from the same quantised x. Rows of weights and quantised vectors consist of whole blocks; zeros fill
up the last block. All other tensors have the model's own sizes. Importing this module loads torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid.kernels import Activation, Format

BLOCK = 32  # weights, or activations, that share a scale
CHUNK_VALUES = 1 << 22  # weights that are dequantised at a time: 16 MiB for any matrix


@dataclass(frozen=True, slots=True)
class DeviceMatrix:
    """Rows of weights on a device, in natural order; `n_cols` is a multiple of 32."""

    format: Format
    # q8: int8 (n_rows, n_cols). bf16: bfloat16 (n_rows, n_cols). q4: uint8 (n_rows, n_cols / 2).
    # Byte i of a q4 block's 16 holds element i in its low nibble and element 16 + i in its high
    # nibble, each + 8.
    values: Tensor
    # q8, q4: fp16 (n_rows, n_cols / 32), or fp32 if the matrix has a scale of its own.
    scales: Tensor | None

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
        """Ranges [first, last) of rows, each small enough to be dequantised at once."""
        step = max(1, CHUNK_VALUES // self.n_cols)
        for first in range(0, self.n_rows, step):
            yield first, min(first + step, self.n_rows)


@dataclass(frozen=True, slots=True)
class Vectors:
    """Quantised activations of T tokens; n is a multiple of 32."""

    values: Tensor  # q8, q4: int8 (T, n). bf16: bfloat16 (T, n)
    scales: Tensor | None  # q8, q4: fp32 (T, n / 32)

    def tokens(self, n: int) -> Vectors:
        """A view of the first n tokens."""
        return Vectors(self.values[:n], None if self.scales is None else self.scales[:n])

    def dequantize(self) -> Tensor:
        """fp32 (T, n)."""
        if self.scales is None:
            return self.values.float()
        blocks = self.values.view(*self.scales.shape, BLOCK).float()
        return (blocks * self.scales[..., None]).view(self.values.shape)


class Gating(NamedTuple):
    """What a gate does with its dot product."""

    activation: Activation
    threshold: float  # of fatrelu


class Neurons(NamedTuple):
    """The activations of an FFN's neurons for T tokens."""

    gates: Tensor  # fp32 (T, n_rows): 0 for neurons that do not fire
    values: Tensor  # fp32 (T, n_rows): act(gate) * up
    counts: Tensor  # int64 (n_counts,): their sum counts the neurons that fired so far


class Rope(NamedTuple):
    """The rotary embedding's tables, fp32 (n_context, head_dim / 2)."""

    cos: Tensor
    sin: Tensor


class LayerCache(NamedTuple):
    """A layer's keys and values, fp16 (n_kv_heads, n_context, head_dim)."""

    k: Tensor
    v: Tensor


def empty_vectors(format: Format, n_tokens: int, n: int, device: torch.device) -> Vectors:
    """Zeroed vectors for n elements of `n_tokens` tokens, to be written into."""
    n = -(-n // BLOCK) * BLOCK
    if format is Format.bf16:
        return Vectors(torch.zeros(n_tokens, n, dtype=torch.bfloat16, device=device), None)
    return Vectors(
        torch.zeros(n_tokens, n, dtype=torch.int8, device=device),
        torch.zeros(n_tokens, n // BLOCK, dtype=torch.float32, device=device),
    )


class TorchKernels:
    """The kernels for any number of tokens, on any device."""

    name = "torch"
    n_splits = 1  # partial sums that `down` leaves

    def n_counts(self, n_rows: int) -> int:
        """The number of counters that `up` needs for `n_rows` rows."""
        return 1

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, scale: float, out: Tensor, quant: Vectors
    ) -> None:
        """out (T, hidden) = weight * x / rms(x) * scale; `quant` receives it quantised."""
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale
        torch.mul(weight, x * inverse, out=out)
        self.quantize(out, quant)

    def quantize(self, x: Tensor, out: Vectors) -> None:
        """Quantise x (T, n): blocks of 32 with int8 = round(x * 127 / max|x|), or bf16 values."""
        padding = out.values.shape[-1] - x.shape[-1]
        if padding:
            x = torch.nn.functional.pad(x, (0, padding))
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

    def gates(self, matrix: DeviceMatrix, x: Vectors, gating: Gating, out: Tensor) -> None:
        """out (T, n_rows): the value of each gate whose neuron fires, 0 for the others.

        A NaN fires, so that it is seen.
        """
        self.linear(matrix, x, out)
        if gating.activation is Activation.relu:
            out.masked_fill_(out <= 0, 0.0)
        elif gating.activation is Activation.fatrelu:
            out.masked_fill_(out < gating.threshold, 0.0)

    def up(
        self,
        matrix: DeviceMatrix,
        x: Vectors,
        activation: Activation,
        computes_all: bool,
        neurons: Neurons,
    ) -> None:
        """values = act(gates) * (x @ matrix.T), and 0 for gates that are 0.

        Unless `computes_all`, kernels that can skip rows do not read the rows of those gates. The
        sum of the counts grows by the number of gates that are not 0.
        """
        gates, values, counts = neurons
        self.linear(matrix, x, values)
        silu = activation is Activation.silu
        value = torch.nn.functional.silu(gates) if silu else gates
        torch.where(gates == 0, torch.zeros_like(values), value * values, out=values)
        counts[0] += torch.count_nonzero(gates)

    def gates_and_up(
        self,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        x: Vectors,
        gating: Gating,
        computes_all: bool,
        neurons: Neurons,
    ) -> None:
        """Compute `gates`, then `up`, for the same neurons."""
        self.gates(gate, x, gating, neurons.gates)
        self.up(up, x, gating.activation, computes_all, neurons)

    def down(
        self, matrix: DeviceMatrix, values: Tensor, computes_all: bool, partials: Tensor
    ) -> None:
        """partials (n_splits, T, hidden): sums of value * row, each over a part of the neurons."""
        partials.zero_()
        hidden = partials.shape[-1]
        for first, last in matrix.chunks():
            rows = matrix.rows(first, last).dequantize()[:, :hidden]
            partials[0] += values[:, first:last] @ rows

    def merge(
        self, partials: Tensor | None, cold: Tensor | None, scale: float, residual: Tensor
    ) -> None:
        """residual (T, hidden) += scale * (partials, in order, + cold). Called once per FFN."""
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
        self, qkv: Tensor, rope: Rope, position: Tensor, q: Tensor, cache: LayerCache
    ) -> None:
        """Apply rope to qkv (T, heads * head_dim) and write keys and values into the cache.

        Token t is at position position[0] + t. Rope rotates the halves of each head of q and k.
        q (T, n_heads, head_dim) receives the queries, divided by sqrt(head_dim). Keys and values
        beyond the range of fp16 become NaN: attention could hide an infinite one.
        """
        n_tokens, n_heads, head_dim = q.shape
        n_kv_heads = cache.k.shape[0]
        positions = position + torch.arange(n_tokens, device=qkv.device)
        heads = qkv.view(n_tokens, -1, head_dim)
        rotated = heads[:, : n_heads + n_kv_heads]
        first, second = rotated[..., : head_dim // 2], rotated[..., head_dim // 2 :]
        c, s = (table[positions][:, None] for table in rope)
        rotated = torch.cat((first * c - second * s, second * c + first * s), -1)
        torch.mul(rotated[:, :n_heads], head_dim**-0.5, out=q)
        for cached, x in zip(
            cache, (rotated[:, n_heads:], heads[:, n_heads + n_kv_heads :]), strict=True
        ):
            halves = x.transpose(0, 1).half()
            cached.index_copy_(1, positions, halves.masked_fill(halves.isinf(), torch.nan))

    def attend(
        self,
        q: Tensor,
        cache: LayerCache,
        position: Tensor,
        n_visible: int,
        out: Tensor,
        quant: Vectors,
    ) -> None:
        """out (T, n_heads * head_dim): causal attention over the cache; `quant`: `out` quantised.

        Token t is at position position[0] + t. Only the first `n_visible` positions of the cache
        are read; they must include the positions of all tokens.
        """
        n_tokens, n_heads, _ = q.shape
        group = n_heads // cache.k.shape[0]
        k = cache.k[:, :n_visible].float().repeat_interleave(group, 0)  # (heads, context, dim)
        v = cache.v[:, :n_visible].float().repeat_interleave(group, 0)
        scores = torch.einsum("thd,hcd->htc", q, k)
        positions = position + torch.arange(n_tokens, device=q.device)
        unseen = torch.arange(n_visible, device=q.device) > positions[:, None]
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        # Beyond the last token the cache is unwritten: weights are 0 there, values may be NaN.
        v = v.masked_fill((torch.arange(n_visible, device=q.device) > positions[-1])[:, None], 0.0)
        out.view(n_tokens, n_heads, -1).copy_(torch.einsum("htc,hcd->thd", weights, v))
        self.quantize(out, quant)
