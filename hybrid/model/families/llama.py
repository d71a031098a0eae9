"""Llama: gated FFN, grouped-query attention, RMSNorm and rotary positions, without scales."""

from __future__ import annotations

from hybrid.errors import UnsupportedModel
from hybrid.model.config import ModelConfig
from hybrid.model.families.fields import (
    Fields,
    parse_token_ids,
    read_activation,
    read_bos_id,
    read_heads,
    read_rope_theta,
    read_threshold,
)

NAME = "llama"
ARCHITECTURES = ("LlamaForCausalLM", "SparseLlamaForCausalLM")
MODEL_TENSORS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER_TENSORS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_UNSUPPORTED = {  # keys that change the mathematics if they are set
    "attention_bias": "biases in attention",
    "mlp_bias": "biases in the FFN",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "weights quantised by another tool",
    "sliding_window": "sliding-window attention",
    "sparse_config": "sparse attention",
}


def parse(fields: Fields, *, family: str = NAME, is_tied_by_default: bool = False) -> ModelConfig:
    """Parse config.json; every scale is 1. Raises InvalidCheckpoint, UnsupportedModel."""
    for key, feature in _UNSUPPORTED.items():
        if fields.values.get(key):
            raise UnsupportedModel(
                f"{fields.path}: {key} is set, but this engine does not run {feature}"
            )
    vocab_size = fields.size("vocab_size")
    hidden_size = fields.size("hidden_size")
    n_layers = fields.size("num_hidden_layers")
    n_heads, n_kv_heads, head_dim = read_heads(fields, hidden_size)
    activation = read_activation(fields)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_neurons=fields.size("intermediate_size"),
        max_context=fields.size("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=read_rope_theta(fields),
        activation=activation,
        threshold=read_threshold(fields) if activation == "fatrelu" else 0.0,
        embedding_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
        has_tied_head=fields.boolean("tie_word_embeddings", is_tied_by_default),
        bos_id=read_bos_id(fields, vocab_size),
        eos_ids=parse_token_ids(
            fields.values.get("eos_token_id", 2), "eos_token_id", vocab_size, fields.path
        ),
    )
