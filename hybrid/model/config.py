"""ModelConfig: the numbers of one transformer. `checkpoint` reads them from files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["relu", "fatrelu", "silu"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer with RMSNorm, RoPE, grouped-query attention and a gated FFN.

    The FFN is `down(act(gate x) * up x)`. A neuron fires if `gate x > 0` (relu), if
    `gate x >= threshold` (fatrelu), or always (silu).
    """

    family: str  # "minicpm" or "llama"
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_neurons: int  # per layer
    max_context: int  # positions that the model was trained for
    rms_norm_eps: float
    rope_theta: float
    activation: Activation
    threshold: float  # of fatrelu; 0.0 otherwise
    embedding_scale: float  # x = embedding[token] * embedding_scale
    residual_scale: float  # x = x + branch(x) * residual_scale
    logit_scale: float  # logits = head(norm(x) * logit_scale)
    has_tied_head: bool  # the head is the embedding
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def is_sparse(self) -> bool:
        """Whether neurons can be exactly zero, so that skipping them changes nothing."""
        return self.activation != "silu"

    @property
    def attention_size(self) -> int:
        """Width of all query heads together, which is the width of the output projection."""
        return self.n_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Number of rows of the joined q, k and v projections."""
        return self.attention_size + 2 * self.n_kv_heads * self.head_dim
