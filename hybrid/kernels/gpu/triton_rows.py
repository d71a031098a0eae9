"""Kernels over rows of weights in Triton, for one token.

They are: norm and quantisation, dot products with rows, up and down rows of the neurons that fire,
and the sum of partials. Activations are quantised to the same bits as by the CPU's kernels. Rows
of weights and quantised vectors consist of whole blocks; zeros fill up the last block. Importing
this module loads triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_float(bits):
    """bf16 bits, given as int16, as fp32. This works even if the hardware has no bf16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_quantized(v, block, is_block, values, scales, IS_BF16: tl.constexpr):
    """Quantise and store fp32 `v` (blocks, 32), with the same bits as `torch_kernels`."""
    column = tl.arange(0, 32)[None, :]
    at = block[:, None] * 32 + column
    mask = is_block[:, None] & (column < 32)
    if IS_BF16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(v == v, rounded, (bits >> 16) | 0x40)  # NaN stays NaN
        tl.store(values + at, rounded.to(tl.int16), mask=mask)
    else:
        # Compared as integers, so that a NaN counts as the largest of all and shows in the scale.
        magnitudes = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitudes, 1).to(tl.float32, bitcast=True)
        inverse = tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)
        # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
        rounded = (v * inverse[:, None] + 12582912.0) - 12582912.0
        tl.store(values + at, rounded.to(tl.int8), mask=mask)
        tl.store(scales + block, tl.div_rn(largest, 127.0), mask=is_block)


@triton.jit
def norm(
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
    """A single program: computes the root mean square over all columns, then each block."""
    column = tl.arange(0, 32)[None, :]
    squares = tl.zeros((N_BLOCKS, 32), tl.float32)
    for first in range(0, (N + 31) // 32, N_BLOCKS):
        at = (first + tl.arange(0, N_BLOCKS))[:, None] * 32 + column
        v = tl.load(x + at, mask=at < N, other=0.0)
        squares += v * v
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / N + eps) * scale
    for first in range(0, (N + 31) // 32, N_BLOCKS):
        block = first + tl.arange(0, N_BLOCKS)
        is_block = block < (N + 31) // 32
        at = block[:, None] * 32 + column
        mask = at < N
        v = tl.load(x + at, mask=mask, other=0.0)
        normed = tl.load(weight + at, mask=mask, other=0.0) * (v * inverse)
        tl.store(out + at, normed, mask=mask)
        store_quantized(normed, block, is_block, values, scales, IS_BF16)


@triton.jit
def quantize(x, values, scales, N: tl.constexpr, N_BLOCKS: tl.constexpr, IS_BF16: tl.constexpr):
    block = tl.program_id(0) * N_BLOCKS + tl.arange(0, N_BLOCKS)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    is_block = block < (N + 31) // 32
    v = tl.load(x + at, mask=at < N, other=0.0)
    store_quantized(v, block, is_block, values, scales, IS_BF16)


@triton.jit
def dots_of(
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
    """(N_ROWS,) dot products of x with the rows that `reads` selects; 0 for the others."""
    sums = tl.zeros((N_ROWS, N_BLOCKS), tl.float32)
    if tl.sum(reads.to(tl.int32), 0) > 0:
        start = row.to(tl.int64)
        for first in range(0, N // 32, N_BLOCKS):
            block = first + tl.arange(0, N_BLOCKS)
            is_block = block < N // 32
            mask = reads[:, None] & is_block[None, :]
            if FORMAT == 0:
                at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
                v = as_float(tl.load(x + at, mask=is_block[:, None], other=0))
                where = values + start[:, None, None] * N + at[None, :, :]
                w = tl.load(where, mask=mask[:, :, None], other=0)
                sums += tl.sum(as_float(w) * v[None, :, :], 2)
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
def fired(dot, threshold, ACTIVATION: tl.constexpr):
    """The value of a gate: 0 if its neuron does not fire."""
    if ACTIVATION == 0:
        dot = tl.where(dot <= 0, 0.0, dot)
    if ACTIVATION == 1:
        dot = tl.where(dot < threshold, 0.0, dot)
    return dot


@triton.jit
def gemv(
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
    """Dot products with N_ROWS rows per program. THEN says what happens to them.

    0, STORE: out = dot. 1, ADD: out += number * dot. 2, GATE: out = dot if the neuron fires, else
    0; `number` is then the threshold.
    """
    row = tl.program_id(0) * N_ROWS + tl.arange(0, N_ROWS)
    is_row = row < n_rows
    dot = dots_of(values, scales, x, x_scales, row, is_row, N, N_ROWS, N_BLOCKS, FORMAT)
    if THEN == 1:
        dot = tl.load(out + row, mask=is_row, other=0.0) + number * dot
    if THEN == 2:
        dot = fired(dot, number, ACTIVATION)
    tl.store(out + row, dot, mask=is_row)


@triton.jit
def up(
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
    """out = act(gate) * dot, and `counts` grow by the number of neurons that fire.

    Without HAS_GATES the gates are computed first. With SKIPS, rows whose gate is 0 are not read.
    """
    program = tl.program_id(0)
    row = program * N_ROWS + tl.arange(0, N_ROWS)
    is_row = row < n_rows
    if HAS_GATES:
        gate = tl.load(gates + row, mask=is_row, other=0.0)
    else:
        dot = dots_of(
            gate_values, gate_scales, x, x_scales, row, is_row, N, N_ROWS, N_BLOCKS, FORMAT
        )
        gate = tl.where(is_row, fired(dot, threshold, ACTIVATION), 0.0)
        tl.store(gates + row, gate, mask=is_row)
    fires = gate != 0
    reads = is_row
    if SKIPS:
        reads = is_row & fires
    dot = dots_of(values, scales, x, x_scales, row, reads, N, N_ROWS, N_BLOCKS, FORMAT)
    value = gate
    if ACTIVATION == 2:
        value = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row, tl.where(fires, value * dot, 0.0), mask=is_row)
    n_fired = tl.sum((is_row & fires).to(tl.int32), 0)
    tl.store(counts + program, tl.load(counts + program) + n_fired)


@triton.jit
def down(
    values,
    scales,
    weights,
    partials,
    n_rows,
    rows_per_split,
    N: tl.constexpr,
    N_STORED: tl.constexpr,
    N_ROWS: tl.constexpr,
    N_COLS: tl.constexpr,
    FORMAT: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """partials[split, columns] = the sum of weight * row over the rows of the split.

    A row has N_STORED columns, of which the partials have the first N.
    """
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
                where = values + start * N_STORED + column[None, :]
                w = as_float(tl.load(where, mask=mask, other=0))
            else:
                if FORMAT == 1:
                    q = tl.load(values + start * N_STORED + column[None, :], mask=mask, other=0)
                    integers = q.to(tl.float32)
                else:
                    byte = column // 32 * 16 + column % 16
                    q = tl.load(
                        values + start * (N_STORED // 2) + byte[None, :], mask=mask, other=0
                    )
                    shift = (column % 32 // 16 * 4)[None, :]
                    integers = (((q.to(tl.int32) >> shift) & 15) - 8).to(tl.float32)
                where = scales + start * (N_STORED // 32) + (column // 32)[None, :]
                scale = tl.load(where, mask=mask, other=0.0)
                w = integers * scale.to(tl.float32)
            total += tl.sum(weight[:, None] * w, 0)
    tl.store(partials + split * N + column, total, mask=is_column)


@triton.jit
def merge(
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
