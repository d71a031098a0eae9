"""The GPU's kernels in Triton, for one token: the contract is `torch_kernels`'.

Weights stay quantised until they are in registers. Rows of inactive neurons are not read. Nothing
is added atomically: sums that several programs share are split into partials, and those are added
in order, so that the same token gives the same bits each time.

Importing this module loads torch and triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid.kernels import Activation, Format
from hybrid.kernels.torch_kernels import BLOCK, DeviceMatrix, TorchKernels, Vectors
from hybrid.kernels.triton_attention import attend_span, merge_spans, rope_and_cache

ROWS = 8  # of a matrix, a program
CHUNK_BLOCKS = 16  # blocks of 32 columns at a time
DOWN_COLS, DOWN_ROWS = 128, 32
SPAN = 32  # positions of attention, a program

# What is quantised must be rounded as the CPU rounds it: a product, then a sum.
ROUNDS_EACH = {"enable_fp_fusion": False}
MAY_FUSE = {"enable_fp_fusion": True}

STORE, ADD, GATE = range(3)  # what becomes of a dot product
BF16, Q8, Q4 = range(3)
_FORMATS = {Format.bf16: BF16, Format.q8: Q8, Format.q4: Q4}
RELU, FATRELU, SILU = range(3)
_ACTIVATIONS = {Activation.relu: RELU, Activation.fatrelu: FATRELU, Activation.silu: SILU}


@triton.jit
def _as_float(bits):
    """bf16 bits, as int16, in fp32: also where the hardware knows no bf16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _store_quantized(v, at, block, mask, is_block, values, scales, IS_BF16: tl.constexpr):
    """Blocks of 32 of fp32 `v` (blocks, 32), as `torch_kernels` quantises them, to the bit."""
    if IS_BF16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(v == v, rounded, (bits >> 16) | 0x40)  # NaN stays one
        tl.store(values + at, rounded.to(tl.int16), mask=mask)
    else:
        largest = tl.max(tl.abs(v), 1)
        inverse = tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)
        # Adding and taking away 1.5 * 2^23 rounds to the nearest even integer.
        rounded = (v * inverse[:, None] + 12582912.0) - 12582912.0
        tl.store(values + at, rounded.to(tl.int8), mask=mask)
        tl.store(scales + block, tl.div_rn(largest, 127.0), mask=is_block)


