"""What a GGUF file's metadata and tensors' names mean, in the terms of Hugging Face's files.

Keys and names are those of llama.cpp (github.com/ggml-org/llama.cpp: gguf-py/gguf/constants.py).
The config that comes out is checked as a config.json is.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint.gguf.activation import DRELU
from hybrid.checkpoint.gguf.reader import GgufFile
from hybrid.errors import InvalidCheckpoint, UnsupportedModel

# Architectures of GGUF that the engine runs, as the classes of transformers.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "prosparse-llama": "LlamaForCausalLM",  # Kairox's name of Llama with FATReLU
}
# FFNs of other architectures, which the engine lacks.
_MISSING_FFNS = {
    "bamboo": DRELU,
    "sparse-qwen2": DRELU,  # this and the next are names of Kairox
    "relu-falcon": "an FFN without a gate (ReLU)",
    "arcee": "an FFN without a gate (ReLU²)",
    "nemotron": "an FFN without a gate (ReLU²)",
    "opt": "an FFN without a gate (ReLU)",
    "falcon": "an FFN without a gate (GELU, or ReLU)",
    "smallthinker": "experts with ReLU",
}
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
DOWN = "ffn_down"
TRANSPOSED = "ffn_down_t"  # of PowerInfer's files: a row is what a neuron adds to the output
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    DOWN: "mlp.down_proj",
    TRANSPOSED: "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d{1,5})\.(\w+)\.weight")
# What MiniCPM's files before these keys were computed with (llama.cpp, src/models/minicpm.cpp).
_OLD_MINICPM = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256.0}


def tensor_name(name: str) -> str | None:
    """Return Hugging Face's name of a tensor, or None if the architectures have none such."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.weight"


def gguf_name(name: str, down: str) -> str:
    """Return GGUF's name of a tensor of Hugging Face. `down` is DOWN or TRANSPOSED."""
    for stored, known in _MODEL_NAMES.items():
        if name == known:
            return stored
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    names = {known: stored for stored, known in _LAYER_NAMES.items()} | {"mlp.down_proj": down}
    return f"blk.{layer}.{names[part]}.weight"


def stored_rows(name: str, n_rows: int, config: dict[str, Any]) -> NDArray[np.intp] | None:
    """Return which stored row each row of a tensor is; None: they are in order.

    In these architectures rotary positions join neighbours (2 i, 2 i + 1) of a head. Hugging Face's
    files, and our kernels, join i and i + half the head. So the converter permutes q and k.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    is_query = name.endswith("q_proj.weight")
    n_heads = config["num_attention_heads" if is_query else "num_key_value_heads"]
    if n_rows % (2 * n_heads):
        return None  # the shape is wrong, which is reported where shapes are compared
    stored = np.arange(n_rows).reshape(n_heads, n_rows // n_heads // 2, 2)
    return stored.swapaxes(1, 2).reshape(n_rows)


def architecture_of(file: GgufFile) -> str:
    """Return a file's architecture. Raises UnsupportedModel unless the engine runs it."""
    name = file.single("general.architecture")
    if name in ARCHITECTURES:
        return str(name)
    lacks = f" yet: {_MISSING_FFNS[name]}" if name in _MISSING_FFNS else ""
    raise UnsupportedModel(
        f"{file.path}: architecture {name!r:.60}: not supported{lacks}; of GGUF hybrid runs "
        f"{', '.join(ARCHITECTURES)}"
    )


def config_of(file: GgufFile, activation: str, threshold: float) -> dict[str, Any]:
    """Return the content of a config.json. Raises InvalidCheckpoint and UnsupportedModel."""
    name = architecture_of(file)
    keys = _Keys(file)
    keys.prefix = f"{name}."
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidCheckpoint(f"{file.path}: has no tensor token_embd.weight with two dimensions")
    hidden, n_heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", hidden // n_heads)
    _refuse_other_mathematics(keys, head_dim)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[name]],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": activation,
        "bos_token_id": keys.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": _ends(file, embedding.shape[0]),
    }
    if activation == "fatrelu":
        config["hidden_act_param"] = threshold
    if name == "minicpm":
        config |= _minicpm_scales(keys, hidden, config["num_hidden_layers"])
    return config


