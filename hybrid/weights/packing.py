"""Packed model: a checkpoint's weights in the layout of the CPU kernels, in one buffer.

Matrices that every token reads completely, gate matrices included, are interleaved in tiles of four
rows, so that reading them is one pass. A neuron's up and down rows form a bundle, because they are
needed together or not at all. Gate rows of layers with a predictor are bit-reversed: row-major,
with each row's values and scales contiguous. The neurons of a layer may have any order
(`neuron_orders`). `layout` lists the arrays. `packed_file` keeps packed models in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Preview, Rows, _native
from hybrid.model.config import ModelConfig
from hybrid.model.weights import LayerWeights, ModelWeights, read_balanced
from hybrid.progress import Progress, ignore_progress
from hybrid.weights.layout import PackedArray, PackedLayout
from hybrid.weights.matrix_scale import check_finite, find_matrix_scale
from hybrid.weights.packed_rows import (
    Buffer,
    bundle_rows,
    pack_bit_reversed_into,
    pack_bundles_into,
    pack_interleaved,
    pack_row_major_into,
    row_major_rows,
)
from hybrid.weights.preview import pack_preview_into

PackedModel = ModelWeights[Rows]
# Per layer: for each packed position, the checkpoint's index of the neuron.
NeuronOrders = Sequence[NDArray[np.intp]]
SOURCE_ORDER = "as in the source"


class Source(Protocol):
    """The source of weights: an open checkpoint."""

    @property
    def config(self) -> ModelConfig: ...
    def read(self, role: str, layer: int | None = None) -> NDArray[np.float32]: ...


def pack_model(
    source: Source,
    layout: PackedLayout,
    *,
    buffer: Buffer | None = None,
    neuron_orders: NeuronOrders | None = None,
    n_threads: int = 1,
    progress: Progress = ignore_progress,
) -> PackedModel:
    """Read and pack all weights into `buffer`, or into new huge-page memory.

    `neuron_orders[layer][i]` is the checkpoint's neuron that is packed at position i. The bytes do
    not depend on `n_threads`. Raises InvalidCheckpoint if weights are not finite or are beyond what
    the format holds with a matrix scale.
    """
    target = _native.allocate_bytes(layout.n_bytes) if buffer is None else buffer

    def pack(arrays: Sequence[PackedArray]) -> int:
        first = arrays[0]
        weights = [_read(source, role, first.layer, neuron_orders) for role in first.roles]
        scales: list[float] = []
        if first.layout == "norm":
            check_finite(weights[0], _name(first.roles[0], first.layer))
        else:
            weights, scales = _scale(first, weights)
        for array in arrays:
            _pack_array(array, weights, scales, target)
        return sum(array.n_bytes for array in arrays)

    task, done = f"packing to {layout.format.name}", 0
    progress(task, 0, layout.n_bytes)
    workers = ThreadPoolExecutor(n_threads)
    try:
        for n_bytes in workers.map(pack, _by_source(layout)):
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


def _name(role: str, layer: int | None) -> str:
    return role if layer is None else f"{role} of layer {layer}"


def _read(
    source: Source, role: str, layer: int | None, neuron_orders: NeuronOrders | None
) -> NDArray[np.float32]:
    w = source.read(role) if layer is None else read_balanced(source.read, role, layer)
    if role == "down":
        w = w.T  # neuron-major: row j is what neuron j adds to the output
    if neuron_orders is not None and layer is not None and role in ("gate", "up", "down"):
        w = w[neuron_orders[layer]]
    return w


def _scale(
    array: PackedArray, weights: Sequence[NDArray[np.float32]]
) -> tuple[list[NDArray[np.float32]], list[float]]:
    """Return the matrices of the array's roles as they are packed, and their matrix scales."""
    scaled, scales = [], []
    for role, w in zip(array.roles, weights, strict=True):
        scale = find_matrix_scale(array.format, w, _name(role, array.layer))
        scaled.append(w if scale == 1.0 else w * np.float32(1 / scale))
        scales.append(scale)
    return scaled, scales


def _pack_array(
    array: PackedArray,
    weights: Sequence[NDArray[np.float32]],
    scales: Sequence[float],
    buffer: Buffer,
) -> None:
    """Pack the scaled weights of the array's roles into its part of the buffer."""
    target, format = array.of(buffer), array.format
    array.matrix_scales(buffer)[:] = scales[: array.n_scales]
    if array.layout == "bundles":
        up, down = weights
        pack_bundles_into(format, up, down, target.reshape(array.n_rows, -1))
        return
    w = weights[0] if len(weights) == 1 else np.concatenate(weights)
    match array.layout:
        case "norm":
            target[:] = np.ascontiguousarray(w, np.float32).view(np.uint8)
        case "interleaved":
            pack_interleaved(format, w, target)
        case "row_major":
            pack_row_major_into(format, w, target.reshape(array.n_rows, -1))
        case "bit_reversed":
            pack_bit_reversed_into(format, w, target.reshape(array.n_rows, -1))
        case "preview":
            pack_preview_into(w, target, matrix_scale=scales[0])


def view_packed(buffer: Buffer, layout: PackedLayout) -> PackedModel:
    """Return the packed model whose bytes are in `buffer`, without a copy."""
    arrays = layout.arrays

    def scales(array: PackedArray) -> list[float]:
        return [float(scale) for scale in array.matrix_scales(buffer)]

    def unscaled(array: PackedArray) -> Rows:
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

    def rows(array: PackedArray) -> Rows:
        return unscaled(array).scaled(*scales(array))

    def bundles(array: PackedArray) -> tuple[Rows, Rows]:
        up, down = bundle_rows(array.format, buffer, array.first, array.n_rows, array.n_cols)
        up_scale, down_scale = scales(array)
        return up.scaled(up_scale), down.scaled(down_scale)

    def norm(name: str) -> NDArray[np.float32]:
        return arrays[name].of(buffer).view(np.float32)

    layers = []
    for layer in range(layout.config.n_layers):
        up, down = bundles(arrays[f"{layer}.bundles"])
        layers.append(
            LayerWeights(
                attention_norm=norm(f"{layer}.attention_norm"),
                qkv=unscaled(arrays[f"{layer}.qkv"]),
                qkv_scales=tuple(scales(arrays[f"{layer}.qkv"])),
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
