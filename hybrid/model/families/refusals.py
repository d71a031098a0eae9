"""What a config says that this engine would compute wrongly: refused by name.

transformers ignores keys that its class does not know, so a config may carry a key that changes the
mathematics only in the code that its authors ran. Nothing here can tell whether they did. A refusal
costs a user one line; a wrong guess costs the right text.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.errors import UnsupportedModel
from hybrid.model.families.fields import Fields
from hybrid.notices import short_list

_ADVICE = "get the model as its authors trained it, and quantise it with --quant"
_FEATURES = {  # keys that change the mathematics if they are set
    "add_cross_attention": "attention to an encoder",
    "alibi": "linear biases in place of rotary positions",
    "attention_bias": "biases in attention",
    "attention_chunk_size": "attention in chunks",
    "attention_in_bias": "biases in attention",
    "attention_out_bias": "biases in attention",
    "attn_logit_softcapping": "limits on the scores of attention",
    "bias": "biases",
    "clip_qkv": "limits on queries, keys and values",
    "final_logit_softcapping": "limits on logits",
    "kv_lora_rank": "latent attention",
    "mlp_bias": "biases in the FFN",
    "no_rope_layer_interval": "layers without positions",
    "no_rope_layers": "layers without positions",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "parallel_attn": "attention and FFN side by side",
    "qk_layernorm": "norms of queries and keys",
    "qk_norm": "norms of queries and keys",
    "qkv_bias": "biases in attention",
    "rope_interleave": "rotary positions of neighbouring dimensions",
    "rope_interleaved": "rotary positions of neighbouring dimensions",
    "sliding_windows": "sliding-window attention",
    "sparse_config": "sparse attention",
    "use_bias": "biases",
    "use_parallel_residual": "attention and FFN side by side",
    "use_qk_norm": "norms of queries and keys",
    "use_sliding_window": "sliding-window attention",
}
# Keys that change nothing if they are 1. MiniCPM's scales are not among them: a Llama into which
# they were folded still lists them.
_FACTORS = {
    "attention_multiplier": "a scale of attention",
    "attn_scale": "a scale of attention",
    "embedding_multiplier": "a scale of the embedding",
    "logit_scale": "a scale of the logits",
    "logits_scaling": "a scale of the logits",
    "partial_rotary_factor": "positions in a part of each head",
    "residual_multiplier": "a scale of the residual branches",
    "rotary_pct": "positions in a part of each head",
}


def refuse_other_mathematics(fields: Fields) -> None:
    """Raise UnsupportedModel if a key says that the model is not a plain Llama inside."""
    values = fields.values
    _refuse_quantised(fields)
    for key, feature in _FEATURES.items():
        if values.get(key):
            raise _unsupported(fields, key, feature)
    for key, feature in _FACTORS.items():
        if values.get(key) not in (None, 1):
            raise _unsupported(fields, key, feature)
    # Qwen's configs give a window and say that it is not used.
    if values.get("sliding_window") and values.get("use_sliding_window") is not False:
        raise _unsupported(fields, "sliding_window", "sliding-window attention")
    layer_types = values.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            raise fields.invalid("layer_types", "a list of the layers' types")
        others = {reprlib.repr(kind) for kind in layer_types if kind != "full_attention"}
        if others:
            raise UnsupportedModel(
                f"{fields.path}: layer_types has {', '.join(sorted(others)[:4])}; this engine runs "
                "full_attention only"
            )
    if values.get("is_causal") is False:
        raise UnsupportedModel(
            f"{fields.path}: is_causal is false: tokens see later ones, so the model writes no text"
        )


def check_model_type(fields: Fields, known: str) -> None:
    """Raise UnsupportedModel if `model_type` is another one: transformers goes by it."""
    model_type = fields.values.get("model_type")
    if model_type not in (None, known):
        raise UnsupportedModel(
            f"{fields.path}: architectures says {fields.values['architectures'][0]}, but "
            f"model_type is {reprlib.repr(model_type)}, not {known!r}: a model of another kind"
        )


def has_own_code(values: Mapping[str, Any]) -> bool:
    """Return whether a config names a class in a Python file of its own folder."""
    auto_map = values.get("auto_map")
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    return any(isinstance(name, str) and "." in name for name in classes)


def refuse_unused(values: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Raise UnsupportedModel if tensors that the family lacks are surely used by the model.

    They are if it is a Llama with code of its own, or a SparseLlama: several authors gave that name
    to different models. NOSA's attention is such a case.
    """
    architecture = (values.get("architectures") or [values.get("model_type")])[0]
    is_llama_with_code = architecture == "LlamaForCausalLM" and has_own_code(values)
    is_sparse_llama = architecture in ("SparseLlamaForCausalLM", "sparsellama")
    if names and (is_llama_with_code or is_sparse_llama):
        raise UnsupportedModel(
            f"{path}: has tensors that a Llama lacks: {short_list(names)}; the {architecture} of "
            "its own code computes with them, and this engine does not run that code"
        )


def _refuse_quantised(fields: Fields) -> None:
    """Raise UnsupportedModel for weights that another tool quantised or compressed."""
    config = fields.values.get("quantization_config")
    if config:
        method = None
        if isinstance(config, dict):
            method = config.get("quant_method")
            is_bitsandbytes = any(key.startswith(("bnb_", "load_in_")) for key in config)
            method = "bitsandbytes" if method is None and is_bitsandbytes else method
        by = "another tool" if method is None else reprlib.repr(method)
        raise UnsupportedModel(
            f"{fields.path}: quantization_config is set: the weights are quantised by {by}, which "
            f"this engine does not run; {_ADVICE}"
        )
    mlx = fields.values.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise UnsupportedModel(
            f"{fields.path}: quantization is set: the weights are quantised by MLX, which this "
            f"engine does not run; {_ADVICE}"
        )
    sparsity = fields.values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedModel(
            f"{fields.path}: sparsity_config has format {reprlib.repr(sparsity['format'])}: the "
            "weights are compressed; decompress them with the package compressed-tensors"
        )


def _unsupported(fields: Fields, key: str, feature: str) -> UnsupportedModel:
    value = reprlib.repr(fields.values[key])
    return UnsupportedModel(
        f"{fields.path}: {key} is set ({value}), but this engine does not run {feature}"
    )
