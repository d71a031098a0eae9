"""How many bytes each part of a model takes, on either device: the one place that counts them."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.kernels import Format, _native
from hybrid.model.config import ModelConfig
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights import preview
from hybrid.weights.formats import BLOCK, row_bytes

_T = _native.PREFILL_CHUNK
MAX_SPLITS = 16  # partial sums that the GPU's kernels leave (kernels.triton_kernels)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of one model in one format, with a KV cache of `n_context` positions."""

    config: ModelConfig
    format: Format
    n_context: int
    n_splits: int = MAX_SPLITS
    rows_per_count: int = 8  # of the counters of neurons that fired; 0: one for all

    def cpu_row(self, n_cols: int) -> int:
        """Of a packed row."""
        return sum(row_bytes(self.format, n_cols))

    def gpu_row(self, n_cols: int) -> int:
        """Of a row on the GPU, without padding."""
        if self.format is Format.bf16:
            return 2 * n_cols
        values = n_cols if self.format is Format.q8 else n_cols // 2
        return values + n_cols // BLOCK * 2

    @property
    def neuron(self) -> int:
        """Gate, up or down row of one neuron, on the GPU."""
        return self.gpu_row(self.config.hidden_size)

    @property
    def attention(self) -> int:
        """Projections of one layer, on the GPU."""
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
        """What a token reads of the head on the CPU."""
        c = self.config
        n_bytes = c.vocab_size * self.cpu_row(c.hidden_size)
        if not (is_previewed and preview.pays(c.vocab_size)):
            return n_bytes
        in_full = preview.SHORTLISTED * n_bytes
        return preview.preview_bytes(c.vocab_size, c.hidden_size) + round(in_full)

    @property
    def head(self) -> int:
        """The head and its norm and logits, on the GPU."""
        c = self.config
        return c.vocab_size * (self.neuron + 4) + 4 * c.hidden_size

    def kv(self, n_positions: int) -> int:
        """fp16 keys and values of one layer."""
        return 2 * 2 * self.config.n_kv_heads * self.config.head_dim * n_positions

    @property
    def resident(self) -> int:
        """What a layer takes on the GPU before any of its neurons: attention, KV cache, norms."""
        return self.attention + self.kv(self.n_context) + 2 * 4 * self.config.hidden_size

    def layer(self, placement: LayerPlacement) -> int:
        """One layer on the GPU."""
        if not placement.is_on_gpu:
            return 0
        return self.resident + (placement.n_gate + 2 * placement.n_hot) * self.neuron

    def buffers(self, n_values: int | None = None) -> int:
        """What a sequence's pass needs besides, and the rope tables. `n_values`: of the widest hot
        set.
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
        """All tensors that a plan puts on the GPU, with one sequence's cache and buffers."""
        if not plan.uses_gpu:
            return 0
        widest = max(layer.n_hot for layer in plan.layers)
        layers = sum(self.layer(layer) for layer in plan.layers)
        return layers + self.buffers(widest) + (self.head if plan.is_head_on_gpu else 0)
