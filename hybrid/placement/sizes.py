"""Sizes of each part of a model in bytes, on CPU and GPU, as a plan needs them."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.kernels import Format, _native
from hybrid.model.config import ModelConfig
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights.formats import BLOCK, has_blocks, plain_row_bytes, whole_blocks
from hybrid.weights.layout import PackedArray, PackedLayout
from hybrid.weights.preview import SHORTLISTED

_T = _native.PREFILL_CHUNK
MAX_SPLITS = 16  # most partial sums that the GPU's kernels write (kernels.gpu.triton_kernels)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of one model with a KV cache of `n_context` positions. Its layers are all alike."""

    layout: PackedLayout
    n_context: int
    n_splits: int = MAX_SPLITS
    rows_per_count: int = 8  # neurons per counter of those that fired; 0: one counter for all
    # Whether any matrix has a matrix scale. The GPU then has fp32 scales of blocks, not fp16.
    has_matrix_scales: bool = False

    @property
    def config(self) -> ModelConfig:
        return self.layout.config

    @property
    def format(self) -> Format:
        """The format of activations."""
        return self.layout.format

    @property
    def neuron(self) -> int:
        """One neuron's gate, up or down row on the GPU."""
        return self._plain_row(self.layout.arrays["0.gate"])

    @property
    def cpu_neuron(self) -> int:
        """One neuron's gate, up or down row on the CPU."""
        return self.layout.arrays["0.gate"].row_bytes

    @property
    def attention(self) -> int:
        """The attention projections of one layer on the GPU."""
        return sum(self._plain(self.layout.arrays[name]) for name in ("0.qkv", "0.o"))

    @property
    def cpu_attention(self) -> int:
        arrays = (self.layout.arrays[name] for name in ("0.qkv", "0.o"))
        return sum(array.n_rows * array.row_bytes for array in arrays)

    @property
    def cpu_head(self) -> int:
        """The bytes of the head that one token reads on the CPU.

        A previewed head counts as its preview and the expected shortlist.
        """
        n_bytes = self.layout.head.n_rows * self.layout.head.row_bytes
        if not self.layout.has_preview:
            return n_bytes
        return self.layout.arrays["preview"].n_bytes + round(SHORTLISTED * n_bytes)

    @property
    def head_rows(self) -> int:
        """The head's rows on the GPU."""
        return self._plain(self.layout.head)

    @property
    def head(self) -> int:
        """The head with its norm and logits on the GPU."""
        return self.head_rows + 4 * self.config.vocab_size + self.layout.arrays["norm"].n_bytes

    def kv(self, n_positions: int) -> int:
        """Return the bytes of one layer's fp16 keys and values."""
        return 2 * 2 * self.config.n_kv_heads * self.config.head_dim * n_positions

    @property
    def resident(self) -> int:
        """A layer on the GPU without its neurons: attention, KV cache and norms."""
        return self.attention + self.kv(self.n_context) + 2 * 4 * self.config.hidden_size

    def layer(self, placement: LayerPlacement) -> int:
        """Return the bytes of one layer on the GPU."""
        if not placement.is_on_gpu:
            return 0
        return self.resident + (placement.n_gate + 2 * placement.n_hot) * self.neuron

    def buffers(self, n_values: int | None = None) -> int:
        """Return the bytes of the buffers of one sequence's pass, and of the rope tables.

        `n_values` is the size of the largest hot set of any layer; None counts all neurons.
        """
        c = self.config
        hidden, attention = c.hidden_size, c.attention_size
        n_values = c.n_neurons if n_values is None else n_values

        def vectors(n: int) -> int:
            n = whole_blocks(n)
            return _T * (2 * n if self.format is Format.bf16 else n + n // BLOCK * 4)

        floats = (
            _T * (3 * hidden + c.qkv_size + 2 * attention + c.n_neurons + n_values)
            + self.n_splits * (_T + 1) * hidden
        )
        n_counts = -(-c.n_neurons // self.rows_per_count) if self.rows_per_count else 1
        tables = 2 * self.n_context * (c.head_dim // 2)
        return (
            4 * (floats + tables)
            + vectors(hidden)
            + vectors(attention)
            + 8 * (1 + c.n_layers * n_counts)
        )

    def plan(self, plan: PlacementPlan) -> int:
        """Return the bytes of all tensors of a plan, with one sequence's KV cache and buffers."""
        if not plan.uses_gpu:
            return 0
        widest = max(layer.n_hot for layer in plan.layers)
        layers = sum(self.layer(layer) for layer in plan.layers)
        return layers + self.buffers(widest) + (self.head if plan.is_head_on_gpu else 0)

    def _plain(self, array: PackedArray) -> int:
        """Return the bytes of a matrix on the GPU."""
        return array.n_rows * self._plain_row(array)

    def _plain_row(self, array: PackedArray) -> int:
        n_bytes = plain_row_bytes(array.format, array.n_cols)
        if self.has_matrix_scales and has_blocks(array.format):
            n_bytes += whole_blocks(array.n_cols) // BLOCK * 2
        return n_bytes
