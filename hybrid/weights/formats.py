"""Weight formats: how a matrix's values are rounded, and how their bytes are laid out in memory.

bf16, f16: values as the checkpoint stores them, two bytes each. They are rounded only if it stores
others.

q8: blocks of 32 along a row, with int8 values and one fp16 scale per block. It has the semantics of
GGUF's Q8_0 with another byte layout.

q4: blocks of 32 along a row, with values of four bits and one fp16 scale per block. It has the
semantics of GGUF's Q4_0.

`csrc/kernels/kernels.h` describes the byte layout.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native
from hybrid.kernels.reference import bf16_bits, bf16_values

Number = TypeVar("Number", bound=np.number)

BLOCK, GROUP, TILE_ROWS = _native.BLOCK, _native.GROUP, _native.ROW_TILE
GROUP_BLOCKS = GROUP // BLOCK
# Candidate levels for a block's value of largest magnitude. Beyond -8 that value is clipped, but
# the other values of the block are rounded better.
Q4_EXTREMES = (-8, 7, -7.5, -8.5, -9)
DEFAULT_FORMAT = Format.q8  # of models that are not stored in another one of these formats
GPU_FORMATS = (Format.bf16, Format.q8, Format.q4)  # the GPU has kernels for these
# Bytes of one row's values in a group.
GROUP_VALUE_BYTES = {
    Format.bf16: 2 * BLOCK,
    Format.f16: 2 * BLOCK,
    Format.q8: GROUP,
    Format.q4: GROUP // 2,
}


def has_blocks(format: Format) -> bool:
    """Return whether weights are integers with scales of blocks, not values of two bytes."""
    return format in (Format.q8, Format.q4)


def quantize_q8(w: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantise (rows, n) to int8 (rows, n) and fp16 scales (rows, blocks); the last may be short.

    A scale is max|w| / 127 rounded to fp16. Values are rounded with that rounded scale.
    """
    blocks = _blocks(w)
    scales = (np.abs(blocks).max(-1) / np.float32(127)).astype(np.float16)
    divisor = scales.astype(np.float32)[..., None]
    q = np.divide(blocks, divisor, out=np.zeros_like(blocks), where=divisor > 0)
    return _columns(np.clip(np.rint(q), -127, 127).astype(np.int8), w.shape[1]), scales


def quantize_q4(w: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Quantise (rows, n) to nibbles 0…15 as uint8 (rows, n) and fp16 scales (rows, blocks).

    A weight is (nibble - 8) * scale. Each of Q4_EXTREMES gives a scale that maps the block's value
    of largest magnitude to it. The scale with the least squared error is taken. It is then replaced
    by the scale that fits its nibbles best, if that lowers the error further.
    """
    blocks = _blocks(w)
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
        is_better = ~(error >= best_error)  # a NaN error counts as better, so that NaN shows
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
    return _columns(best_nibbles, w.shape[1]), best_scales[..., 0]


def whole_blocks(n_cols: int) -> int:
    """Return `n_cols` rounded up to whole blocks."""
    return -(-n_cols // BLOCK) * BLOCK


def _blocks(w: NDArray[Number]) -> NDArray[Number]:
    """Cut (rows, n) into (rows, blocks, 32); zeros fill up the last block."""
    padding = whole_blocks(w.shape[1]) - w.shape[1]
    if padding:
        w = np.pad(w, ((0, 0), (0, padding)))
    return w.reshape(len(w), -1, BLOCK)


def _columns(blocks: NDArray[Number], n_cols: int) -> NDArray[Number]:
    """Invert `_blocks`: (rows, blocks, 32) → (rows, n_cols)."""
    return blocks.reshape(len(blocks), -1)[:, :n_cols]


def _sum_blocks(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum (…, 32) → (…, 1), in the same order as the native kernel."""
    x = x.reshape(*x.shape[:-1], 4, 8)
    x = (x[..., 0, :] + x[..., 1, :]) + (x[..., 2, :] + x[..., 3, :])
    x = x[..., :4] + x[..., 4:]
    return ((x[..., 0] + x[..., 2]) + (x[..., 1] + x[..., 3]))[..., None]


def round_weights(format: Format | None, w: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the fp32 values that (rows, n) weights have in a format. None changes nothing."""
    if format is None:
        return w
    if not has_blocks(format):
        return _values(format, _bits(format, w))
    if format is Format.q8:
        values, scales = quantize_q8(w)
        integers = values.astype(np.float32)
    else:
        nibbles, scales = quantize_q4(w)
        integers = nibbles.astype(np.float32) - np.float32(8)
    return _columns(_blocks(integers) * scales.astype(np.float32)[..., None], w.shape[1])


def _bits(format: Format, w: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 → the bits of bf16 or fp16, rounded to nearest even."""
    if format is Format.bf16:
        return bf16_bits(w)
    with np.errstate(over="ignore"):  # of infinite values; finite ones have a matrix scale
        return w.astype(np.float16).view(np.uint16)


def _values(format: Format, bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    if format is Format.bf16:
        return bf16_values(bits)
    return bits.view(np.float16).astype(np.float32)


def row_bytes(format: Format, n_cols: int) -> tuple[int, int]:
    """Return the bytes of one packed row: (values, scales)."""
    padded = _native.padded_cols(format, n_cols)
    if not has_blocks(format):
        return 2 * padded, 0
    return padded if format is Format.q8 else padded // 2, padded // BLOCK * 2


def plain_row_bytes(format: Format, n_cols: int) -> int:
    """Return the bytes of one row of whole blocks, with its scales, as on the GPU."""
    n_cols = whole_blocks(n_cols)
    if not has_blocks(format):
        return 2 * n_cols
    values = n_cols if format is Format.q8 else n_cols // 2
    return values + n_cols // BLOCK * 2


def pack_rows(
    format: Format, w: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pack (rows, n) into values (rows, value bytes) and scales (rows, scale bytes).

    This is the oracle of `_native.pack_rows`, which packs the same bytes faster.
    """
    n_rows, n_cols = w.shape
    padded = _native.padded_cols(format, n_cols)
    if not has_blocks(format):
        bits = np.zeros((n_rows, padded), np.uint16)
        bits[:, :n_cols] = _bits(format, w)
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
    """Interleave packed rows into tiles of four rows.

    A tile holds, for each group, the scales of its four rows and then their values. The number of
    rows must be a multiple of four. Together with `pack_rows` this is the oracle of
    `_native.pack_interleaved`.
    """
    n_tiles, n_groups = len(values) // TILE_ROWS, values.shape[1] // GROUP_VALUE_BYTES[format]
    parts = [
        rows.reshape(n_tiles, TILE_ROWS, n_groups, rows.shape[1] // n_groups).swapaxes(1, 2)
        for rows in (scales, values)
    ]  # each (tile, group, row, bytes)
    flat = [part.reshape(n_tiles, n_groups, TILE_ROWS * part.shape[3]) for part in parts]
    return np.concatenate(flat, axis=2).ravel()


def partial_order(format: Format, n_cols: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the index of each natural column among the partial sums, and its unit.

    A column's sum is `partials[order] * unit`. `csrc/kernels/kernels.h` describes the order.
    """
    position = column_order(format, n_cols)
    if not has_blocks(format):
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
    """Return the index of each natural column in a packed row."""
    columns = np.arange(n_cols)
    if not has_blocks(format):
        return columns
    block, element = columns % GROUP // BLOCK, columns % BLOCK
    return columns // GROUP * GROUP + element // 4 * BLOCK + block * 4 + element % 4
