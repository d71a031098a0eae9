"""Weight formats: what a matrix's values become, and how their bytes lie in memory.

bf16  as stored in the checkpoint. q8    blocks of 32 along a row, int8 values and one fp16 scale
each: GGUF's Q8_0 in meaning, laid out anew.

q4: blocks of 32 along a row, values of four bits and one fp16 scale each: GGUF's Q4_0 in meaning.

The byte layout is described in `csrc/kernels/kernels.h`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native
from hybrid.kernels.reference import bf16_bits, bf16_values

BLOCK, GROUP, TILE_ROWS = _native.BLOCK, _native.GROUP, _native.ROW_TILE
GROUP_BLOCKS = GROUP // BLOCK
Q4_EXTREMES = (-8, 7, -7.5, -8.5, -9)  # beyond -8 the extreme is clipped and the others gain


def quantize_q8(w: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(rows, n) → int8 (rows, n) and fp16 scales (rows, n / 32); n is a multiple of 32.

    A scale is max|w| / 127 rounded to fp16, and values are rounded against that rounded scale.
    """
    blocks = w.reshape(w.shape[0], -1, BLOCK)
    scales = (np.abs(blocks).max(-1) / np.float32(127)).astype(np.float16)
    divisor = scales.astype(np.float32)[..., None]
    q = np.divide(blocks, divisor, out=np.zeros_like(blocks), where=divisor > 0)
    return np.clip(np.rint(q), -127, 127).astype(np.int8).reshape(w.shape), scales


