"""Llama: gated FFN, grouped-query attention, RMSNorm and rotary positions, without scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.model.config import ModelConfig
from hybrid.model.families.fields import (
    Fields,
    read_activation,
    read_heads,
    read_rope_theta,
    read_special_ids,
    read_threshold,
)
from hybrid.model.families.refusals import (
    check_model_type,
    has_own_code,
    refuse_other_mathematics,
)

NAME = "llama"
# Architectures and their model_type. The second one is ProSparse's. Others have given the same name
# to models that compute something else: NOSA ("llama") and SparseLM ("llama_sparse_relu").
MODEL_TYPES = {"LlamaForCausalLM": "llama", "SparseLlamaForCausalLM": "sparsellama"}
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
# Those of LlamaConfig in transformers 5, and of MiniCPM's own MiniCPMConfig. The classes have
# default sizes too, but a config without its sizes is more likely broken.
CLASS_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def parse(fields: Fields) -> ModelConfig:
    """Parse config.json; every scale is 1. Raises InvalidCheckpoint, UnsupportedModel."""
    architecture = fields.values["architectures"][0]
    check_model_type(fields, MODEL_TYPES[architecture])
    if architecture == "LlamaForCausalLM" and has_own_code(fields.values):
        fields.notices.add(
            f"{fields.path.name}: auto_map names code in the model's folder, which is not run: the "
            "model is computed as a Llama, as in transformers without trust_remote_code"
        )
    defaults: Mapping[str, Any] = CLASS_DEFAULTS
    if architecture == "SparseLlamaForCausalLM":  # never guess that a sparse model is dense
        defaults = {key: value for key, value in defaults.items() if key != "hidden_act"}
    return parse_transformer(fields.with_defaults(defaults), NAME, is_tied_by_default=False)


def parse_transformer(fields: Fields, family: str, *, is_tied_by_default: bool) -> ModelConfig:
    """Parse what Llama has in common with families that are built like it; every scale is 1."""
    refuse_other_mathematics(fields)
    vocab_size = fields.size("vocab_size")
    hidden_size = fields.size("hidden_size")
    n_layers = fields.size("num_hidden_layers")
    n_heads, n_kv_heads, head_dim = read_heads(fields, hidden_size)
    activation = read_activation(fields)
    bos_id, eos_ids = read_special_ids(fields, vocab_size)
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
        bos_id=bos_id,
        eos_ids=eos_ids,
    )
