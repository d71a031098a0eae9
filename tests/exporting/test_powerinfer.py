"""PowerInfer's file: what its predictors name, before any norm, is what ours name after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from exporting_models import (
    export,
    fp32_logits,
    greedy,
    read_with_gguf_package,
    values_of,
)
from predictor_files import write_predictor
from safetensors.numpy import load_file
from slow import slow_except
from tiny_models import write_model

import hybrid
from hybrid import LoadOptions
from hybrid.errors import InvalidArtifact, InvalidOption
from hybrid.exporting.powerinfer_predictor import Observed, convert
from hybrid.hub.catalog import hybrid_home
from predictors.predictors import LowRank, round_blocks

HIDDEN, NEURONS, RANK = 96, 192, 12
MODEL = {"vocab_size": 4096, "intermediate_size": NEURONS, "hidden_act": "relu"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    return hybrid_home()


def named(fc1: np.ndarray, fc2: np.ndarray, x: np.ndarray) -> np.ndarray:
    """PowerInfer's rule, written from its description; a score of 0 counts as active."""
    return np.maximum(x @ fc1.astype(np.float32).T, 0) @ fc2.astype(np.float32).T >= 0


def tokens(n: int, seed: int = 0) -> np.ndarray:
    """Residuals as trained models have them: a common part, and noise of various sizes."""
    draw = np.random.default_rng(seed)
    x = np.random.default_rng(9).standard_normal(HIDDEN) + draw.standard_normal((n, HIDDEN))
    return (x * np.exp(draw.standard_normal((n, 1)))).astype(np.float32)


def lowrank(bias: float) -> LowRank:
    draw = np.random.default_rng(1)
    return LowRank(
        round_blocks(draw.standard_normal((RANK, HIDDEN)).astype(np.float32)),
        draw.integers(-8, 8, (NEURONS, RANK)).astype(np.int8),
        draw.uniform(0.5, 1.5, (NEURONS, 2)).astype(np.float32),
        draw.standard_normal(NEURONS).astype(np.float32) * np.float32(bias),
    )


def normed(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(1, keepdims=True)) * w


def seen(x: np.ndarray, w: np.ndarray, predictor: LowRank, margin: float = 0.0) -> Observed:
    """What a layer saw if exactly the neurons fire that our predictor names."""
    unit = x / np.sqrt(np.square(x).mean(1, keepdims=True))
    return Observed(unit, predictor.scores(normed(x, w)) + margin >= 0)


@pytest.mark.parametrize(("bias", "least"), [(0.0, 0.985), (150.0, 0.96)])
def test_residuals_get_the_neurons_that_normed_inputs_get(bias, least):
    """Ours round a x to int8, which moves scores near 0. A bias is large if it is like scores."""
    w = np.random.default_rng(2).uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    predictor = lowrank(bias)
    fit, held = seen(tokens(400), w, predictor), seen(tokens(200, 1), w, predictor)
    found = convert(predictor, 0.0, w, (fit, held), None)
    x = tokens(200, 1)
    is_named = named(found.fc1, found.fc2, x)
    assert (is_named == held.active).mean() > least
    assert found.fc1.shape == (2 * RANK, HIDDEN)
    assert found.found == (is_named & held.active).sum()
    assert (found.active, found.pairs) == (held.active.sum(), held.active.size)
    without = convert(lowrank(0.0), 0.0, w, (fit, held), None)
    if bias:  # the bias matters
        assert (named(without.fc1, without.fc2, x) == held.active).mean() < least - 0.1


def test_a_margin_and_the_order_of_neurons_are_kept():
    w, predictor = np.ones(HIDDEN, np.float32), lowrank(1.0)
    order = np.random.default_rng(3).permutation(NEURONS)
    both = [seen(tokens(n, s), w, predictor, 30.0) for n, s in ((400, 0), (200, 1))]
    found = convert(predictor, 30.0, w, (both[0], both[1]), order)
    packed = named(found.fc1, found.fc2, tokens(200, 1))[:, order]
    assert (packed == both[1].active).mean() > 0.97


def test_a_layer_without_a_predictor_names_every_neuron():
    w, predictor = np.ones(HIDDEN, np.float32), lowrank(0.0)
    both = seen(tokens(9), w, predictor), seen(tokens(9, 1), w, predictor)
    found = convert(None, 0.0, w, both, None)
    assert named(found.fc1, found.fc2, tokens(9)).all()
    assert found.found == found.active


