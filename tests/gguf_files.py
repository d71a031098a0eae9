"""GGUF files for tests, written by the `gguf` package from folders in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid.kernels import reference

# The `gguf` package's names, which it has from llama.cpp; written here from its constants.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight"
    return f"{NAMES['.'.join(parts)]}.weight"


def permuted(w: np.ndarray, n_heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter: halves of a head become neighbours."""
    half = w.shape[0] // n_heads // 2
    return np.ascontiguousarray(
        w.reshape(n_heads, 2, half, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    )


def fp32(w: np.ndarray) -> np.ndarray:
    return reference.bf16_values(w) if w.dtype == np.uint16 else w.astype(np.float32)


def write_gguf(
    path: Path,
    model: Path,
    kind: str = "F32",
    *,
    vocabulary: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    split: tuple[int, int] | None = None,
    predictor_ranks: tuple[int, ...] | None = None,
    **changes: Any,
) -> Path:
    """Write a folder's model as a GGUF file.

    `kind` is the type of the matrices, whose values are random if it is Q6_K or the like.
    `vocabulary` are the keys of a tokenizer, `metadata` further keys; a value of None removes one.
    `split` writes only every n-th tensor, as part i of n. `predictor_ranks`, one a layer, make it
    PowerInfer's: another magic, transposed down matrices, and predictors of these ranks.
    """
    gguf = pytest.importorskip("gguf", reason="gguf")
    config = json.loads((model / "config.json").read_text()) | changes
    is_minicpm = config["architectures"] == ["MiniCPMForCausalLM"]
    architecture = "minicpm" if is_minicpm else "llama"
    n_heads, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    keys: dict[str, Any] = {
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": n_heads,
        f"{architecture}.attention.head_count_kv": n_kv,
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }
    if config.get("head_dim"):
        keys[f"{architecture}.attention.key_length"] = config["head_dim"]
        keys[f"{architecture}.attention.value_length"] = config["head_dim"]
    if is_minicpm:
        keys |= {
            "minicpm.embedding_scale": float(config["scale_emb"]),
            "minicpm.residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
            "minicpm.logit_scale": config["hidden_size"] / config["dim_model_base"],
        }
    keys |= vocabulary or {}
    keys |= metadata or {}
    writer = gguf.GGUFWriter(path, architecture)
    if split is not None:
        keys |= {"split.no": split[0], "split.count": split[1]}
    for key, value in keys.items():
        if value is not None:
            add_key(writer, key, value)
    for at, (name, w) in enumerate(sorted(load_file(model / "model.safetensors").items())):
        if split is not None and at % split[1] != split[0]:
            continue
        w = fp32(w)
        if name.endswith("q_proj.weight"):
            w = permuted(w, n_heads)
        if name.endswith("k_proj.weight"):
            w = permuted(w, n_kv)
        stored = gguf_name(name)
        if predictor_ranks is not None and stored.endswith("ffn_down.weight"):
            w, stored = np.ascontiguousarray(w.T), stored.replace("ffn_down", "ffn_down_t")
        chosen = gguf.GGMLQuantizationType[kind if w.ndim > 1 else "F32"]
        data = w if chosen.name == "F32" else blocks_of(w, chosen)
        writer.add_tensor(stored, data, raw_dtype=chosen)
    for layer, rank in enumerate(predictor_ranks or ()):
        draw = np.random.default_rng(layer)
        sizes = (rank, config["hidden_size"]), (config["intermediate_size"], rank)
        for name, shape in zip(("fc1", "fc2"), sizes, strict=True):
            matrix = draw.standard_normal(shape).astype(np.float16)
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if predictor_ranks is not None:
        with path.open("r+b") as file:
            file.write(b"PWRI")
    return path


def blocks_of(w: np.ndarray, kind: Any) -> np.ndarray:
    """Return the blocks of a matrix, or random ones where the package can only read the type."""
    gguf = pytest.importorskip("gguf", reason="gguf")
    try:
        blocks: np.ndarray = gguf.quants.quantize(w, kind)
        return blocks
    except NotImplementedError:
        n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*w.shape[:-1], w.shape[-1] // n_values * n_bytes)
        return np.random.default_rng(0).integers(0, 64, shape, np.uint8)  # no scale is infinite


def add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def vocabulary_of(layout: dict[str, Any], pre: str | None = None) -> dict[str, Any]:
    """Return the keys of a tokenizer.json: SentencePiece's BPE, or byte-level with a `pre`."""
    model = layout["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {token["content"]: token["special"] for token in layout["added_tokens"]}
    for token in layout["added_tokens"]:
        if token["id"] >= len(pieces):
            pieces.append(token["content"])
    kinds = []
    for piece in pieces:
        kind = 1
        if piece in special:
            kind = 3 if special[piece] else 4
        elif pre is None and len(piece) == 6 and piece.startswith("<0x"):
            kind = 6
        kinds.append(2 if piece == "<unk>" else kind)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pre is None else "gpt2",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
    }
    if pre is None:
        # SentencePiece merges by score: the order of the pieces is that of the merges.
        keys["tokenizer.ggml.scores"] = [-float(id) for id in range(len(pieces))]
        keys |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    else:
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
        keys |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    return keys
