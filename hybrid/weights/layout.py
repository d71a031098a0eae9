"""Layout of a packed model: one table of its arrays.

Packing, viewing, reading back, the file's header, byte counts and placement all derive from this
table. `packed_rows` and csrc/kernels/kernels.h describe how rows lie within an array.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.kernels import Format, _native
from hybrid.model.config import ModelConfig
from hybrid.model.stored_predictors import (
    FIRST,
    FIRST_BIAS,
    SECOND,
    SECOND_BIAS,
    StoredPredictors,
)
from hybrid.weights.formats import row_bytes
from hybrid.weights.packed_rows import ALIGNMENT, Buffer, bundle_bytes, matrix_bytes
from hybrid.weights.preview import preview_bytes

Layers = Collection[int]
# "norm" is one row of fp32 values. "bundles" hold a neuron's up and down row in each row.
RowLayout = Literal["norm", "interleaved", "row_major", "bit_reversed", "bundles", "preview"]


@dataclass(frozen=True, slots=True)
class PackedArray:
    """A part of the buffer of a packed model."""

    name: str  # in files, for example "3.gate"
    layer: int | None
    roles: tuple[str, ...]  # in the source, whose rows it holds
    n_rows: int
    n_cols: int
    layout: RowLayout
    format: Format  # of the rows; norms are fp32 and previews 2-bit in every format
    first: int = 0  # its first byte in the buffer

    @property
    def n_bytes(self) -> int:
        match self.layout:
            case "norm":
                return 4 * self.n_cols
            case "interleaved":
                return matrix_bytes(self.format, self.n_rows, self.n_cols)
            case "row_major" | "bit_reversed":
                return self.n_rows * self.row_bytes
            case "bundles":
                return self.n_rows * bundle_bytes(self.format, self.n_cols)
            case "preview":
                return preview_bytes(self.n_rows, self.n_cols)

    @property
    def row_bytes(self) -> int:
        """Bytes that a kernel reads for one matrix row, without what pads tiles or bundles."""
        return sum(row_bytes(self.format, self.n_cols))

    @property
    def n_scales(self) -> int:
        """Number of matrix scales behind the rows: one per role, but none for norms and previews.

        They are fp32 and have a cache line of their own.
        """
        return 0 if self.layout in ("norm", "preview") else len(self.roles)

    @property
    def end(self) -> int:
        """First byte of the next array, at a cache line."""
        return self._first_scale + (ALIGNMENT if self.n_scales else 0)

    @property
    def _first_scale(self) -> int:
        return self.first + -(-self.n_bytes // ALIGNMENT) * ALIGNMENT

    def of(self, buffer: Buffer) -> Buffer:
        """Return the array's bytes (n_bytes,) in a packed model's buffer, without a copy."""
        return buffer[self.first : self.first + self.n_bytes]

    def matrix_scales(self, buffer: Buffer) -> NDArray[np.float32]:
        """Return the scales of the roles' matrices (n_scales,) in a buffer, without a copy."""
        return buffer[self._first_scale :][: 4 * self.n_scales].view(np.float32)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The arrays of a packed model, in the order in which a token needs them."""

    config: ModelConfig
    format: Format
    arrays: dict[str, PackedArray]  # by name

    @property
    def n_bytes(self) -> int:
        return max(array.end for array in self.arrays.values())

    @property
    def head(self) -> PackedArray:
        """The head's rows, which are the embedding's if the two are tied."""
        return self.arrays["embedding" if self.config.has_tied_head else "head"]

    @property
    def has_preview(self) -> bool:
        return "preview" in self.arrays

    @property
    def has_stored_predictors(self) -> bool:
        """Whether the predictors of the model's own file are packed with it."""
        return f"0.{FIRST}" in self.arrays

    @property
    def predicted_layers(self) -> list[int]:
        """Layers whose gate rows are bit-reversed, ascending."""
        return [
            layer
            for layer in range(self.config.n_layers)
            if self.arrays[f"{layer}.gate"].layout == "bit_reversed"
        ]


def packed_layout(
    config: ModelConfig,
    format: Format,
    predicted_layers: Layers = frozenset(),
    *,
    has_preview: bool = False,
    stored: StoredPredictors | None = None,
) -> PackedLayout:
    """Lay out a model.

    `has_preview` adds a preview of the head to it, `stored` the predictors of its own file, which
    then select the gates of every layer.
    """
    if stored is not None:
        predicted_layers = range(config.n_layers)
    arrays: dict[str, PackedArray] = {}
    end = 0
    for array in _arrays(config, format, predicted_layers, has_preview, stored):
        arrays[array.name] = replace(array, first=end)
        end = arrays[array.name].end
    return PackedLayout(config, format, arrays)


