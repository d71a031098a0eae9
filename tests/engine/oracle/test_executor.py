"""The reference forward pass in fp32 matches Hugging Face transformers on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from folded_llama import FatRelu, fold_scales
from safetensors.numpy import load_file, save_file
from tiny_models import ODD_SHAPES, write_model

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.evaluation.fp32 import Fp32Engine

torch = pytest.importorskip("torch", reason="the oracle of the oracle needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

LOGIT_BOUND = 1e-4
IDS = np.random.default_rng(0).integers(0, 320, 70)


def llama_logits(folder: Path, tensors: dict[str, np.ndarray], activation: str) -> np.ndarray:
    """Return the logits of transformers' Llama with a folder's sizes and the given weights."""
    config = json.loads((folder / "config.json").read_text())
    is_tied = "lm_head.weight" not in tensors
    changes = {"hidden_act": activation, "tie_word_embeddings": is_tied}
    llama = transformers.LlamaConfig(**(config | changes), attn_implementation="eager")
    model = transformers.LlamaForCausalLM(llama).eval()
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    if is_tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def reference_logits(folder: Path) -> np.ndarray:
    with open_checkpoint(folder) as checkpoint:
        session = ReferenceSession(read_weights(checkpoint, None), checkpoint.config)
        first = session.prefill(IDS[:41])
        return np.concatenate([first, session.prefill(IDS[41:])])  # uses the KV cache


LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act_param": None}


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("n_kv_heads", [2, 6])
def test_llama_matches_transformers(tmp_path, activation, is_tied, n_kv_heads):
    folder = write_model(
        tmp_path,
        **LLAMA,
        hidden_act=activation,
        tie_word_embeddings=is_tied,
        num_key_value_heads=n_kv_heads,
    )
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not is_tied
    expected = llama_logits(folder, tensors, activation)
    assert np.abs(reference_logits(folder) - expected).max() <= LOGIT_BOUND


def test_another_head_dim_and_theta_match_transformers(tmp_path):
    folder = write_model(tmp_path, **LLAMA, hidden_act="relu", head_dim=48, rope_theta=500.0)
    expected = llama_logits(folder, load_file(folder / "model.safetensors"), "relu")
    assert np.abs(reference_logits(folder) - expected).max() <= LOGIT_BOUND


@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_any_hidden_size_matches_transformers(tmp_path, shape):
    """The oracle in fp32, the oracle as an engine, and the native engine in every format."""
    changes = {**LLAMA, **shape, "tie_word_embeddings": False, "vocab_size": 4096}
    folder = write_model(tmp_path, **changes, hidden_act="relu")
    expected = llama_logits(folder, load_file(folder / "model.safetensors"), "relu")
    assert np.abs(reference_logits(folder) - expected).max() <= LOGIT_BOUND
    with Fp32Engine(folder).open_session() as session:
        assert np.abs(session.prefill(IDS) - expected).max() <= LOGIT_BOUND
    for quant, bound in (
        ("bf16", 0.02),
        ("f16", 0.002),
        ("q8", 0.05),
        ("q4", 0.5),
    ):  # of the logits' deviation
        with hybrid.load(folder, quant=quant) as engine:
            actual = engine.open_session().prefill(IDS, all_logits=True)
        rms = np.sqrt(np.mean(np.square(actual - expected)))
        assert rms <= bound * expected.std(), quant


def test_a_checkpoint_of_hidden_size_8_by_others_matches_transformers(tmp_path, shared_data):
    """Its weights are random, but neither they nor its file were made here."""
    gguf = pytest.importorskip("gguf", reason="reading the checkpoint needs gguf")
    path = shared_data / "models" / "llama-2-tiny-random" / "llama-2-tiny-random.gguf"
    if not path.is_file():
        pytest.skip(f"no file {path}")
    stored = {t.name: np.asarray(t.data, np.float32) for t in gguf.GGUFReader(path).tensors}
    shape = {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    config = {**LLAMA, **shape, "vocab_size": 32_000, "num_hidden_layers": 1, "hidden_act": "silu"}
    write_model(tmp_path, **config, num_key_value_heads=2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    tensors = {}
    for name, made in load_file(tmp_path / "model.safetensors").items():
        stem = names.get_name(name.removesuffix(".weight"))
        w = stored[f"{stem}.weight"].reshape(made.shape)
        if stem.endswith(("attn_q", "attn_k")):  # GGUF stores rotary pairs as neighbours
            w = w.reshape(2, 2, 2, 8).swapaxes(1, 2).reshape(8, 8)
        tensors[name] = np.ascontiguousarray(w)
    save_file(tensors, tmp_path / "model.safetensors")
    expected = llama_logits(tmp_path, tensors, "silu")
    assert np.abs(reference_logits(tmp_path) - expected).max() <= 1e-5 * expected.std()
    with hybrid.load(tmp_path, quant="bf16") as engine:
        actual = engine.open_session().prefill(IDS, all_logits=True)
    assert np.sqrt(np.mean(np.square(actual - expected))) <= 0.01 * expected.std()


@pytest.mark.parametrize("has_own_head", [True, False])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_folders_are_read_as_transformers_reads_them(tmp_path, has_own_head, prefix):
    """Theta within rope_scaling, a stored head of a tied model, names of a base model."""
    folder = write_model(
        tmp_path,
        **LLAMA,
        model_type="llama",
        hidden_act="relu",
        tie_word_embeddings=True,
        rms_norm_eps=None,
        rope_theta=10.0,
        rope_scaling={"rope_type": "default", "rope_theta": 500.0},
    )
    path = folder / "model.safetensors"
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in load_file(path).items()
    }
    if has_own_head:
        tensors["lm_head.weight"] = -tensors[f"{prefix}embed_tokens.weight"]
    save_file(tensors, path, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert model.config.rms_norm_eps == 1e-6
    with torch.no_grad():
        expected = model.float()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert np.abs(reference_logits(folder) - expected).max() <= LOGIT_BOUND


def test_sparse_llama_with_fatrelu_matches_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(
        transformers.activations.ACT2FN, "fatrelu_test", (FatRelu, {"threshold": 0.25})
    )
    folder = write_model(
        tmp_path,
        architectures=["SparseLlamaForCausalLM"],
        hidden_act="fatrelu",
        hidden_act_param=0.25,
    )
    expected = llama_logits(folder, load_file(folder / "model.safetensors"), "fatrelu_test")
    assert np.abs(reference_logits(folder) - expected).max() <= LOGIT_BOUND


@pytest.mark.parametrize("is_tied", [True, False])
def test_minicpm_matches_a_llama_with_its_scales_folded_in(tmp_path, monkeypatch, is_tied):
    """Embedding, residual and logit scales are folded into the weights of a Llama."""
    monkeypatch.setitem(
        transformers.activations.ACT2FN, "fatrelu_test", (FatRelu, {"threshold": 0.1})
    )
    folder = write_model(tmp_path, tie_word_embeddings=is_tied)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    folded = fold_scales(config, tensors)
    expected = llama_logits(folder, folded, "fatrelu_test")
    assert np.abs(reference_logits(folder) - expected).max() <= LOGIT_BOUND
