"""Packed rows: matrices in the layouts of csrc/kernels/kernels.h, in given or new memory.

Matrices of which all rows are read are interleaved in tiles of four rows. Matrices of which some
rows are read are row-major. Gate rows that a predictor names are bit-reversed: row-major, with the
groups of a row in bit-reversed order. A neuron's up and down rows form a bundle.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, Rows, _native
from hybrid.weights.formats import TILE_ROWS, row_bytes

Buffer = NDArray[np.uint8]
ALIGNMENT = 64  # bytes of a cache line
CHUNK_ROWS = 256  # rows packed at once, so that temporary arrays stay in the cache


def matrix_bytes(format: Format, n_rows: int, n_cols: int) -> int:
    """Return the bytes of interleaved rows, in whole tiles of four."""
    return -(-n_rows // TILE_ROWS) * TILE_ROWS * sum(row_bytes(format, n_cols))


def bundle_bytes(format: Format, n_cols: int) -> int:
    """Return the bytes of one bundle: up values, down values, up scales, down scales, padding."""
    return -(-2 * sum(row_bytes(format, n_cols)) // ALIGNMENT) * ALIGNMENT


def pack_matrix(format: Format, w: NDArray[np.float32]) -> Rows:
    """Pack one interleaved matrix into new memory, for tests and benchmarks of kernels."""
    n_rows, n_cols = w.shape
    memory = _native.allocate_bytes(matrix_bytes(format, n_rows, n_cols))
    pack_interleaved(format, w, memory)
    return Rows(format=format, memory=memory, n_rows=n_rows, n_cols=n_cols)


def pack_row_major(
    format: Format, w: NDArray[np.float32], *, is_bit_reversed: bool = False
) -> Rows:
    """Pack row-major rows into new memory, for tests and benchmarks of kernels."""
    n_rows, n_cols = w.shape
    memory = _native.allocate_bytes(n_rows * sum(row_bytes(format, n_cols)))
    pack_into = pack_bit_reversed_into if is_bit_reversed else pack_row_major_into
    pack_into(format, w, memory.reshape(n_rows, -1))
    return row_major_rows(format, memory, 0, n_rows, n_cols, is_bit_reversed=is_bit_reversed)


def pack_bit_reversed(format: Format, w: NDArray[np.float32]) -> Rows:
    return pack_row_major(format, w, is_bit_reversed=True)


def pack_bundles(
    format: Format, up: NDArray[np.float32], down: NDArray[np.float32]
) -> tuple[Rows, Rows]:
    """Pack bundles of up and down rows into new memory, for tests and benchmarks of kernels."""
    n_neurons, n_cols = up.shape
    memory = _native.allocate_bytes(n_neurons * bundle_bytes(format, n_cols))
    pack_bundles_into(format, up, down, memory.reshape(n_neurons, -1))
    return bundle_rows(format, memory, 0, n_neurons, n_cols)


def row_major_rows(
    format: Format,
    memory: Buffer,
    first: int,
    n_rows: int,
    n_cols: int,
    *,
    is_bit_reversed: bool = False,
) -> Rows:
    value_bytes, scale_bytes = row_bytes(format, n_cols)
    return Rows(
        format=format,
        memory=memory,
        n_rows=n_rows,
        n_cols=n_cols,
        offset=first,
        row_stride=value_bytes + scale_bytes,
        scales_offset=first + value_bytes,
        is_bit_reversed=is_bit_reversed,
    )


def pack_row_major_into(format: Format, w: NDArray[np.float32], rows: Buffer) -> None:
    """Pack w (n_rows, n_cols) into `rows` (n_rows, bytes per row)."""
    value_bytes, scale_bytes = row_bytes(format, w.shape[1])
    for part in _chunks(len(w)):
        scales = rows[part, value_bytes:] if scale_bytes else None
        _native.pack_rows(format, w[part], rows[part, :value_bytes], scales)


def pack_bit_reversed_into(format: Format, w: NDArray[np.float32], rows: Buffer) -> None:
    """Pack w (n_rows, n_cols) into `rows` (n_rows, bytes per row), groups in bit-reversed order."""
    value_bytes, scale_bytes = row_bytes(format, w.shape[1])
    places = _native.group_places(format, w.shape[1])
    in_order = np.empty((min(CHUNK_ROWS, len(w)), value_bytes + scale_bytes), np.uint8)
    for part in _chunks(len(w)):
        packed = in_order[: len(w[part])]
        pack_row_major_into(format, w[part], packed)
        for kind in (slice(value_bytes), slice(value_bytes, None)):
            groups, reordered = (
                bytes_.reshape(len(packed), len(places), -1)
                for bytes_ in (packed[:, kind], rows[part, kind])
            )
            reordered[:, places] = groups


def bundle_rows(
    format: Format, memory: Buffer, first: int, n_neurons: int, n_cols: int
) -> tuple[Rows, Rows]:
    value_bytes, scale_bytes = row_bytes(format, n_cols)
    up, down = (
        Rows(
            format=format,
            memory=memory,
            n_rows=n_neurons,
            n_cols=n_cols,
            offset=first + index * value_bytes,
            row_stride=bundle_bytes(format, n_cols),
            scales_offset=first + 2 * value_bytes + index * scale_bytes,
        )
        for index in range(2)
    )
    return up, down


def pack_bundles_into(
    format: Format, up: NDArray[np.float32], down: NDArray[np.float32], bundles: Buffer
) -> None:
    """Pack up and down (n_neurons, n_cols) into `bundles` (n_neurons, bytes per bundle)."""
    value_bytes, scale_bytes = row_bytes(format, up.shape[1])
    for index, w in enumerate((up, down)):
        values = bundles[:, index * value_bytes : (index + 1) * value_bytes]
        first = 2 * value_bytes + index * scale_bytes
        scales = bundles[:, first : first + scale_bytes] if scale_bytes else None
        for rows in _chunks(len(w)):
            part = None if scales is None else scales[rows]
            _native.pack_rows(format, w[rows], values[rows], part)


def pack_interleaved(format: Format, w: NDArray[np.float32], tiles: Buffer) -> None:
    """Pack w (n_rows, n_cols) into `tiles` (bytes of all tiles,)."""
    row = sum(row_bytes(format, w.shape[1]))
    for rows in _chunks(len(w)):
        _native.pack_interleaved(format, w[rows], tiles[rows.start * row : rows.stop * row])


def _chunks(n_rows: int) -> Iterator[slice]:
    """Yield ranges of whole tiles of rows. The last range may reach beyond the last row."""
    for first in range(0, n_rows, CHUNK_ROWS):
        yield slice(first, min(first + CHUNK_ROWS, -(-n_rows // TILE_ROWS) * TILE_ROWS))