def _minicpm_scales(keys: _Keys, hidden: int, n_layers: int) -> dict[str, float]:
    scales = dict(_OLD_MINICPM)
    if (scale := keys.number("embedding_scale", None)) is not None:
        scales["scale_emb"] = scale
    if (scale := keys.number("residual_scale", None)) is not None:
        scales["scale_depth"] = scale * math.sqrt(n_layers)
    if (scale := keys.number("logit_scale", None)) is not None:
        if scale == 0:
            raise InvalidCheckpoint(f"{keys.file.path}: minicpm.logit_scale is 0")
        scales["dim_model_base"] = hidden / scale
    return scales


def _ends(file: GgufFile, n_ids: int) -> list[int]:
    """Return the tokens that end an answer."""
    found = [special_token(file, name, n_ids) for name in ("eos", "eot", "eom")]
    return [token for token in found if token is not None]


def special_token(file: GgufFile, name: str, n_ids: int) -> int | None:
    """Return the id of a special token. Raises InvalidCheckpoint if there is no such id."""
    id = file.single(f"tokenizer.ggml.{name}_token_id")
    if id is None or id == 0xFFFFFFFF:
        return None
    if type(id) is not int or not 0 <= id < n_ids:
        raise InvalidCheckpoint(
            f"{file.path}: tokenizer.ggml.{name}_token_id is {id!r:.40}; expected 0 to {n_ids - 1}"
        )
    return id


def _refuse_other_mathematics(keys: _Keys, head_dim: int) -> None:
    """Refuse what these architectures may have and the engine does not compute."""
    problems = []
    if keys.size("rope.dimension_count", head_dim) != head_dim:
        problems.append("rotary positions for a part of each head")
    kind = keys.get(keys.prefix + "rope.scaling.type", "none")
    if kind != "none" or "rope_freqs.weight" in keys.file.tensors:
        problems.append(f"scaled rotary positions ({kind})")
    if keys.size("attention.value_length", head_dim) != head_dim:
        problems.append("heads whose keys and values differ in size")
    if keys.get(keys.prefix + "expert_count", 0):
        problems.append("experts")
    if keys.get(keys.prefix + "attention.sliding_window", 0):
        problems.append("sliding windows")
    if problems:
        raise UnsupportedModel(f"{keys.file.path}: not supported: {', '.join(problems)}")


class _Keys:
    """Typed reading of a file's metadata."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.prefix = file, ""

    def get(self, key: str, default: Any) -> Any:
        return self.file.single(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(self.prefix + key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one for each layer, all the same
        if isinstance(value, (list, np.ndarray)):
            raise UnsupportedModel(
                f"{self.file.path}: not supported: {self.prefix}{key} differs between layers"
            )
        if type(value) is not int or value < 1:
            raise self._invalid(key, "an integer, 1 or more", value)
        return value

    def number(self, key: str, default: float | None = math.nan) -> Any:
        value = self.get(self.prefix + key, default)
        if value is None and default is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._invalid(key, "a finite number", value)
        # The file holds a float32. Its shortest spelling is what the model's authors wrote: 1e-05.
        with np.errstate(over="ignore"):
            number = float(str(np.float32(value)))
        if not math.isfinite(number):
            raise self._invalid(key, "a finite number", value)
        return number

    def _invalid(self, key: str, expected: str, found: object) -> InvalidCheckpoint:
        shown = "nothing" if found is None or found != found else f"{found!r:.60}"
        return InvalidCheckpoint(
            f"{self.file.path}: {self.prefix}{key}: expected {expected}, found {shown}"
        )
