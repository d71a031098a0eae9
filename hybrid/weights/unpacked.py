"""Unpack rows into natural order in whole blocks, as the GPU's kernels need them.

Integers and scales stay the same, so both devices compute with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native
from hybrid.kernels.reference import bf16_bits, bf16_values
from hybrid.weights.formats import (
    BLOCK,
    GROUP,
    GROUP_BLOCKS,
    GROUP_VALUE_BYTES,
    TILE_ROWS,
    row_bytes,
    whole_blocks,
)
from hybrid.weights.layout import PackedArray, PackedLayout
from hybrid.weights.packed_rows import Buffer


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows in natural order, with zeros that fill up the last block of a row.

    n_cols is a multiple of 32. Values of bf16 are the bits as int16 (n, n_cols). Values of q8 are
    int8 (n, n_cols). Values of q4 are uint8 (n, n_cols / 2): byte i of a block's 16 bytes holds
    element i in its low nibble and element 16 + i in its high nibble. Scales are fp16
    (n, n_cols / 32), or None for bf16. If the matrix has a matrix scale, they are fp32 and contain
    it, and so do values of bf16.
    """

    values: NDArray[np.int8] | NDArray[np.int16] | NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.float32] | None


def unpack_rows(
    format: Format, values: NDArray[np.uint8], scales: NDArray[np.uint8], n_cols: int
) -> PlainRows:
    """Invert `formats.pack_rows`: packed values and scales (rows, bytes) → plain rows."""
    n_rows, n_cols = len(values), whole_blocks(n_cols)
    if format is Format.bf16:
        bits = np.ascontiguousarray(values).view(np.int16)
        return PlainRows(np.ascontiguousarray(bits[:, :n_cols]), None)
    n_groups = -(-n_cols // GROUP)
    if format is Format.q4:  # bytes → nibbles in packed order
        halves = values.reshape(n_rows, n_groups, GROUP // 2)
        values = np.concatenate((halves & 15, halves >> 4), -1)
    # (row, group, step, block, four) → (row, group, block, step, four)
    groups = values.reshape(n_rows, n_groups, BLOCK // 4, GROUP_BLOCKS, 4).swapaxes(2, 3)
    natural = np.ascontiguousarray(groups).reshape(n_rows, n_groups * GROUP)[:, :n_cols]
    plain_scales = np.ascontiguousarray(scales).view(np.float16)[:, : n_cols // BLOCK]
    plain_scales = np.ascontiguousarray(plain_scales)
    if format is Format.q8:
        return PlainRows((natural ^ np.uint8(0x80)).view(np.int8), plain_scales)
    blocks = natural.reshape(n_rows, n_cols // BLOCK, 2, BLOCK // 2)
    nibbles = blocks[:, :, 0] | blocks[:, :, 1] << 4
    return PlainRows(nibbles.reshape(n_rows, n_cols // 2), plain_scales)


class PackedReader:
    """Reads single matrices out of a packed model's buffer."""

    def __init__(self, buffer: Buffer, layout: PackedLayout) -> None:
        self.buffer, self.layout = buffer, layout

    def matrix(self, name: str, n_rows: int | None = None) -> PlainRows:
        """Return the first `n_rows` rows of a matrix, or all of them."""
        array = self.layout.arrays[name]
        n_rows = array.n_rows if n_rows is None else n_rows
        read = _interleaved if array.layout == "interleaved" else _row_major
        rows = unpack_rows(array.format, *read(array, self.buffer, n_rows), array.n_cols)
        scales = array.matrix_scales(self.buffer)
        if len(scales) > 1:  # q, k and v: one scale per row
            config = self.layout.config
            n_kv = config.n_kv_heads * config.head_dim
            scales = np.repeat(scales, (config.attention_size, n_kv, n_kv))[:n_rows]
        return _scaled(rows, scales)

    def up_and_down(self, layer: int, n: int) -> tuple[PlainRows, PlainRows]:
        """Return the up and down rows of the first n neurons."""
        array = self.layout.arrays[f"{layer}.bundles"]
        value_bytes, scale_bytes = row_bytes(array.format, array.n_cols)
        bundles = array.of(self.buffer).reshape(array.n_rows, -1)[:n]
        scales = array.matrix_scales(self.buffer)
        up, down = (
            unpack_rows(
                array.format,
                bundles[:, i * value_bytes : (i + 1) * value_bytes],
                bundles[:, 2 * value_bytes + i * scale_bytes :][:, :scale_bytes],
                array.n_cols,
            )
            for i in range(2)
        )
        return _scaled(up, scales[:1]), _scaled(down, scales[1:])

    def norm(self, name: str) -> NDArray[np.float32]:
        return self.layout.arrays[name].of(self.buffer).view(np.float32).copy()


def _scaled(rows: PlainRows, matrix_scales: NDArray[np.float32]) -> PlainRows:
    """Multiply rows by their matrix scale, or by one per row: exact, but for subnormal bf16."""
    if (matrix_scales == 1).all():
        return rows
    factors = matrix_scales[:, None]
    if rows.scales is None:
        values = bf16_values(rows.values.view(np.uint16)) * factors
        return PlainRows(bf16_bits(values).view(np.int16), None)
    return PlainRows(rows.values, rows.scales.astype(np.float32) * factors)


def _interleaved(array: PackedArray, buffer: Buffer, n_rows: int) -> tuple[Buffer, Buffer]:
    """Return packed values and scales (n_rows, bytes) of the first rows of interleaved tiles."""
    value_bytes, scale_bytes = row_bytes(array.format, array.n_cols)
    n_groups = max(1, value_bytes // GROUP_VALUE_BYTES[array.format])
    parts = [scale_bytes // n_groups, value_bytes // n_groups]  # bytes of one row's group
    n_tiles = -(-n_rows // TILE_ROWS)
    tiles = array.of(buffer)[: n_tiles * TILE_ROWS * array.row_bytes]
    groups = tiles.reshape(n_tiles, n_groups, TILE_ROWS * sum(parts))
    split = TILE_ROWS * parts[0]
    scales, values = (
        part.reshape(n_tiles, n_groups, TILE_ROWS, width)
        .swapaxes(1, 2)
        .reshape(n_tiles * TILE_ROWS, n_groups * width)[:n_rows]
        for part, width in zip((groups[..., :split], groups[..., split:]), parts, strict=True)
    )
    return values, scales


def _row_major(array: PackedArray, buffer: Buffer, n_rows: int) -> tuple[Buffer, Buffer]:
    """Return packed values and scales (n_rows, bytes), groups in natural order, of first rows."""
    value_bytes, _ = row_bytes(array.format, array.n_cols)
    rows = array.of(buffer).reshape(array.n_rows, -1)[:n_rows]
    values, scales = rows[:, :value_bytes], rows[:, value_bytes:]
    if array.layout == "row_major":
        return values, scales
    places = _native.group_places(array.format, array.n_cols)
    values, scales = (
        part.reshape(n_rows, len(places), -1)[:, places].reshape(n_rows, -1)
        for part in (values, scales)
    )
    return values, scales
