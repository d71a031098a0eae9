"""Inputs from public bug reports of other engines (docs/experiments/foreign-inputs.md)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from tiny_models import added_token, change_json, write_model

import hybrid
from hybrid import InvalidCheckpoint, UnsupportedModel
from hybrid.checkpoint import open_checkpoint

LLAMA = tiny_models.LLAMA | {"vocab_size": 4096}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", **LLAMA)


def split(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Replace the weights by two shards and an index. Returns what each shard holds."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = tuple({name: tensors[name] for name in part} for part in (names[:10], names[10:]))
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / shard)
    weight_map = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parts[0], parts[1]


def continued(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return six greedy tokens as text, and the load's notices."""
    with hybrid.load(folder, threads=1, context_size=64) as engine:
        return "".join(engine.generate("Once upon", max_tokens=6, temperature=0)), engine.notices


def test_an_index_may_not_name_a_shard_that_is_missing(folder):
    split(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"not in its folder: '{SHARDS[1]}'"):
        open_checkpoint(folder)


def test_a_tensor_is_read_from_the_shard_that_the_index_assigns(folder):
    expected, _ = continued(folder)
    first, second = split(folder)
    stale = {name: np.zeros_like(w) for name, w in second.items()}
    save_file(stale | first, folder / SHARDS[0])
    assert continued(folder)[0] == expected


def test_a_single_file_beside_shards_is_read_and_said(folder):
    expected, _ = continued(folder)
    first, second = split(folder)
    save_file({name: w * np.float32(0.5) for name, w in second.items()}, folder / SHARDS[1])
    save_file(first | second, folder / "model.safetensors")
    text, notices = continued(folder)
    assert text == expected
    assert any("model.safetensors.index.json; the former is read" in line for line in notices)


def test_a_missing_head_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"lm_head\.weight.*tie_word_embeddings is false"):
        open_checkpoint(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    with open_checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("head"), checkpoint.read("embedding"))


@pytest.mark.parametrize(
    "scaling",
    [
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        {"type": "linear", "factor": 4.0},
        {"type": "dynamic", "factor": 2.0},
    ],
    ids=["llama3", "linear", "dynamic"],
)
def test_scaled_positions_are_refused(folder, scaling):
    change_json(folder / "config.json", rope_scaling=scaling)
    with pytest.raises(UnsupportedModel, match="plain rotary positions only"):
        open_checkpoint(folder)


@pytest.mark.parametrize("theta", [0.0, -1.0, "10000", True])
def test_a_theta_that_is_no_positive_number_is_refused(folder, theta):
    change_json(folder / "config.json", rope_theta=theta)
    with pytest.raises(InvalidCheckpoint, match="rope_theta"):
        open_checkpoint(folder)


def add_token(folder: Path, *tokens: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    layout = json.loads(path.read_text(encoding="utf-8"))
    layout["added_tokens"] += tokens
    path.write_text(json.dumps(layout), encoding="utf-8")


def test_a_pad_token_beyond_the_vocabulary_is_said(folder):
    expected, _ = continued(folder)
    add_token(folder, added_token("<pad>", id=4096, special=True))
    text, notices = continued(folder)
    assert text == expected
    assert any("no embedding of '<pad>'" in line for line in notices)


def test_a_text_token_beyond_the_vocabulary_is_refused(folder):
    add_token(folder, added_token("<PRE>", id=4096))
    with pytest.raises(InvalidCheckpoint, match="'<PRE>' has id 4096"):
        hybrid.load(folder)


def test_a_model_may_have_more_rows_than_its_tokenizer(tmp_path):
    text, notices = continued(write_model(tmp_path, **LLAMA | {"vocab_size": 4160}))
    assert text
    assert not any("vocab" in line for line in notices)


def test_a_head_may_be_wider_than_its_share_of_hidden(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    wide = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = write_model(tmp_path, **LLAMA | wide | {"rms_norm_eps": 1e-5})
    (folder / "tokenizer.json").unlink()
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 4096, 40)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)[None]).logits[0].numpy()
    from hybrid.engine.oracle.executor import ReferenceSession, read_weights

    with open_checkpoint(folder) as checkpoint:
        session = ReferenceSession(read_weights(checkpoint, None), checkpoint.config)
    np.testing.assert_allclose(session.prefill(ids.tolist()), expected, atol=2e-4)


def test_a_byte_order_mark_before_a_config_is_left_out(folder):
    expected, _ = continued(folder)
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert continued(folder)[0] == expected


def test_8_bit_floats_are_refused_by_name(folder):
    path, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header[name] |= {"dtype": "F8_E4M3", "shape": [200, 4 * 96]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])
    with pytest.raises(UnsupportedModel, match=f"'{name}' is F8_E4M3"):
        open_checkpoint(folder)


def test_an_adapter_beside_the_weights_is_said(folder):
    expected, _ = continued(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A.weight": np.ones((2, 2), np.float32)}, folder / "adapter_model.safetensors")
    text, notices = continued(folder)
    assert text == expected
    assert "the folder also holds a LoRA adapter, which is not applied" in notices


def test_names_of_a_compiled_model_are_read(folder):
    expected, _ = continued(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{k}": w for k, w in tensors.items()}, folder / "model.safetensors")
    text, notices = continued(folder)
    assert text == expected
    assert any("'_orig_mod.lm_head.weight' for 'lm_head.weight'" in line for line in notices)


def test_norms_of_queries_and_keys_are_named_if_they_are_not_used(folder):
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for norm in ("q_norm", "k_norm"):
            name = f"model.layers.{layer}.self_attn.{norm}.weight"
            tensors[name] = np.full(16, 2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    _, notices = continued(folder)
    assert any("not used: 'model.layers.0.self_attn.k_norm.weight'" in line for line in notices)


def test_the_generation_config_alone_says_what_ends_an_answer(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 4095]}')
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.eos_ids == (7, 4095)  # and not 2, as transformers
