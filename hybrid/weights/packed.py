"""The packed model: a checkpoint's weights in the CPU kernels' layout, in huge-page memory.

Gate rows stand apart, since every token streams all of them; a neuron's up and down rows are
bundled, since they are needed together or not at all. Neurons of a layer may stand in any order
(`neuron_orders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import Format, Rows, _native
from hybrid.weights.model_weights import LayerWeights, ModelWeights
from hybrid.weights.quant import pack_rows, row_bytes

PackedModel = ModelWeights[Rows]

# The largest fp16 scale times the largest integer.
LARGEST = {Format.q8: 65504.0 * 127, Format.q4: 65504.0 * 8}
CHUNK_ROWS = 256  # packed at a time: what NumPy makes on the way stays in the cache


def pack_model(
    checkpoint: Checkpoint,
    format: Format,
    *,
    neuron_orders: Sequence[NDArray[np.intp]] | None = None,
    n_threads: int = 1,
) -> PackedModel:
    """Read and pack all weights. `neuron_orders[layer][i]` is the neuron that comes to stand at
    place i. The bytes do not depend on `n_threads`.
    """
    with ThreadPoolExecutor(n_threads) as workers:
        return _pack_model(checkpoint, format, neuron_orders, workers)


def _pack_model(
    checkpoint: Checkpoint,
    format: Format,
    neuron_orders: Sequence[NDArray[np.intp]] | None,
    workers: Executor,
) -> PackedModel:
    config = checkpoint.config

    def read(role: str, layer: int | None = None) -> NDArray[np.float32]:
        w = checkpoint.read(role, layer)
        check_range(format, w, f"{checkpoint.folder}: {role}" + _of_layer(layer))
        return w

    layers = []
    for layer in range(config.n_layers):
        qkv = np.concatenate([read(role, layer) for role in ("q", "k", "v")])
        gate, up, down = read("gate", layer), read("up", layer), read("down", layer).T
        if neuron_orders is not None:
            order = neuron_orders[layer]
            gate, up, down = gate[order], up[order], down[order]
        up_rows, down_rows = pack_bundles(format, up, down, workers)
        layers.append(
            LayerWeights(
                attention_norm=read("attention_norm", layer),
                qkv=pack_matrix(format, qkv, workers),
                o=pack_matrix(format, read("o", layer), workers),
                ffn_norm=read("ffn_norm", layer),
                gate=pack_matrix(format, gate, workers),
                up=up_rows,
                down=down_rows,
            )
        )
    embedding = pack_matrix(format, read("embedding"), workers)
    head = embedding if config.has_tied_head else pack_matrix(format, read("head"), workers)
    return ModelWeights(embedding, tuple(layers), read("norm"), head)


def check_range(format: Format, w: NDArray[np.float32], name: str) -> None:
    """Raises InvalidCheckpoint for NaN, infinity, or more than `format` can hold."""
    largest = max(float(w.max()), -float(w.min()))  # NaN where any weight is
    if not np.isfinite(largest):
        raise InvalidCheckpoint(f"{name} holds values that are not finite; its weights are broken")
    if largest > LARGEST.get(format, largest):
        raise InvalidCheckpoint(
            f"{name} holds {largest:g}; {format.name} reaches {LARGEST[format]:g}: "
            "load it with quant bf16"
        )


def _of_layer(layer: int | None) -> str:
    return "" if layer is None else f" of layer {layer}"


def pack_matrix(format: Format, w: NDArray[np.float32], workers: Executor | None = None) -> Rows:
    """Rows one behind the other; scales in an array of their own."""
    n_rows, n_cols = w.shape
    value_bytes, scale_bytes = row_bytes(format, n_cols)
    values = _native.allocate_bytes(n_rows * value_bytes)
    scales = _native.allocate_bytes(n_rows * scale_bytes) if scale_bytes else None
    scale_rows = (
        np.empty((n_rows, 0), np.uint8) if scales is None else scales.reshape(n_rows, scale_bytes)
    )
    _pack_into(format, w, values.reshape(n_rows, value_bytes), scale_rows, workers)
    return Rows(
        format=format,
        values=values,
        scales=scales,
        n_rows=n_rows,
        n_cols=n_cols,
        values_stride=value_bytes,
        scales_stride=scale_bytes,
    )


def pack_bundles(
    format: Format,
    up: NDArray[np.float32],
    down: NDArray[np.float32],
    workers: Executor | None = None,
) -> tuple[Rows, Rows]:
    """One bundle a neuron: up values, down values, up scales, down scales; padded to 64 bytes."""
    n_neurons, n_cols = up.shape
    value_bytes, scale_bytes = row_bytes(format, n_cols)
    bundle_bytes = -(-2 * (value_bytes + scale_bytes) // 64) * 64
    memory = _native.allocate_bytes(n_neurons * bundle_bytes)
    bundles = memory.reshape(n_neurons, bundle_bytes)
    rows = []
    for index, matrix in enumerate((up, down)):
        values_offset = index * value_bytes
        scales_offset = 2 * value_bytes + index * scale_bytes
        _pack_into(
            format,
            matrix,
            bundles[:, values_offset : values_offset + value_bytes],
            bundles[:, scales_offset : scales_offset + scale_bytes],
            workers,
        )
        rows.append(
            Rows(
                format=format,
                values=memory,
                scales=memory if scale_bytes else None,
                n_rows=n_neurons,
                n_cols=n_cols,
                values_stride=bundle_bytes,
                scales_stride=bundle_bytes,
                values_offset=values_offset,
                scales_offset=scales_offset,
            )
        )
    return rows[0], rows[1]


def _pack_into(
    format: Format,
    w: NDArray[np.float32],
    values: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    workers: Executor | None,
) -> None:
    """Pack the rows of `w` into the rows of two views, chunk by chunk."""

    def pack(first: int) -> None:
        part = slice(first, first + CHUNK_ROWS)
        values[part], scales[part] = pack_rows(format, w[part])

    chunks = range(0, w.shape[0], CHUNK_ROWS)
    for _ in map(pack, chunks) if workers is None else workers.map(pack, chunks):
        pass
