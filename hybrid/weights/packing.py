"""Packed model: a checkpoint's weights in the layout of the CPU kernels, in one buffer.

Matrices that every token reads completely, gate matrices included, are interleaved in tiles of four
rows, so that reading them is one pass. A neuron's up and down rows form a bundle, because they are
needed together or not at all. Gate rows of layers with a predictor are bit-reversed: row-major,
with each row's values and scales contiguous. The neurons of a layer may have any order
(`neuron_orders`). `layout` lists the arrays. `packed_file` keeps packed models in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import Format, Preview, Rows, _native
from hybrid.model.config import ModelConfig
from hybrid.model.weights import LayerWeights, ModelWeights
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.formats import TILE_ROWS
from hybrid.weights.layout import PackedArray, PackedLayout
from hybrid.weights.packed_rows import (
    CHUNK_ROWS,
    Buffer,
    bundle_rows,
    pack_bit_reversed_into,
    pack_bundles_into,
    pack_interleaved,
    pack_row_major_into,
    row_major_rows,
)
from hybrid.weights.preview import pack_preview_into, preview_bytes

PackedModel = ModelWeights[Rows]
# Per layer: for each packed position, the checkpoint's index of the neuron.
NeuronOrders = Sequence[NDArray[np.intp]]
SOURCE_ORDER = "as in the source"
PART_BYTES = (
    4 << 20
)  # fp32 weights that a thread reads at once, so that packing needs little memory

# Largest weight of a format: the largest fp16 scale times the largest integer.
LARGEST = {Format.q8: 65504.0 * 127, Format.q4: 65504.0 * 8}


class SourceTensor(Protocol):
    """A tensor whose values are read part by part, by an index such as (slice(0, 256),)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def fp32(self, part: tuple[slice | NDArray[np.intp], ...] = ()) -> NDArray[np.float32]: ...
    def in_memory(self) -> SourceTensor: ...


class Source(Protocol):
    """The source of weights: an open checkpoint."""

    @property
    def config(self) -> ModelConfig: ...
    def tensor(self, role: str, layer: int | None = None) -> SourceTensor: ...


class Output(Protocol):
    """Memory for packed weights that wants to know how much of it has been written."""

    @property
    def buffer(self) -> Buffer: ...
    def written(self, n_bytes: int) -> None: ...


