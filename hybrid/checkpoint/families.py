"""Model families: what their config.json means, and what their tensors are called.

Owns everything that differs between MiniCPM and Llama, and the Hugging Face names, so that all
others know only roles ("gate", "attention_norm") and `ModelConfig`. Opens no files.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.model_config import Activation, ModelConfig

# architecture → (family, whether the head is tied where config.json does not say)
_FAMILIES = {
    "MiniCPMForCausalLM": ("minicpm", True),
    "LlamaForCausalLM": ("llama", False),
    "SparseLlamaForCausalLM": ("llama", False),
}
_ACTIVATIONS: tuple[Activation, ...] = ("relu", "fatrelu", "silu")
_UNSUPPORTED = {  # keys that change the mathematics where they are set
    "attention_bias": "biases in attention",
    "mlp_bias": "biases in the FFN",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "quantization_config": "weights quantised by another tool",
    "sliding_window": "sliding-window attention",
    "sparse_config": "sparse attention",
}
_BLOCK = 32  # weights of a row that share a scale: the kernels know whole blocks only
_MAX_SIZE = 2**31 - 1  # the kernels' integers
_MAX_FLOAT32 = float(np.finfo(np.float32).max)

_MODEL_TENSORS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER_TENSORS = {
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


class ExpectedTensor(NamedTuple):
    role: str
    layer: int | None
    name: str
    shape: tuple[int, ...]


def expected_tensors(config: ModelConfig) -> Iterator[ExpectedTensor]:
    """Every tensor that the model consists of; a tied head is none of its own."""
    hidden, neurons = config.hidden_size, config.n_neurons
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "embedding": (config.vocab_size, hidden),
        "norm": (hidden,),
        "head": (config.vocab_size, hidden),
        "attention_norm": (hidden,),
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "ffn_norm": (hidden,),
        "gate": (neurons, hidden),
        "up": (neurons, hidden),
        "down": (hidden, neurons),
    }
    for role, name in _MODEL_TENSORS.items():
        if role != "head" or not config.has_tied_head:
            yield ExpectedTensor(role, None, f"{name}.weight", shapes[role])
    for layer in range(config.n_layers):
        for role, name in _LAYER_TENSORS.items():
            yield ExpectedTensor(role, layer, f"model.layers.{layer}.{name}.weight", shapes[role])


def parse_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """The numbers of config.json's content; `path` is for messages."""
    fields = _Fields(config, path)
    family, is_tied_by_default = _FAMILIES[_architecture(fields)]
    for key, feature in _UNSUPPORTED.items():
        if config.get(key):
            raise UnsupportedModel(f"{path}: {key} is set: this engine does not run {feature}")
    vocab_size = fields.size("vocab_size")
    hidden_size = fields.size("hidden_size")
    n_layers = fields.size("num_hidden_layers")
    if hidden_size % _BLOCK:
        raise UnsupportedModel(
            f"{path}: hidden_size is {hidden_size}; expected a multiple of {_BLOCK}"
        )
    n_heads, n_kv_heads, head_dim = _heads(fields, hidden_size)
    activation = _activation(fields)
    embedding_scale = residual_scale = logit_scale = 1.0
    if family == "minicpm":
        # Where a key is absent the value is 1, as in the model's own configuration class.
        embedding_scale = fields.number("scale_emb", 1.0)
        residual_scale = fields.number("scale_depth", 1.0) / math.sqrt(n_layers)
        logit_scale = fields.number("dim_model_base", 1.0) / hidden_size
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
        rope_theta=_rope_theta(fields),
        activation=activation,
        threshold=_threshold(fields) if activation == "fatrelu" else 0.0,
        embedding_scale=embedding_scale,
        residual_scale=residual_scale,
        logit_scale=logit_scale,
        has_tied_head=fields.boolean("tie_word_embeddings", is_tied_by_default),
        bos_id=_bos_id(fields, vocab_size),
        eos_ids=parse_token_ids(config.get("eos_token_id", 2), "eos_token_id", vocab_size, path),
    )


