"""The shapes of a model: those of its config or, if it has none that hybrid runs, raw fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.model.config import ModelConfig

Shapes = dict[str, int | float | bool]

# Of each shape: its key in a GGUF file behind the architecture's name, and in config.json.
_KEYS = {
    "layers": ("block_count", "num_hidden_layers"),
    "hidden": ("embedding_length", "hidden_size"),
    "neurons": ("feed_forward_length", "intermediate_size"),
    "heads": ("attention.head_count", "num_attention_heads"),
    "kv_heads": ("attention.head_count_kv", "num_key_value_heads"),
    "head_dim": ("attention.key_length", "head_dim"),
    "vocabulary": ("vocab_size", "vocab_size"),
    "context": ("context_length", "max_position_embeddings"),
    "rope_theta": ("rope.freq_base", "rope_theta"),
    "norm_eps": ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    "experts": ("expert_count", "num_local_experts"),
    "embedding_scale": ("embedding_scale", "scale_emb"),
    "residual_scale": ("residual_scale", "scale_depth"),
    "logit_scale": ("logit_scale", "logit_scale"),
}


def shapes_of(config: ModelConfig) -> Shapes:
    """Return the shapes that a model is computed with."""
    return {
        "layers": config.n_layers,
        "hidden": config.hidden_size,
        "neurons": config.n_neurons,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_context,
        "rope_theta": config.rope_theta,
        "norm_eps": config.rms_norm_eps,
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": config.logit_scale,
        "tied_head": config.has_tied_head,
    }


def raw_gguf_shapes(file: GgufFile) -> Shapes:
    """Return what a file's metadata says, unchecked."""
    prefix = file.metadata.get("general.architecture")
    found = _raw({name: f"{prefix}.{key}" for name, (key, _) in _KEYS.items()}, file.metadata)
    pieces = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(pieces, list):
        found.setdefault("vocabulary", len(pieces))
    return found


def raw_config_shapes(content: Mapping[str, Any]) -> Shapes:
    """Return what a config.json says, unchecked."""
    return _raw({name: key for name, (_, key) in _KEYS.items()}, content)


def _raw(keys: Mapping[str, str], content: Mapping[str, Any]) -> Shapes:
    found: Shapes = {}
    for name, key in keys.items():
        value = content.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value
    return found
