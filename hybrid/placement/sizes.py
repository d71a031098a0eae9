"""Sizes of each part of a model in bytes, on CPU and GPU. No other module computes them."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.kernels import Format, _native
from hybrid.model.config import ModelConfig
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights import preview
from hybrid.weights.formats import BLOCK, row_bytes

_T = _native.PREFILL_CHUNK
MAX_SPLITS = 16  # most partial sums that the GPU's kernels write (kernels.gpu.triton_kernels)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of one model in one format, with a KV cache of `n_context` positions."""

    config: ModelConfig
    format: Format
    n_context: int
    n_splits: int = MAX_SPLITS
    rows_per_count: int = 8  # neurons per counter of those that fired; 0: one counter for all

    def cpu_row(self, n_cols: int) -> int:
        """Return the bytes of a packed row on the CPU."""
        return sum(row_bytes(self.format, n_cols))

    def gpu_row(self, n_cols: int) -> int:
        """Return the bytes of a row on the GPU, without padding."""
        if self.format is Format.bf16:
            return 2 * n_cols
        values = n_cols if self.format is Format.q8 else n_cols // 2
        return values + n_cols // BLOCK * 2

    @property
    def neuron(self) -> int:
        """One neuron's gate, up or down row on the GPU."""
        return self.gpu_row(self.config.hidden_size)

    @property
    def attention(self) -> int:
        """The attention projections of one layer on the GPU."""
        c = self.config
        return c.qkv_size * self.gpu_row(c.hidden_size) + c.hidden_size * self.gpu_row(
            c.attention_size
        )

    @property
    def cpu_attention(self) -> int:
        c = self.config
        return c.qkv_size * self.cpu_row(c.hidden_size) + c.hidden_size * self.cpu_row(
            c.attention_size
        )

    def cpu_head(self, *, is_previewed: bool) -> int:
        """Return the bytes of the head that one token reads on the CPU.

        A previewed head counts as its preview and the expected shortlist.
        """
        c = self.config
        n_bytes = c.vocab_size * self.cpu_row(c.hidden_size)
        if not (is_previewed and preview.pays(c.vocab_size)):
            return n_bytes
        in_full = preview.SHORTLISTED * n_bytes
        return preview.preview_bytes(c.vocab_size, c.hidden_size) + round(in_full)

    @property
    def head(self) -> int:
        """The head with its norm and logits on the GPU."""
        c = self.config
        return c.vocab_size * (self.neuron + 4) + 4 * c.hidden_size

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