def _arrays(
    config: ModelConfig,
    format: Format,
    predicted_layers: Layers,
    has_preview: bool,
    stored: StoredPredictors | None,
) -> Iterator[PackedArray]:
    hidden, n_neurons, vocab = config.hidden_size, config.n_neurons, config.vocab_size

    def array(
        name: str, roles: tuple[str, ...], n_rows: int, n_cols: int, layout: RowLayout
    ) -> PackedArray:
        return PackedArray(name, None, roles, n_rows, n_cols, layout, format)

    head = "embedding" if config.has_tied_head else "head"
    head_layout: RowLayout = "row_major" if has_preview else "interleaved"
    embedding_layout = head_layout if config.has_tied_head else "interleaved"
    yield array("embedding", ("embedding",), vocab, hidden, embedding_layout)
    for layer in range(config.n_layers):
        gate_layout: RowLayout = "bit_reversed" if layer in predicted_layers else "interleaved"
        for part in (
            array("attention_norm", ("attention_norm",), 1, hidden, "norm"),
            array("qkv", ("q", "k", "v"), config.qkv_size, hidden, "interleaved"),
            array("o", ("o",), hidden, config.attention_size, "interleaved"),
            array("ffn_norm", ("ffn_norm",), 1, hidden, "norm"),
            array("gate", ("gate",), n_neurons, hidden, gate_layout),
            array("bundles", ("up", "down"), n_neurons, hidden, "bundles"),
        ):
            yield replace(part, name=f"{layer}.{part.name}", layer=layer)
        if stored is not None:
            yield from _stored_arrays(config, stored, layer)
    yield array("norm", ("norm",), 1, hidden, "norm")
    if not config.has_tied_head:
        yield array("head", ("head",), vocab, hidden, head_layout)
    if has_preview:
        yield array("preview", (head,), vocab, hidden, "preview")


def _stored_arrays(
    config: ModelConfig, stored: StoredPredictors, layer: int
) -> Iterator[PackedArray]:
    """Yield the arrays of one layer's predictor. Its matrices are q8, whatever the model's are."""
    hidden, n_neurons, rank = config.hidden_size, config.n_neurons, stored.ranks[layer]
    parts: list[tuple[str, int, int, RowLayout]] = [
        (FIRST, rank, hidden, "interleaved"),
        (SECOND, n_neurons, rank, "interleaved"),
    ]
    if stored.has_biases:
        parts += [(FIRST_BIAS, 1, rank, "norm"), (SECOND_BIAS, 1, n_neurons, "norm")]
    for role, n_rows, n_cols, layout in parts:
        yield PackedArray(f"{layer}.{role}", layer, (role,), n_rows, n_cols, layout, Format.q8)


def decode_bytes(
    layout: PackedLayout,
    n_tokens: int,
    first_position: int,
    n_active: int,
    n_gates: int | None = None,
    n_shortlisted: int = 0,
) -> int:
    """Compute the bytes of weights and KV cache that decoding `n_tokens` tokens reads.

    Each token reads all rows of attention, one row of the embedding, the 16-bit keys and values of
    all positions so far, and all rows of the head. The first token is at `first_position`. Over all
    tokens, `n_gates` gate rows are read (None: all), and the up and down rows of `n_active`
    (neuron, token) pairs. If `n_shortlisted` is not 0, a token reads the head's preview instead of
    its rows. Over all tokens, `n_shortlisted` rows of the head are then read too.
    """
    config, arrays, head = layout.config, layout.arrays, layout.head
    if n_gates is None:
        n_gates = n_tokens * config.n_layers * config.n_neurons
    attention = sum(
        arrays[name].n_rows * arrays[name].row_bytes
        for layer in range(config.n_layers)
        for name in (f"{layer}.qkv", f"{layer}.o")
    )
    n_seen = sum(range(first_position + 1, first_position + n_tokens + 1))
    kv_row = 2 * 2 * config.n_kv_heads * _native.head_stride(config.head_dim)
    head_bytes = head.n_rows * head.row_bytes
    if n_shortlisted > 0:
        head_bytes = arrays["preview"].n_bytes
    return (
        n_tokens * (arrays["embedding"].row_bytes + attention + head_bytes)
        + n_gates * arrays["0.gate"].row_bytes
        + n_active * 2 * arrays["0.bundles"].row_bytes
        + n_shortlisted * head.row_bytes
        + n_seen * config.n_layers * kv_row
    )