def quantize_q4(w: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """(rows, n) → nibbles 0…15 as uint8 (rows, n) and fp16 scales (rows, n / 32).

    A weight is (nibble - 8) * scale. Of the scales that map a block's value of largest magnitude to
    one of Q4_EXTREMES, the one with the least squared error is taken; then the scale that fits its
    nibbles best, where that lowers the error further.
    """
    blocks = w.reshape(w.shape[0], -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    best_error = np.full(extreme.shape, np.inf, np.float32)
    best_scales = np.zeros(extreme.shape, np.float16)
    best_nibbles = np.full(blocks.shape, 8, np.uint8)
    for level in Q4_EXTREMES:
        scales = (extreme / np.float32(level)).astype(np.float16)
        divisor = scales.astype(np.float32)
        q = np.divide(blocks, divisor, out=np.zeros_like(blocks), where=np.abs(divisor) > 0)
        q = np.clip(np.rint(q), -8, 7)
        error = _sum_blocks(np.square(q * divisor - blocks))
        is_better = ~(error >= best_error)  # a NaN is kept, so that it shows
        best_error = np.where(is_better, error, best_error)
        best_scales = np.where(is_better, scales, best_scales)
        best_nibbles = np.where(is_better, (q + 8).astype(np.uint8), best_nibbles)
    q = best_nibbles.astype(np.float32) - np.float32(8)
    power = _sum_blocks(q * q)
    fitted = np.divide(_sum_blocks(blocks * q), power, out=np.zeros_like(power), where=power > 0)
    with np.errstate(over="ignore"):
        scales = fitted.astype(np.float16)
    error = _sum_blocks(np.square(q * scales.astype(np.float32) - blocks))
    best_scales = np.where(error < best_error, scales, best_scales)
    return best_nibbles.reshape(w.shape), best_scales[..., 0]


def _sum_blocks(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(…, 32) → (…, 1), summed in the one order that the kernel has too."""
    x = x.reshape(*x.shape[:-1], 4, 8)
    x = (x[..., 0, :] + x[..., 1, :]) + (x[..., 2, :] + x[..., 3, :])
    x = x[..., :4] + x[..., 4:]
    return ((x[..., 0] + x[..., 2]) + (x[..., 1] + x[..., 3]))[..., None]


def round_weights(format: Format | None, w: NDArray[np.float32]) -> NDArray[np.float32]:
    """The fp32 values that (rows, n) weights have in a format; `None` leaves fp32."""
    if format is None:
        return w
    if format is Format.bf16:
        return bf16_values(bf16_bits(w))
    if format is Format.q8:
        values, scales = quantize_q8(w)
        integers = values.astype(np.float32)
    else:
        nibbles, scales = quantize_q4(w)
        integers = nibbles.astype(np.float32) - np.float32(8)
    return (integers.reshape(*scales.shape, BLOCK) * scales.astype(np.float32)[..., None]).reshape(
        w.shape
    )


def row_bytes(format: Format, n_cols: int) -> tuple[int, int]:
    """Bytes of one packed row: values, scales."""
    padded = _native.padded_cols(format, n_cols)
    if format is Format.bf16:
        return 2 * padded, 0
    return padded if format is Format.q8 else padded // 2, padded // BLOCK * 2


def pack_rows(
    format: Format, w: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(rows, n) → packed values (rows, value bytes) and scales (rows, scale bytes).

    The oracle of `_native.pack_rows`, which packs the same bytes faster.
    """
    n_rows, n_cols = w.shape
    padded = _native.padded_cols(format, n_cols)
    if format is Format.bf16:
        bits = np.zeros((n_rows, padded), np.uint16)
        bits[:, :n_cols] = bf16_bits(w)
        return bits.view(np.uint8), np.empty((n_rows, 0), np.uint8)
    if format is Format.q8:
        q, scales = quantize_q8(w)
        stored, zero = q.view(np.uint8) ^ np.uint8(0x80), 128  # int8 + 128
    else:
        (stored, scales), zero = quantize_q4(w), 8
    values = np.full((n_rows, padded), zero, np.uint8)
    values[:, :n_cols] = stored
    padded_scales = np.zeros((n_rows, padded // BLOCK), np.float16)
    padded_scales[:, : scales.shape[1]] = scales
    # (row, group, block, step, four bytes) → (row, group, step, block, four bytes)
    groups = values.reshape(n_rows, -1, GROUP_BLOCKS, BLOCK // 4, 4).swapaxes(2, 3)
    packed = np.ascontiguousarray(groups).reshape(n_rows, -1, GROUP)
    if format is Format.q4:
        packed = packed[..., : GROUP // 2] | packed[..., GROUP // 2 :] << 4
    return packed.reshape(n_rows, -1), padded_scales.view(np.uint8)


def interleave(
    format: Format, values: NDArray[np.uint8], scales: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Packed rows → one stretch of tiles: of four rows, group by group, scales, then values.

    With `pack_rows` the oracle of `_native.pack_interleaved`. The number of rows is a multiple of
    four.
    """
    group_bytes = {Format.bf16: 2 * BLOCK, Format.q8: GROUP, Format.q4: GROUP // 2}
    n_tiles, n_groups = len(values) // TILE_ROWS, values.shape[1] // group_bytes[format]
    parts = [
        rows.reshape(n_tiles, TILE_ROWS, n_groups, rows.shape[1] // n_groups).swapaxes(1, 2)
        for rows in (scales, values)
    ]  # each (tile, group, row, bytes)
    flat = [part.reshape(n_tiles, n_groups, TILE_ROWS * part.shape[3]) for part in parts]
    return np.concatenate(flat, axis=2).ravel()


def partial_order(format: Format, n_cols: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Where each natural column stands among partial sums, and the unit that it is kept in: a
    column's sum is `partials[order] * unit`. See `csrc/kernels/kernels.h`.
    """
    position = column_order(format, n_cols)
    if format is Format.bf16:
        return position, np.ones(n_cols, np.float32)
    fields = 4 if format is Format.q8 else 8
    group, in_group = np.divmod(position, GROUP)
    half, byte = np.divmod(in_group, GROUP * 4 // fields)  # q4: low nibbles, then high ones
    line, in_line = np.divmod(byte, 64)
    word, in_word = np.divmod(in_line, 4)
    field = in_word if format is Format.q8 else 2 * in_word + half
    order = group * GROUP + (line * fields + field) * 16 + word
    return order, np.exp2(-(field % (fields // 2) * (32 // fields))).astype(np.float32)


def column_order(format: Format, n_cols: int) -> NDArray[np.intp]:
    """Where each natural column stands in a packed row."""
    columns = np.arange(n_cols)
    if format is Format.bf16:
        return columns
    block, element = columns % GROUP // BLOCK, columns % BLOCK
    return columns // GROUP * GROUP + element // 4 * BLOCK + block * 4 + element % 4
