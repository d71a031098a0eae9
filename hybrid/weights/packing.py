"""Packed model: a checkpoint's weights in the layout of the CPU kernels, in one buffer.

Matrices that every token reads completely, gate matrices included, are interleaved in tiles of four
rows, so that reading them is one pass. A neuron's up and down rows form a bundle, because they are
needed together or not at all. Gate rows of layers with a predictor are bit-reversed: row-major,
with each row's values and scales contiguous. The neurons of a layer may have any order
(`neuron_orders`). `packed_file` keeps packed models in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import InvalidCheckpoint
from hybrid.kernels import Format, Preview, Rows, _native
from hybrid.model.config import ModelConfig
from hybrid.model.weights import LayerWeights, ModelWeights
from hybrid.progress import Progress, ignore_progress
from hybrid.weights import preview
from hybrid.weights.formats import row_bytes
from hybrid.weights.packed_rows import (
    ALIGNMENT,
    Buffer,
    bundle_bytes,
    bundle_rows,
    matrix_bytes,
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
Layers = Collection[int]
SOURCE_ORDER = "as in the source"

# Largest weight of a format: the largest fp16 scale times the largest integer.
LARGEST = {Format.q8: 65504.0 * 127, Format.q4: 65504.0 * 8}


class Source(Protocol):
    """The source of weights: an open checkpoint."""

    @property
    def config(self) -> ModelConfig: ...
    def read(self, role: str, layer: int | None = None) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Positions of a packed model's arrays in its buffer."""

    arrays: dict[str, tuple[int, int]]  # name → (first byte, number of bytes)
    n_bytes: int