def parse_token_ids(value: object, key: str, vocab_size: int, path: Path) -> tuple[int, ...]:
    """The ids of one number, a list of them, or null; `key` and `path` are for messages."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise InvalidCheckpoint(
            f"{path}: {key} is {reprlib.repr(value)}; expected ids from 0 to {vocab_size - 1}"
        )
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to config.json. `null` counts as absent, as it does in transformers."""

    values: dict[str, Any]
    path: Path

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise self.invalid(key, f"a whole number from 1 to {_MAX_SIZE}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not _is_number(value) or not 0 < value <= _MAX_FLOAT32:
            raise self.invalid(key, "a positive, finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return value

    def invalid(self, key: str, expected: str) -> InvalidCheckpoint:
        value = self.values.get(key)
        return InvalidCheckpoint(
            f"{self.path}: {key} is {reprlib.repr(value)}; expected {expected}"
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise InvalidCheckpoint(f"{self.path}: has no {key}")
        return value


def _architecture(fields: _Fields) -> str:
    known = ", ".join(_FAMILIES)
    match fields.values.get("architectures"):
        case [str(architecture), *_]:
            pass
        case _:
            raise fields.invalid("architectures", f"a list with one of {known}")
    if architecture not in _FAMILIES:
        raise UnsupportedModel(
            f"{fields.path}: architecture {reprlib.repr(architecture)} is unknown; this engine "
            f"runs {known}"
        )
    return architecture


def _heads(fields: _Fields, hidden_size: int) -> tuple[int, int, int]:
    """(n_heads, n_kv_heads, head_dim)"""
    n_heads = fields.size("num_attention_heads")
    n_kv_heads = fields.size("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of num_attention_heads, {n_heads}")
    if fields.values.get("head_dim") is None and hidden_size % n_heads:
        raise fields.invalid("num_attention_heads", f"a divisor of hidden_size, {hidden_size}")
    head_dim = fields.size("head_dim", hidden_size // n_heads)
    if head_dim % 2:
        raise UnsupportedModel(
            f"{fields.path}: heads have {head_dim} dimensions; expected an even number, as rotary "
            "positions turn them in pairs"
        )
    if n_heads * head_dim > _MAX_SIZE:
        raise fields.invalid("num_attention_heads", f"at most {_MAX_SIZE} dimensions in all")
    if n_heads * head_dim % _BLOCK:
        raise UnsupportedModel(
            f"{fields.path}: {n_heads} heads of {head_dim} dimensions make {n_heads * head_dim}; "
            f"expected a multiple of {_BLOCK}"
        )
    return n_heads, n_kv_heads, head_dim


def _activation(fields: _Fields) -> Activation:
    name = fields.values.get("hidden_act")
    for activation in _ACTIVATIONS:
        if name == activation:
            return activation
    raise UnsupportedModel(
        f"{fields.path}: hidden_act {reprlib.repr(name)} is unknown; this engine runs "
        f"{', '.join(_ACTIVATIONS)}"
    )


def _threshold(fields: _Fields) -> float:
    value = fields.values.get("hidden_act_param")
    if not _is_number(value) or not 0 <= value <= _MAX_FLOAT32:
        raise fields.invalid("hidden_act_param", "fatrelu's threshold, a number of at least 0")
    return float(value)


def _rope_theta(fields: _Fields) -> float:
    # transformers 5 writes theta and scaling as one object; before, they were two keys.
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.invalid(key, "an object or null")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in (None, "default") or rope.get("partial_rotary_factor", 1) not in (None, 1):
            raise UnsupportedModel(
                f"{fields.path}: {key} is {reprlib.repr(rope)}; this engine runs plain rotary "
                "positions only, of type default"
            )
    if rope is not None:
        return _Fields(rope, fields.path).number("rope_theta")
    return fields.number("rope_theta", 10000.0)


def _bos_id(fields: _Fields, vocab_size: int) -> int | None:
    # All families' classes say 1 and, for eos_token_id, 2 where config.json lacks the key.
    ids = parse_token_ids(
        fields.values.get("bos_token_id", 1), "bos_token_id", vocab_size, fields.path
    )
    return ids[0] if ids else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)
