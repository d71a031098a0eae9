"""Unpack rows into natural order without padding, as the GPU's kernels need them.

Integers and scales stay the same, so both devices compute with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native
from hybrid.model.config import ModelConfig
from hybrid.weights.formats import BLOCK, GROUP, GROUP_BLOCKS, TILE_ROWS, row_bytes
from hybrid.weights.packed_rows import Buffer, bundle_bytes
from hybrid.weights.packing import Layers, has_preview, head_name, packed_layout


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows in natural order.

    Values of bf16 are the bits as int16 (n, n_cols). Values of q8 are int8 (n, n_cols). Values of
    q4 are uint8 (n, n_cols / 2): byte i of a block's 16 bytes holds element i in its low nibble and
    element 16 + i in its high nibble. Scales are fp16 (n, n_cols / 32), or None for bf16.
    """

    values: NDArray[np.int8] | NDArray[np.int16] | NDArray[np.uint8]
    scales: NDArray[np.float16] | None


def unpack_rows(
    format: Format, values: NDArray[np.uint8], scales: NDArray[np.uint8], n_cols: int
) -> PlainRows:
    """Invert `formats.pack_rows`: packed values and scales (rows, bytes) → plain rows."""
    n_rows = len(values)
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

    def __init__(
        self,
        buffer: Buffer,
        config: ModelConfig,
        format: Format,
        predicted_layers: Layers = frozenset(),
    ) -> None:
        self.buffer, self.config, self.format, self.predicted_layers = (
            buffer,
            config,
            format,
            predicted_layers,
        )
        self.layout = packed_layout(config, format, predicted_layers)

    def matrix(self, name: str, n_rows: int, n_cols: int) -> PlainRows:
        """Return the first `n_rows` rows of an interleaved matrix."""
        value_bytes, scale_bytes = row_bytes(self.format, n_cols)
        n_groups = max(1, value_bytes // self._group_value_bytes)
        parts = [scale_bytes // n_groups, value_bytes // n_groups]  # bytes of one row's group
        n_tiles = -(-n_rows // TILE_ROWS)
        first, _ = self.layout.arrays[name]
        tiles = self.buffer[first : first + n_tiles * TILE_ROWS * (value_bytes + scale_bytes)]
        groups = tiles.reshape(n_tiles, n_groups, TILE_ROWS * sum(parts))
        split = TILE_ROWS * parts[0]
        scales, values = (
            part.reshape(n_tiles, n_groups, TILE_ROWS, width)
            .swapaxes(1, 2)
            .reshape(n_tiles * TILE_ROWS, n_groups * width)[:n_rows]
            for part, width in zip((groups[..., :split], groups[..., split:]), parts, strict=True)
        )
        return unpack_rows(self.format, values, scales, n_cols)

    def head(self) -> PlainRows:
        name = head_name(self.config)
        n_rows, hidden = self.config.vocab_size, self.config.hidden_size
        if not has_preview(self.config, self.predicted_layers):
            return self.matrix(name, n_rows, hidden)
        return unpack_rows(self.format, *self._row_major(name, n_rows), hidden)

    def gate(self, layer: int, n: int) -> PlainRows:
        """Return the gate rows of the first n neurons."""
        name, hidden = f"{layer}.gate", self.config.hidden_size
        if layer not in self.predicted_layers:
            return self.matrix(name, n, hidden)
        places = _native.group_places(self.format, hidden)
        values, scales = (
            part.reshape(n, len(places), -1)[:, places].reshape(n, -1)
            for part in self._row_major(name, n)
        )
        return unpack_rows(self.format, values, scales, hidden)

    def _row_major(self, name: str, n: int) -> tuple[Buffer, Buffer]:
        """Return values and scales of the first n rows of a row-major matrix of the hidden size."""
        first, _ = self.layout.arrays[name]
        value_bytes, scale_bytes = row_bytes(self.format, self.config.hidden_size)
        row = value_bytes + scale_bytes
        rows = self.buffer[first : first + n * row].reshape(n, row)
        return rows[:, :value_bytes], rows[:, value_bytes:]

    def up_and_down(self, layer: int, n: int) -> tuple[PlainRows, PlainRows]:
        """Return the up and down rows of the first n neurons."""
        hidden = self.config.hidden_size
        first, _ = self.layout.arrays[f"{layer}.bundles"]
        stride = bundle_bytes(self.format, hidden)
        value_bytes, scale_bytes = row_bytes(self.format, hidden)
        bundles = self.buffer[first : first + n * stride].reshape(n, stride)
        up, down = (
            unpack_rows(
                self.format,
                bundles[:, i * value_bytes : (i + 1) * value_bytes],
                bundles[:, 2 * value_bytes + i * scale_bytes :][:, :scale_bytes],
                hidden,
            )
            for i in range(2)
        )
        return up, down

    def norm(self, name: str) -> NDArray[np.float32]:
        first, n_bytes = self.layout.arrays[name]
        return self.buffer[first : first + n_bytes].view(np.float32).copy()

    @property
    def _group_value_bytes(self) -> int:
        return {Format.bf16: 2 * BLOCK, Format.q8: GROUP, Format.q4: GROUP // 2}[self.format]