def packed_layout(
    config: ModelConfig, format: Format, predicted_layers: Layers = frozenset()
) -> PackedLayout:
    """Lay out the arrays in the order in which a token needs them, each at a cache line."""
    arrays: dict[str, tuple[int, int]] = {}
    end = 0
    for name, n_bytes in _array_sizes(config, format, predicted_layers):
        arrays[name] = (end, n_bytes)
        end += -(-n_bytes // ALIGNMENT) * ALIGNMENT
    return PackedLayout(arrays, end)


def _array_sizes(
    config: ModelConfig, format: Format, predicted_layers: Layers
) -> Iterator[tuple[str, int]]:
    hidden, attention = config.hidden_size, config.attention_size

    def matrix(name: str, n_rows: int, n_cols: int) -> tuple[str, int]:
        return name, matrix_bytes(format, n_rows, n_cols)

    def head(name: str) -> tuple[str, int]:
        if not has_preview(config, predicted_layers):
            return matrix(name, config.vocab_size, hidden)
        return name, config.vocab_size * sum(row_bytes(format, hidden))

    yield (
        head("embedding")
        if config.has_tied_head
        else matrix("embedding", config.vocab_size, hidden)
    )
    for layer in range(config.n_layers):
        yield f"{layer}.attention_norm", 4 * hidden
        yield matrix(f"{layer}.qkv", config.qkv_size, hidden)
        yield matrix(f"{layer}.o", hidden, attention)
        yield f"{layer}.ffn_norm", 4 * hidden
        if layer in predicted_layers:
            yield f"{layer}.gate", config.n_neurons * sum(row_bytes(format, hidden))
        else:
            yield matrix(f"{layer}.gate", config.n_neurons, hidden)
        yield f"{layer}.bundles", config.n_neurons * bundle_bytes(format, hidden)
    yield "norm", 4 * hidden
    if not config.has_tied_head:
        yield head("head")
    if has_preview(config, predicted_layers):
        yield "preview", preview_bytes(config.vocab_size, hidden)


def head_name(config: ModelConfig) -> str:
    """Return the name of the head's array, which is also its role in the source."""
    return "embedding" if config.has_tied_head else "head"


def has_preview(config: ModelConfig, predicted_layers: Layers) -> bool:
    """Whether the head has a preview: if there are predictors and the vocabulary is large."""
    return len(predicted_layers) > 0 and preview.pays(config.vocab_size)


def decode_bytes(
    config: ModelConfig,
    format: Format,
    n_tokens: int,
    first_position: int,
    n_active: int,
    n_gates: int | None = None,
    predictor_bytes: int = 0,
    n_shortlisted: int = 0,
) -> int:
    """Compute the bytes that decoding `n_tokens` tokens from `first_position` on reads.

    Each token reads all rows of attention, one row of the embedding, `predictor_bytes`, the fp16
    keys and values of all positions so far, and all rows of the head. Over all tokens, `n_gates`
    gate rows are read (None: all), and the up and down rows of `n_active` (neuron, token) pairs. If
    `n_shortlisted` is not 0, a token reads the head's preview instead of its rows. Over all tokens,
    `n_shortlisted` rows of the head are then read too.
    """
    hidden, attention = config.hidden_size, config.attention_size
    row, attention_row = sum(row_bytes(format, hidden)), sum(row_bytes(format, attention))
    if n_gates is None:
        n_gates = n_tokens * config.n_layers * config.n_neurons
    layer = config.qkv_size * row + hidden * attention_row
    n_seen = sum(range(first_position + 1, first_position + n_tokens + 1))
    head = n_tokens * config.vocab_size * row
    if n_shortlisted > 0:
        head = n_tokens * preview_bytes(config.vocab_size, hidden) + n_shortlisted * row
    kv_row = 2 * 2 * config.n_kv_heads * _native.head_stride(config.head_dim)
    return (
        head
        + n_tokens * (config.n_layers * layer + row + predictor_bytes)
        + (n_gates + n_active * 2) * row
        + n_seen * config.n_layers * kv_row
    )


def pack_model(
    source: Source,
    format: Format,
    *,
    buffer: Buffer | None = None,
    neuron_orders: NeuronOrders | None = None,
    predicted_layers: Layers = frozenset(),
    n_threads: int = 1,
    progress: Progress = ignore_progress,
) -> PackedModel:
    """Read and pack all weights into `buffer`, or into new huge-page memory.

    `predicted_layers` are the layers whose gate rows are bit-reversed. `neuron_orders[layer][i]` is
    the checkpoint's neuron that is packed at position i. The bytes do not depend on `n_threads`.
    Raises InvalidCheckpoint if weights are not finite or exceed the format's range.
    """
    layout = packed_layout(source.config, format, predicted_layers)
    if buffer is None:
        buffer = _native.allocate_bytes(layout.n_bytes)
    task, done = f"packing to {format.name}", 0
    progress(task, 0, layout.n_bytes)
    packer = _Packer(source, format, layout, buffer, neuron_orders, predicted_layers)
    workers = ThreadPoolExecutor(n_threads)
    try:
        for n_bytes in workers.map(lambda pack: pack(), packer.parts()):
            done += n_bytes
            progress(task, done, layout.n_bytes)
    finally:
        workers.shutdown(cancel_futures=True)
    progress(task, layout.n_bytes, layout.n_bytes)
    return view_packed(buffer, source.config, format, predicted_layers)


def order_hash(neuron_orders: NeuronOrders | None) -> str:
    """Return the SHA-256 of a neuron order, or SOURCE_ORDER. It ties files to that order."""
    if neuron_orders is None:
        return SOURCE_ORDER
    digest = hashlib.sha256()
    for order in neuron_orders:
        digest.update(np.asarray(order, "<i4").tobytes())
    return digest.hexdigest()


class _Packer:
    """Fills a buffer in parts. Several threads may pack parts at once."""

    def __init__(
        self,
        source: Source,
        format: Format,
        layout: PackedLayout,
        buffer: Buffer,
        neuron_orders: NeuronOrders | None,
        predicted_layers: Layers,
    ) -> None:
        self.source, self.format = source, format
        self.layout, self.buffer, self.neuron_orders = layout, buffer, neuron_orders
        self.predicted_layers = predicted_layers

    def parts(self) -> Iterator[Callable[[], int]]:
        """Yield functions that each pack one part and return its number of bytes."""
        config = self.source.config
        head = head_name(config)
        if has_preview(config, self.predicted_layers):
            pack_head = partial(self._pack_head, head)
        else:
            pack_head = partial(self._pack_matrix, head, None, [head])
        if config.has_tied_head:
            yield pack_head
        else:
            yield partial(self._pack_matrix, "embedding", None, ["embedding"])
        for layer in range(config.n_layers):
            for role in ("attention_norm", "ffn_norm"):
                yield partial(self._copy_norm, role, layer)
            yield partial(self._pack_matrix, "qkv", layer, ["q", "k", "v"])
            yield partial(self._pack_matrix, "o", layer, ["o"])
            if layer in self.predicted_layers:
                yield partial(self._pack_bit_reversed, layer)
            else:
                yield partial(self._pack_matrix, "gate", layer, ["gate"])
            yield partial(self._pack_bundles, layer)
        yield partial(self._copy_norm, "norm", None)
        if not config.has_tied_head:
            yield pack_head

    def _read(self, role: str, layer: int | None) -> NDArray[np.float32]:
        w = self.source.read(role, layer)
        check_range(self.format, w, role if layer is None else f"{role} of layer {layer}")
        if role == "down":
            w = w.T  # neuron-major: row j is what neuron j adds to the output
        if self.neuron_orders is not None and layer is not None and role in ("gate", "up", "down"):
            w = w[self.neuron_orders[layer]]
        return w

    def _array(self, name: str) -> Buffer:
        first, n_bytes = self.layout.arrays[name]
        return self.buffer[first : first + n_bytes]

    def _copy_norm(self, role: str, layer: int | None) -> int:
        norm = np.ascontiguousarray(self._read(role, layer), np.float32)
        array = self._array(role if layer is None else f"{layer}.{role}")
        array[:] = norm.view(np.uint8)
        return array.size

    def _pack_matrix(self, name: str, layer: int | None, roles: list[str]) -> int:
        name = name if layer is None else f"{layer}.{name}"
        parts = [self._read(role, layer) for role in roles]
        w = parts[0] if len(parts) == 1 else np.concatenate(parts)
        array = self._array(name)
        pack_interleaved(self.format, w, array)
        return array.size

    def _pack_bit_reversed(self, layer: int) -> int:
        array = self._array(f"{layer}.gate")
        gate = self._read("gate", layer)
        pack_bit_reversed_into(self.format, gate, array.reshape(len(gate), -1))
        return array.size

    def _pack_head(self, name: str) -> int:
        """Pack the head's rows row-major, because few of them are read, and their preview."""
        head, rows, tiles = self._read(name, None), self._array(name), self._array("preview")
        pack_row_major_into(self.format, head, rows.reshape(len(head), -1))
        pack_preview_into(head, tiles)
        return rows.size + tiles.size

    def _pack_bundles(self, layer: int) -> int:
        array = self._array(f"{layer}.bundles")
        up, down = self._read("up", layer), self._read("down", layer)
        pack_bundles_into(self.format, up, down, array.reshape(len(up), -1))
        return array.size


def view_packed(
    buffer: Buffer, config: ModelConfig, format: Format, predicted_layers: Layers = frozenset()
) -> PackedModel:
    """Return the packed model whose bytes are in `buffer`, without a copy."""
    layout = packed_layout(config, format, predicted_layers)
    hidden, attention = config.hidden_size, config.attention_size

    def matrix(name: str, n_rows: int, n_cols: int) -> Rows:
        offset, _ = layout.arrays[name]
        return Rows(format=format, memory=buffer, n_rows=n_rows, n_cols=n_cols, offset=offset)

    def gate(layer: int) -> Rows:
        if layer not in predicted_layers:
            return matrix(f"{layer}.gate", config.n_neurons, hidden)
        first = layout.arrays[f"{layer}.gate"][0]
        return row_major_rows(format, buffer, first, config.n_neurons, hidden, is_bit_reversed=True)

    def norm(name: str) -> NDArray[np.float32]:
        first, n_bytes = layout.arrays[name]
        return buffer[first : first + n_bytes].view(np.float32)

    layers = []
    for layer in range(config.n_layers):
        first = layout.arrays[f"{layer}.bundles"][0]
        up, down = bundle_rows(format, buffer, first, config.n_neurons, hidden)
        layers.append(
            LayerWeights(
                attention_norm=norm(f"{layer}.attention_norm"),
                qkv=matrix(f"{layer}.qkv", config.qkv_size, hidden),
                o=matrix(f"{layer}.o", hidden, attention),
                ffn_norm=norm(f"{layer}.ffn_norm"),
                gate=gate(layer),
                up=up,
                down=down,
            )
        )
    previewed: Preview | None = None
    if has_preview(config, predicted_layers):
        first, n_bytes = layout.arrays["preview"]
        tiles = buffer[first : first + n_bytes]
        previewed = Preview(n_rows=config.vocab_size, n_cols=hidden, tiles=tiles)
        first = layout.arrays[head_name(config)][0]
        head = row_major_rows(format, buffer, first, config.vocab_size, hidden)
    else:
        head = matrix(head_name(config), config.vocab_size, hidden)
    embedding = head if config.has_tied_head else matrix("embedding", config.vocab_size, hidden)
    return ModelWeights(embedding, tuple(layers), norm("norm"), head, previewed)


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
