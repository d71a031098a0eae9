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
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Predictor, Preview, Rows, _native
from hybrid.model.config import ModelConfig
from hybrid.model.stored_predictors import (
    FIRST,
    FIRST_BIAS,
    SECOND,
    SECOND_BIAS,
    StoredPredictors,
)
from hybrid.model.weights import (
    KV_SAMPLED_ROWS,
    LayerWeights,
    ModelWeights,
    balancing_factor,
    sampled_rows,
)
from hybrid.progress import Progress, ignore_progress
from hybrid.threads import map_on_threads
from hybrid.weights.formats import TILE_ROWS
from hybrid.weights.layout import PackedArray, PackedLayout
from hybrid.weights.matrix_scale import (
    RANGES,
    SAMPLED_ROWS,
    Magnitudes,
    check_finite,
    is_usual,
    largest_of_blocks,
    scale_for,
)
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
_BY_NEURON = ("gate", "up", "down", SECOND, SECOND_BIAS)  # roles whose rows belong to neurons
SOURCE_ORDER = "as in the source"
PART_BYTES = 4 << 20  # fp32 weights that a thread reads at once; packing needs little memory then


class SourceTensor(Protocol):
    """A tensor whose values are read part by part, by an index such as (slice(0, 256),)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def fp32(self, part: tuple[slice | NDArray[np.intp], ...] = ()) -> NDArray[np.float32]: ...
    def in_memory(self) -> SourceTensor: ...
    def release(self) -> None: ...


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
    not depend on `n_threads`. Raises InvalidCheckpoint if weights are not finite or are beyond what
    the format holds with a matrix scale.
    """
    output = buffer if buffer is not None else _native.allocate_bytes(layout.n_bytes)

    def pack(arrays: Sequence[PackedArray]) -> int:
        first = arrays[0]
        roles = [_open(source, role, first.layer, neuron_orders) for role in first.roles]
        scales = [] if first.layout == "norm" else [role.likely_scale(first) for role in roles]
        try:
            return _pack_arrays(arrays, roles, scales, output)
        except _BeyondRange:  # of a row that the likely scale does not know
            scales = [role.scale(first) for role in roles]
            return _pack_arrays(arrays, roles, scales, output)
        finally:
            for role in roles:
                role.stored.release()

    task, done = f"packing to {layout.format.name}", 0
    progress(task, 0, layout.n_bytes)
    # With little memory one thread packs: this one, which needs no further stack.
    for n_bytes in map_on_threads(pack, _by_source(layout), n_threads):
        done += n_bytes
        progress(task, done, layout.n_bytes)
    progress(task, layout.n_bytes, layout.n_bytes)
    return view_packed(_buffer_of(output), layout)


def _buffer_of(output: Buffer | Output) -> Buffer:
    return output if isinstance(output, np.ndarray) else output.buffer


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


class _BeyondRange(Exception):
    """A weight is larger than what the format holds without a matrix scale."""