def pack_model(
    source: Source,
    layout: PackedLayout,
    *,
    buffer: Buffer | Output | None = None,
    neuron_orders: NeuronOrders | None = None,
    n_threads: int = 1,
    progress: Progress = ignore_progress,
) -> PackedModel:
    """Read and pack all weights into `buffer`, or into new huge-page memory.

    Weights are read part by part: beside `buffer`, each thread needs some times PART_BYTES.
    `neuron_orders[layer][i]` is the checkpoint's neuron that is packed at position i. The bytes do
    not depend on `n_threads`. Raises InvalidCheckpoint if weights are not finite or exceed the
    format's range.
    """
    output = buffer if buffer is not None else _native.allocate_bytes(layout.n_bytes)
    target = output if isinstance(output, np.ndarray) else output.buffer

    def pack(arrays: Sequence[PackedArray]) -> int:
        first, n_bytes = arrays[0], sum(array.n_bytes for array in arrays)
        roles = [
            _open(source, first.format, role, first.layer, neuron_orders) for role in first.roles
        ]
        for rows in _parts(first):
            weights = _read(roles, rows, first)
            for array in arrays:
                _pack_rows(array, rows, weights, target)
            if not isinstance(output, np.ndarray):
                output.written(n_bytes * (rows.stop - rows.start) // first.n_rows)
        return n_bytes

    task, done = f"packing to {layout.format.name}", 0
    progress(task, 0, layout.n_bytes)
    workers = ThreadPoolExecutor(n_threads)
    try:
        # With little memory one thread packs: this one, which needs no further stack.
        run = workers.map if n_threads > 1 else map
        for n_bytes in run(pack, _by_source(layout)):
            done += n_bytes
            progress(task, done, layout.n_bytes)
    finally:
        workers.shutdown(cancel_futures=True)
    progress(task, layout.n_bytes, layout.n_bytes)
    return view_packed(target, layout)


def order_hash(neuron_orders: NeuronOrders | None) -> str:
    """Return the SHA-256 of a neuron order, or SOURCE_ORDER. It ties files to that order."""
    if neuron_orders is None:
        return SOURCE_ORDER
    digest = hashlib.sha256()
    for order in neuron_orders:
        digest.update(np.asarray(order, "<i4").tobytes())
    return digest.hexdigest()


def _by_source(layout: PackedLayout) -> list[list[PackedArray]]:
    """Group arrays that hold the same weights: the head and its preview are read once."""
    groups: dict[tuple[int | None, tuple[str, ...]], list[PackedArray]] = {}
    for array in layout.arrays.values():
        groups.setdefault((array.layer, array.roles), []).append(array)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class _Role:
    """A role's rows in packed order."""

    tensor: SourceTensor
    name: str
    format: Format
    # Neuron-major: row j is what neuron j adds to the output.
    is_transposed: bool
    order: NDArray[np.intp] | None  # of the rows; None: the source's

    @property
    def n_rows(self) -> int:
        shape = self.tensor.shape
        return 1 if len(shape) == 1 else shape[1 if self.is_transposed else 0]

    def read(self, rows: slice) -> NDArray[np.float32]:
        """Return some rows. Raises InvalidCheckpoint if the format cannot hold them."""
        if len(self.tensor.shape) == 1:
            w = self.tensor.fp32()
        else:
            index = rows if self.order is None else self.order[rows]
            w = self.tensor.fp32((slice(None), index) if self.is_transposed else (index,))
        check_range(self.format, w, self.name)
        return w.T if self.is_transposed else w


def _open(
    source: Source,
    format: Format,
    role: str,
    layer: int | None,
    neuron_orders: NeuronOrders | None,
) -> _Role:
    tensor = source.tensor(role, layer)
    order = None
    if neuron_orders is not None and layer is not None and role in ("gate", "up", "down"):
        order = neuron_orders[layer]
    if role == "down" or order is not None:
        tensor = tensor.in_memory()  # its parts are spread over the whole tensor
    name = role if layer is None else f"{role} of layer {layer}"
    return _Role(tensor, name, format, role == "down", order)


def _read(roles: Sequence[_Role], rows: slice, array: PackedArray) -> list[NDArray[np.float32]]:
    """Return the weights of some rows: side by side for bundles, else one after the other."""
    if array.layout == "bundles":
        return [role.read(rows) for role in roles]
    weights, begin = [], 0
    for role in roles:
        first, last = max(rows.start - begin, 0), min(rows.stop - begin, role.n_rows)
        if first < last:
            weights.append(role.read(slice(first, last)))
        begin += role.n_rows
    return weights


def _parts(array: PackedArray) -> Iterator[slice]:
    """Yield ranges of rows of about PART_BYTES in fp32. They begin at whole tiles of every kind."""
    step = max(1, PART_BYTES // (4 * array.n_cols * CHUNK_ROWS)) * CHUNK_ROWS
    for first in range(0, array.n_rows, step):
        yield slice(first, min(first + step, array.n_rows))


def _pack_rows(
    array: PackedArray, rows: slice, weights: Sequence[NDArray[np.float32]], buffer: Buffer
) -> None:
    """Pack the rows of the array's roles into its part of the buffer."""
    target, format = array.of(buffer), array.format
    if array.layout == "bundles":
        up, down = weights
        pack_bundles_into(format, up, down, target.reshape(array.n_rows, -1)[rows])
        return
    w = weights[0] if len(weights) == 1 else np.concatenate(weights)
    match array.layout:
        case "norm":
            target[:] = np.ascontiguousarray(w, np.float32).view(np.uint8)
        case "interleaved":
            end = -(-rows.stop // TILE_ROWS) * TILE_ROWS
            pack_interleaved(
                format, w, target[rows.start * array.row_bytes : end * array.row_bytes]
            )
        case "row_major":
            pack_row_major_into(format, w, target.reshape(array.n_rows, -1)[rows])
        case "bit_reversed":
            pack_bit_reversed_into(format, w, target.reshape(array.n_rows, -1)[rows])
        case "preview":
            begin = preview_bytes(rows.start, array.n_cols)
            pack_preview_into(w, target[begin : preview_bytes(rows.stop, array.n_cols)])


def view_packed(buffer: Buffer, layout: PackedLayout) -> PackedModel:
    """Return the packed model whose bytes are in `buffer`, without a copy."""
    arrays = layout.arrays

    def rows(array: PackedArray) -> Rows:
        if array.layout == "interleaved":
            return Rows(
                format=array.format,
                memory=buffer,
                n_rows=array.n_rows,
                n_cols=array.n_cols,
                offset=array.first,
            )
        return row_major_rows(
            array.format,
            buffer,
            array.first,
            array.n_rows,
            array.n_cols,
            is_bit_reversed=array.layout == "bit_reversed",
        )

    def bundles(array: PackedArray) -> tuple[Rows, Rows]:
        return bundle_rows(array.format, buffer, array.first, array.n_rows, array.n_cols)

    def norm(name: str) -> NDArray[np.float32]:
        return arrays[name].of(buffer).view(np.float32)

    layers = []
    for layer in range(layout.config.n_layers):
        up, down = bundles(arrays[f"{layer}.bundles"])
        layers.append(
            LayerWeights(
                attention_norm=norm(f"{layer}.attention_norm"),
                qkv=rows(arrays[f"{layer}.qkv"]),
                o=rows(arrays[f"{layer}.o"]),
                ffn_norm=norm(f"{layer}.ffn_norm"),
                gate=rows(arrays[f"{layer}.gate"]),
                up=up,
                down=down,
            )
        )
    preview: Preview | None = None
    if layout.has_preview:
        tiles = arrays["preview"]
        preview = Preview(n_rows=tiles.n_rows, n_cols=tiles.n_cols, tiles=tiles.of(buffer))
    head = rows(layout.head)
    embedding = head if layout.config.has_tied_head else rows(arrays["embedding"])
    return ModelWeights(embedding, tuple(layers), norm("norm"), head, preview)


def check_range(format: Format, w: NDArray[np.float32], name: str) -> None:
    """Raises InvalidCheckpoint for NaN, infinity, or values beyond the range of `format`."""
    largest = max(float(w.max()), -float(w.min()))  # NaN if any weight is NaN
    if not np.isfinite(largest):
        raise InvalidCheckpoint(f"{name} holds values that are not finite; its weights are broken")
    if largest > LARGEST.get(format, largest):
        raise InvalidCheckpoint(
            f"{name} holds {largest:g}, but {format.name} only reaches {LARGEST[format]:g}; "
            "load it with quant bf16"
        )