@triton.jit
def _norm(
    x,
    weight,
    out,
    values,
    scales,
    eps,
    scale,
    N: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    IS_BF16: tl.constexpr,
):
    """One program: the root mean square over all columns, then each block."""
    column = tl.arange(0, 32)[None, :]
    squares = tl.zeros((N_BLOCKS, 32), tl.float32)
    for first in range(0, N // 32, N_BLOCKS):
        block = first + tl.arange(0, N_BLOCKS)
        v = tl.load(x + block[:, None] * 32 + column, mask=(block < N // 32)[:, None], other=0.0)
        squares += v * v
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / N + eps) * scale
    for first in range(0, N // 32, N_BLOCKS):
        block = first + tl.arange(0, N_BLOCKS)
        is_block = block < N // 32
        at = block[:, None] * 32 + column
        mask = is_block[:, None] & (column < 32)
        v = tl.load(x + at, mask=mask, other=0.0)
        normed = tl.load(weight + at, mask=mask, other=0.0) * (v * inverse)
        tl.store(out + at, normed, mask=mask)
        _store_quantized(normed, at, block, mask, is_block, values, scales, IS_BF16)


@triton.jit
def _quantize(x, values, scales, N: tl.constexpr, N_BLOCKS: tl.constexpr, IS_BF16: tl.constexpr):
    block = tl.program_id(0) * N_BLOCKS + tl.arange(0, N_BLOCKS)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    is_block = block < N // 32
    mask = is_block[:, None] & (at < N)
    v = tl.load(x + at, mask=mask, other=0.0)
    _store_quantized(v, at, block, mask, is_block, values, scales, IS_BF16)


@triton.jit
def _dots(
    values,
    scales,
    x,
    x_scales,
    row,
    reads,
    N: tl.constexpr,
    N_ROWS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """(N_ROWS,) dot products of x with the rows that `reads` says; 0 of others."""
    sums = tl.zeros((N_ROWS, N_BLOCKS), tl.float32)
    if tl.sum(reads.to(tl.int32), 0) > 0:
        start = row.to(tl.int64)
        for first in range(0, N // 32, N_BLOCKS):
            block = first + tl.arange(0, N_BLOCKS)
            is_block = block < N // 32
            mask = reads[:, None] & is_block[None, :]
            if FORMAT == 0:
                at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
                v = _as_float(tl.load(x + at, mask=is_block[:, None], other=0))
                where = values + start[:, None, None] * N + at[None, :, :]
                w = tl.load(where, mask=mask[:, :, None], other=0)
                sums += tl.sum(_as_float(w) * v[None, :, :], 2)
            else:
                if FORMAT == 1:
                    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
                    v = tl.load(x + at, mask=is_block[:, None], other=0).to(tl.int32)
                    where = values + start[:, None, None] * N + at[None, :, :]
                    w = tl.load(where, mask=mask[:, :, None], other=0).to(tl.int32)
                    dots = tl.sum(w * v[None, :, :], 2)
                else:
                    half = tl.arange(0, 16)[None, :]
                    at = block[:, None] * 32 + half
                    low = tl.load(x + at, mask=is_block[:, None], other=0).to(tl.int32)
                    high = tl.load(x + at + 16, mask=is_block[:, None], other=0).to(tl.int32)
                    byte = (block[:, None] * 16 + half)[None, :, :]
                    where = values + start[:, None, None] * (N // 2) + byte
                    w = tl.load(where, mask=mask[:, :, None], other=0).to(tl.int32)
                    products = ((w & 15) - 8) * low[None, :, :] + ((w >> 4) - 8) * high[None, :, :]
                    dots = tl.sum(products, 2)
                where = scales + start[:, None] * (N // 32) + block[None, :]
                scale = tl.load(where, mask=mask, other=0.0).to(tl.float32)
                x_scale = tl.load(x_scales + block, mask=is_block, other=0.0)
                sums += dots.to(tl.float32) * (scale * x_scale[None, :])
    return tl.sum(sums, 1)


@triton.jit
def _fired(dot, threshold, ACTIVATION: tl.constexpr):
    """What a gate comes to: 0 where its neuron does not fire."""
    if ACTIVATION == 0:
        dot = tl.where(dot <= 0, 0.0, dot)
    if ACTIVATION == 1:
        dot = tl.where(dot < threshold, 0.0, dot)
    return dot


@triton.jit
def _gemv(
    values,
    scales,
    x,
    x_scales,
    out,
    number,
    n_rows,
    N: tl.constexpr,
    N_ROWS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    THEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """STORE: out = dot. ADD: out += number * dot. GATE: out = dot where it fires, number being the
    threshold.
    """
    row = tl.program_id(0) * N_ROWS + tl.arange(0, N_ROWS)
    is_row = row < n_rows
    dot = _dots(values, scales, x, x_scales, row, is_row, N, N_ROWS, N_BLOCKS, FORMAT)
    if THEN == 1:
        dot = tl.load(out + row, mask=is_row, other=0.0) + number * dot
    if THEN == 2:
        dot = _fired(dot, number, ACTIVATION)
    tl.store(out + row, dot, mask=is_row)


@triton.jit
def _up(
    gate_values,
    gate_scales,
    values,
    scales,
    x,
    x_scales,
    gates,
    out,
    counts,
    threshold,
    n_rows,
    N: tl.constexpr,
    N_ROWS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATES: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """out = act(gate) * dot. Without HAS_GATES the gates are computed first. With SKIPS, rows whose
    gate is 0 are not read.
    """
    program = tl.program_id(0)
    row = program * N_ROWS + tl.arange(0, N_ROWS)
    is_row = row < n_rows
    if HAS_GATES:
        gate = tl.load(gates + row, mask=is_row, other=0.0)
    else:
        dot = _dots(gate_values, gate_scales, x, x_scales, row, is_row, N, N_ROWS, N_BLOCKS, FORMAT)
        gate = tl.where(is_row, _fired(dot, threshold, ACTIVATION), 0.0)
        tl.store(gates + row, gate, mask=is_row)
    fires = gate != 0
    reads = is_row
    if SKIPS:
        reads = is_row & fires
    dot = _dots(values, scales, x, x_scales, row, reads, N, N_ROWS, N_BLOCKS, FORMAT)
    value = gate
    if ACTIVATION == 2:
        value = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row, tl.where(fires, value * dot, 0.0), mask=is_row)
    n_fired = tl.sum((is_row & fires).to(tl.int32), 0)
    tl.store(counts + program, tl.load(counts + program) + n_fired)


@triton.jit
def _down(
    values,
    scales,
    weights,
    partials,
    n_rows,
    rows_per_split,
    N: tl.constexpr,
    N_ROWS: tl.constexpr,
    N_COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """partials[split, columns] = sum over the split's rows of weight * row."""
    column = tl.program_id(0) * N_COLS + tl.arange(0, N_COLS)
    split = tl.program_id(1)
    is_column = column < N
    total = tl.zeros((N_COLS,), tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, n_rows)
    for first in range(begin, end, N_ROWS):
        row = first + tl.arange(0, N_ROWS)
        weight = tl.load(weights + row, mask=row < end, other=0.0)
        reads = row < end
        if SKIPS:
            reads = reads & (weight != 0)
        if tl.sum(reads.to(tl.int32), 0) > 0:
            mask = reads[:, None] & is_column[None, :]
            start = row.to(tl.int64)[:, None]
            if FORMAT == 0:
                w = _as_float(tl.load(values + start * N + column[None, :], mask=mask, other=0))
            else:
                if FORMAT == 1:
                    q = tl.load(values + start * N + column[None, :], mask=mask, other=0)
                    integers = q.to(tl.float32)
                else:
                    byte = column // 32 * 16 + column % 16
                    q = tl.load(values + start * (N // 2) + byte[None, :], mask=mask, other=0)
                    shift = (column % 32 // 16 * 4)[None, :]
                    integers = (((q.to(tl.int32) >> shift) & 15) - 8).to(tl.float32)
                scale = tl.load(
                    scales + start * (N // 32) + (column // 32)[None, :], mask=mask, other=0.0
                )
                w = integers * scale.to(tl.float32)
            total += tl.sum(weight[:, None] * w, 0)
    tl.store(partials + split * N + column, total, mask=is_column)


@triton.jit
def _merge(
    partials,
    cold,
    residual,
    scale,
    N: tl.constexpr,
    N_SPLITS: tl.constexpr,
    HAS_COLD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = column < N
    total = tl.zeros((WIDTH,), tl.float32)
    for split in range(N_SPLITS):
        total += tl.load(partials + split * N + column, mask=mask, other=0.0)
    if HAS_COLD:
        total += tl.load(cold + column, mask=mask, other=0.0)
    x = tl.load(residual + column, mask=mask, other=0.0)
    tl.store(residual + column, x + scale * total, mask=mask)


class TritonKernels(TorchKernels):
    """For one token at a time; tensors are stretches of memory, rows of one token."""

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
        _norm[(1,)](
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
        n = out.values.numel()
        values, scales = _arguments(out.values, out.scales)
        grid = (triton.cdiv(n // BLOCK, 8),)
        is_bf16 = out.scales is None
        _quantize[grid](x, values, scales, N=n, N_BLOCKS=8, IS_BF16=is_bf16, **ROUNDS_EACH)

    def linear(self, matrix: DeviceMatrix, x: Vectors, out: Tensor) -> None:
        self._gemv(matrix, x, out, STORE, 0.0, SILU)

    def add_linear(self, matrix: DeviceMatrix, x: Vectors, scale: float, residual: Tensor) -> None:
        self._gemv(matrix, x, residual, ADD, scale, SILU)

    def gates(
        self,
        matrix: DeviceMatrix,
        x: Vectors,
        activation: Activation,
        threshold: float,
        out: Tensor,
    ) -> None:
        self._gemv(matrix, x, out, GATE, threshold, _ACTIVATIONS[activation])

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
        self._up(None, matrix, x, activation, 0.0, computes_all, gates, out, counts)

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
        self._up(gate, up, x, activation, threshold, computes_all, gates, out, counts)

    def down(
        self, matrix: DeviceMatrix, values: Tensor, computes_all: bool, partials: Tensor
    ) -> None:
        packed, scales = _arguments(matrix.values, matrix.scales)
        per_split = triton.cdiv(triton.cdiv(matrix.n_rows, self.n_splits), DOWN_ROWS) * DOWN_ROWS
        _down[(triton.cdiv(matrix.n_cols, DOWN_COLS), self.n_splits)](
            packed,
            scales,
            values,
            partials,
            matrix.n_rows,
            per_split,
            N=matrix.n_cols,
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
        _merge[(triton.cdiv(n, 256),)](
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
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        position: Tensor,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        n_heads, head_dim = int(q.shape[-2]), int(q.shape[-1])
        n_kv_heads, n_context = int(k_cache.shape[0]), int(k_cache.shape[1])
        rope_and_cache[(n_heads + 2 * n_kv_heads,)](
            qkv,
            cos,
            sin,
            position,
            q,
            k_cache,
            v_cache,
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
        k_cache: Tensor,
        v_cache: Tensor,
        position: Tensor,
        n_visible: int,
        out: Tensor,
        quant: Vectors,
    ) -> None:
        n_heads, head_dim = int(q.shape[-2]), int(q.shape[-1])
        n_kv_heads, n_context = int(k_cache.shape[0]), int(k_cache.shape[1])
        n_spans = triton.cdiv(n_visible, SPAN)
        largest, sums, values = self._span_scratch(n_spans, n_heads, head_dim, q.device)
        sizes = {"N_HEADS": n_heads, "DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim)}
        group = n_heads // n_kv_heads
        attend_span[(n_kv_heads, n_spans)](
            q,
            k_cache,
            v_cache,
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
        """What attention's programs leave for the merge; one for all layers."""
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
        activation: int,
    ) -> None:
        values, scales = _arguments(matrix.values, matrix.scales)
        x_values, x_scales = _arguments(x.values, x.scales)
        _gemv[(triton.cdiv(matrix.n_rows, ROWS),)](
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
        activation: Activation,
        threshold: float,
        computes_all: bool,
        gates: Tensor,
        out: Tensor,
        counts: Tensor,
    ) -> None:
        values, scales = _arguments(up.values, up.scales)
        gate_values, gate_scales = values, scales
        if gate is not None:
            gate_values, gate_scales = _arguments(gate.values, gate.scales)
        x_values, x_scales = _arguments(x.values, x.scales)
        _up[(triton.cdiv(up.n_rows, ROWS),)](
            gate_values,
            gate_scales,
            values,
            scales,
            x_values,
            x_scales,
            gates,
            out,
            counts,
            threshold,
            up.n_rows,
            N=up.n_cols,
            N_ROWS=ROWS,
            N_BLOCKS=CHUNK_BLOCKS,
            FORMAT=_FORMATS[up.format],
            ACTIVATION=_ACTIVATIONS[activation],
            HAS_GATES=gate is None,
            SKIPS=not computes_all,
            **MAY_FUSE,
        )


def _arguments(values: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """bf16 goes as its bits; a kernel that needs no scales is given something."""
    if scales is None:
        bits = values.view(torch.int16)
        return bits, bits
    return values, scales