@dataclass(frozen=True, slots=True)
class _Role:
    """A role's rows in packed order."""

    tensor: SourceTensor
    stored: SourceTensor  # the same in its file
    name: str
    # Neuron-major: row j is what neuron j adds to the output.
    is_transposed: bool
    order: NDArray[np.intp] | None  # of the rows; None: the source's
    factor: float  # of all weights, see `balancing_factor`

    @property
    def n_rows(self) -> int:
        shape = self.tensor.shape
        return 1 if len(shape) == 1 else shape[1 if self.is_transposed else 0]

    def read(self, rows: slice) -> NDArray[np.float32]:
        """Return some rows."""
        if len(self.tensor.shape) == 1:
            w = self.tensor.fp32()
            return w if self.order is None else w[self.order]
        index = rows if self.order is None else self.order[rows]
        w = self.tensor.fp32((slice(None), index) if self.is_transposed else (index,))
        if self.factor != 1.0:
            with np.errstate(over="ignore"):
                w = w * np.float32(self.factor)
        return w.T if self.is_transposed else w

    def likely_scale(self, array: PackedArray) -> float:
        """Return the matrix scale, if no row that is not sampled exceeds the format's range."""
        usual = is_usual(array.format, self._largest_of_blocks(array))
        return 1.0 if usual else self.scale(array)

    def scale(self, array: PackedArray) -> float:
        """Return the matrix scale. Reads all weights. Raises InvalidCheckpoint."""
        rows = range(self.n_rows)
        top = max(check_finite(w, self.name) for w in self._parts(array, rows))
        magnitudes = Magnitudes(top, self._largest_of_blocks(array))
        return scale_for(array.format, magnitudes, self.name)

    def _largest_of_blocks(self, array: PackedArray) -> NDArray[np.float32]:
        rows = range(*sampled_rows(self.n_rows, SAMPLED_ROWS).indices(self.n_rows))
        return np.concatenate([largest_of_blocks(w) for w in self._parts(array, rows)])

    def _parts(self, array: PackedArray, rows: range) -> Iterator[NDArray[np.float32]]:
        """Yield the weights of evenly spread rows, about PART_BYTES at a time."""
        step = max(1, PART_BYTES // (4 * array.n_cols))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            yield self.read(slice(part.start, part.stop, part.step))


def _open(
    source: Source, role: str, layer: int | None, neuron_orders: NeuronOrders | None
) -> _Role:
    tensor = stored = source.tensor(role, layer)
    order = None
    if neuron_orders is not None and layer is not None and role in _BY_NEURON:
        order = neuron_orders[layer]
    if role == "down" or order is not None:
        tensor = tensor.in_memory()  # its parts are spread over the whole tensor
    name = role if layer is None else f"{role} of layer {layer}"
    factor = _balancing_factor(source, role, layer)
    return _Role(tensor, stored, name, role == "down", order, factor)


def _balancing_factor(source: Source, role: str, layer: int | None) -> float:
    if layer is None:
        return 1.0

    def sample(name: str, layer: int) -> NDArray[np.float32]:
        tensor = source.tensor(name, layer)
        if len(tensor.shape) == 1:
            return tensor.fp32()
        return tensor.fp32((sampled_rows(tensor.shape[0], KV_SAMPLED_ROWS),))

    return balancing_factor(sample, role, layer)


def _pack_arrays(
    arrays: Sequence[PackedArray],
    roles: Sequence[_Role],
    scales: Sequence[float],
    output: Buffer | Output,
) -> int:
    """Pack the roles' weights into arrays that hold the same ones. Return the arrays' bytes.

    Raises _BeyondRange.
    """
    first, n_bytes = arrays[0], sum(array.n_bytes for array in arrays)
    target = _buffer_of(output)
    for array in arrays:
        array.matrix_scales(target)[:] = scales[: array.n_scales]
    for rows in _parts(first):
        weights = _read(roles, scales, rows, first)
        for array in arrays:
            _pack_rows(array, rows, weights, scales, target)
        if not isinstance(output, np.ndarray):
            output.written(n_bytes * (rows.stop - rows.start) // first.n_rows)
    return n_bytes


def _read(
    roles: Sequence[_Role], scales: Sequence[float], rows: slice, array: PackedArray
) -> list[NDArray[np.float32]]:
    """Return the scaled weights of some rows: side by side for bundles, else one after the other.

    Raises InvalidCheckpoint if they are not finite, and _BeyondRange.
    """
    if array.layout == "norm":
        check_finite(w := roles[0].read(rows), roles[0].name)
        return [w]
    weights, begin = [], 0
    for role, scale in zip(roles, scales, strict=True):
        first, last = max(rows.start - begin, 0), min(rows.stop - begin, role.n_rows)
        if array.layout != "bundles":
            begin += role.n_rows
        if first >= last:
            continue
        w = role.read(slice(first, last))
        if check_finite(w, role.name) > RANGES[array.format].most and scale == 1.0:
            raise _BeyondRange
        weights.append(w if scale == 1.0 else w * np.float32(1 / scale))
    return weights


def _parts(array: PackedArray) -> Iterator[slice]:
    """Yield ranges of rows of about PART_BYTES in fp32. They begin at whole tiles of every kind."""
    step = max(1, PART_BYTES // (4 * array.n_cols * CHUNK_ROWS)) * CHUNK_ROWS
    for first in range(0, array.n_rows, step):
        yield slice(first, min(first + step, array.n_rows))


def _pack_rows(
    array: PackedArray,
    rows: slice,
    weights: Sequence[NDArray[np.float32]],
    scales: Sequence[float],
    buffer: Buffer,
) -> None:
    """Pack the scaled rows of the array's roles into its part of the buffer."""
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
            tiles = target[begin : preview_bytes(rows.stop, array.n_cols)]
            pack_preview_into(w, tiles, matrix_scale=scales[0])


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


def view_predictors(
    buffer: Buffer, layout: PackedLayout, stored: StoredPredictors
) -> list[Predictor]:
    """Return the predictors of the model's own file, one per layer, without a copy."""

    def rows(name: str) -> Rows:
        array = layout.arrays[name]
        (scale,) = array.matrix_scales(buffer)
        packed = Rows(
            format=array.format,
            memory=buffer,
            n_rows=array.n_rows,
            n_cols=array.n_cols,
            offset=array.first,
        )
        return packed.scaled(float(scale))

    def biases(name: str) -> NDArray[np.float32] | None:
        array = layout.arrays.get(name)
        return None if array is None else array.of(buffer).view(np.float32)

    return [
        Predictor(
            first_matrix=rows(f"{layer}.{FIRST}"),
            second_matrix=rows(f"{layer}.{SECOND}"),
            threshold=stored.threshold,
            input=stored.input,
            first_biases=biases(f"{layer}.{FIRST_BIAS}"),
            second_biases=biases(f"{layer}.{SECOND_BIAS}"),
        )
        for layer in range(layout.config.n_layers)
    ]