def with_predictor(folder: Path, **changes: object) -> tuple[Path, Path]:
    model = write_model(folder / "model", **MODEL)
    with hybrid.load(model, threads=1) as engine:
        path = write_predictor(
            folder / "predictor.safetensors", engine, kinds=("lowrank", "exact"), **changes
        )
    return model, path


@pytest.mark.parametrize("kind", slow_except(["f16", "q4_0"], "q4_0"))
def test_the_file_is_powerinfers(tmp_path, kind):
    model, predictor = with_predictor(tmp_path)
    out = tmp_path / "tiny.powerinfer.gguf"
    exported = export(model, "powerinfer", out, kind, options=LoadOptions(predictor=predictor))
    assert exported.is_same_elsewhere
    assert any("the exported predictor finds" in line for line in exported.notices)
    content = bytearray(out.read_bytes())
    assert content[:4] == b"PWRI"
    content[:4] = b"GGUF"  # the `gguf` package refuses the other magic
    (tmp_path / "plain.gguf").write_bytes(content)
    keys, tensors = read_with_gguf_package(tmp_path / "plain.gguf")
    assert keys["general.architecture"] == "llama"
    assert keys["powerinfer.sparse_threshold"] == 0.0
    layer = {name for name in tensors if name.startswith("blk.1.")}
    parts = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down_t fc1 fc2"
    assert layer == {f"blk.1.{part}.weight" for part in parts.split()}
    assert "output.weight" in tensors
    assert {tensors[f"blk.{n}.fc{i}.weight"][0] for n in (0, 1) for i in (1, 2)} == {"F16"}
    assert tensors["blk.0.fc1.weight"][1].shape == (2 * RANK, HIDDEN)
    assert tensors["blk.0.fc2.weight"][1].shape == (NEURONS, 2 * RANK)
    assert tensors["blk.0.ffn_down_t.weight"][0] == kind.upper()
    down = load_file(model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    stored = values_of(*tensors["blk.0.ffn_down_t.weight"])
    scale = np.float32(1.4 / 2**0.5)
    assert np.abs(stored - down.T * scale).max() < (1e-3 if kind == "f16" else 0.1)


def test_hybrid_runs_the_file_with_the_same_text(tmp_path):
    model, predictor = with_predictor(tmp_path)
    out = tmp_path / "tiny.gguf"
    export(model, "powerinfer", out, options=LoadOptions(predictor=predictor))
    expected = fp32_logits(model)
    np.testing.assert_allclose(fp32_logits(out), expected, rtol=0, atol=5e-3 * expected.std())
    assert greedy(out, 12, quant="bf16") == greedy(model, 12, quant="bf16")


def test_a_fatrelu_is_said_to_become_a_relu(tmp_path):
    model = write_model(tmp_path / "model", **MODEL | {"hidden_act": "fatrelu"})
    with hybrid.load(model, threads=1) as engine:
        predictor = write_predictor(tmp_path / "p.safetensors", engine)
    out = tmp_path / "tiny.gguf"
    exported = export(model, "powerinfer", out, options=LoadOptions(predictor=predictor))
    assert not exported.is_same_elsewhere
    assert any("PowerInfer computes plain ReLU" in line for line in exported.notices)


def test_without_a_predictor_the_line_that_makes_one_is_named(tmp_path):
    model = write_model(tmp_path / "model", **MODEL)
    with pytest.raises(InvalidOption, match=r"no predictor of q8 .*hybrid setup -m .*--quant q8"):
        export(model, "powerinfer", tmp_path / "a.gguf", options=LoadOptions(predictor="auto"))
    assert not (tmp_path / "a.gguf").exists()


def test_a_predictor_of_another_model_is_refused(tmp_path):
    model, predictor = with_predictor(tmp_path, model_hash="0" * 64)
    with pytest.raises(InvalidArtifact, match="was trained for other weights"):
        export(model, "powerinfer", tmp_path / "a.gguf", options=LoadOptions(predictor=predictor))


def test_a_dense_model_is_refused(tmp_path):
    model = write_model(tmp_path / "model", **MODEL | tiny_models.LLAMA)
    with pytest.raises(InvalidOption, match="silu, which is never zero"):
        export(model, "powerinfer", tmp_path / "a.gguf", options=LoadOptions(predictor="auto"))
