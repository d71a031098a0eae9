"""Write small random models as Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import hybrid
from hybrid.kernels import reference

STORIES = Path(hybrid.__file__).parent / "models" / "stories"

TINY: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
    "rms_norm_eps": 1e-5,
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.1,
    "scale_emb": 3.0,
    "scale_depth": 1.4,
    "dim_model_base": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Changes to TINY: a Llama, whose head is a tensor of its own.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_act_param": None,
    "scale_emb": None,
    "scale_depth": None,
    "dim_model_base": None,
    "tie_word_embeddings": False,
}

# Changes to TINY: hidden sizes and head counts that do not fill blocks of 32, nor groups of 256.
ODD_SHAPES: dict[str, dict[str, Any]] = {
    "hidden 8": {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1},
    "hidden 36": {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 6,
    },
    "hidden 100": {"hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1},
    "hidden 288": {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3},
}


def scale_weights(folder: Path, factors: dict[str, float]) -> Path:
    """Multiply the tensors whose names contain a key by its value, in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for part, factor in factors.items():
        names = [name for name in tensors if part in name]
        assert names, part
        for name in names:
            tensors[name] = tensors[name].astype(np.float32) * np.float32(factor)
    save_file(tensors, path)
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Replace fields of a JSON file, such as config.json, or add them."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(fields | changes), encoding="utf-8")


def added_token(content: str, **fields: Any) -> dict[str, Any]:
    """Return what tokenizer.json and tokenizer_config.json say about a token beside the pieces."""
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content} | flags | fields


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, scaled so that activations stay near one. Every value is exact in bf16."""
    rng = np.random.default_rng(seed)
    hidden, n_neurons = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(n_rows: int, n_cols: int, std: float | None = None) -> np.ndarray:
        w = rng.standard_normal((n_rows, n_cols), np.float32) * np.float32(std or n_cols**-0.5)
        return reference.bf16_values(reference.bf16_bits(w))

    def norm() -> np.ndarray:
        return reference.bf16_values(
            reference.bf16_bits(rng.uniform(0.5, 1.5, hidden).astype(np.float32))
        )

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 0.5)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(q, hidden),
            at + "self_attn.k_proj.weight": matrix(kv, hidden),
            at + "self_attn.v_proj.weight": matrix(kv, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, q),
            at + "post_attention_layernorm.weight": norm(),
            at + "mlp.gate_proj.weight": matrix(n_neurons, hidden),
            at + "mlp.up_proj.weight": matrix(n_neurons, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, n_neurons),
        }
    tensors["model.norm.weight"] = norm()
    is_llama = config["architectures"] != ["MiniCPMForCausalLM"]
    if not config.get("tie_word_embeddings", not is_llama):
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def add_marker_pieces(layout: dict[str, Any]) -> None:
    """Give the bundled tokenizer the pieces that MiniCPM's chat markers need."""
    # As in MiniCPM, pieces may cross any boundary. But digits are split before merging, so that the
    # piece "12" is never used.
    layout["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    vocab, merges = layout["model"]["vocab"], layout["model"]["merges"]
    for piece in ("<", ">", "▁<", "用", "户", "用户", "AI", ")<", "12"):
        vocab.setdefault(piece, len(vocab))
    merges += [["▁", "<"], ["用", "户"], ["A", "I"], [")", "<"], ["1", "2"]]


def write_chat_model(folder: Path, **changes: Any) -> Path:
    """Write a random model with MiniCPM's chat template. Its answers are noise."""
    write_model(folder, vocab_size=4200, **changes)
    layout = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    add_marker_pieces(layout)
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    return folder


# A template of the shape that most models ship, with the tokens that it needs.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_chatml_model(folder: Path, template: str = CHATML, **changes: Any) -> Path:
    """Write a random model with ChatML's two special tokens, 4096 and 4097, and a template."""
    write_model(folder, vocab_size=4200, **changes)
    layout = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    for id, content in enumerate(("<|im_start|>", "<|im_end|>"), 4096):
        layout["added_tokens"].append(added_token(content, id=id, special=True))
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a folder with TINY's config and `changes`, random weights and the bundled tokenizer.

    A change to None removes the key. If the vocabulary is smaller than the tokenizer's, the folder
    gets no tokenizer.
    """
    config = {key: value for key, value in (TINY | changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed), folder / "model.safetensors")
    if config["vocab_size"] >= 4096:
        shutil.copy(STORIES / "tokenizer.json", folder)
    return folder


def write_endless_model(folder: Path) -> Path:
    """Write a random model that never ends its answer."""
    return write_model(folder, vocab_size=4096, eos_token_id=[])


def write_overflowing_model(folder: Path) -> Path:
    """Write a random model in which the embedding of token 9 makes values overflow fp16."""
    path = write_model(folder, vocab_size=4096) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"][0] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = 1e5
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][9, 0] = 1
    save_file(tensors, path)
    return folder
