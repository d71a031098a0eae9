"""Models whose numbers are very small or very large compute what ordinary ones do, or say why not.

Most of these models equal an ordinary one: what one matrix is multiplied by, another is divided by.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from slow import slow_except
from tiny_models import STORIES, scale_weights, write_model, write_overflowing_model

import hybrid
from hybrid import NumericOverflow, eval
from hybrid.checking import check_model
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.oracle import executor as oracle_executor
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.kernels import Format, KvFormat
from hybrid.model.families import expected_tensors
from hybrid.weights import packing
from hybrid.weights.layout import packed_layout
from hybrid.weights.packing import pack_model

IDS = np.random.default_rng(1).integers(0, 320, 90).astype(np.int64)
UNTIED = {"tie_word_embeddings": False, "hidden_act": "silu", "hidden_act_param": None}


def copy_stories(folder: Path) -> Path:
    """Copy the bundled model, with its weights in fp32."""
    folder.mkdir()
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(STORIES / file, folder)
    with open_checkpoint(STORIES) as checkpoint:
        tensors = {
            name: checkpoint.read(role, layer)
            for role, layer, name, _ in expected_tensors(checkpoint.config)
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits_of(folder: Path, format: Format, *, has_preview: bool = False) -> np.ndarray:
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, format, has_preview=has_preview)
        model = pack_model(checkpoint, layout)
    executor = CpuExecutor(model, layout, n_threads=2, n_context=100)
    logits = executor.open_session().prefill(IDS, all_logits=True)
    assert logits is not None
    return logits


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the root mean square of a - b, as a share of b's standard deviation."""
    return float(np.sqrt(np.mean(np.square(a - b))) / b.std())


# By name: the changes of the config, and the factors. Both are made to TINY or an untied model.
EQUAL_MODELS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "up": ({}, {"up_proj": 1e-5, "down_proj": 1e5}),
    "down": ({}, {"up_proj": 3e8, "down_proj": 1 / 3e8}),
    "tiny up": ({}, {"up_proj": 1e-36, "down_proj": 1e36}),
    "gate": ({"hidden_act_param": 0.1e-5}, {"gate_proj": 1e-5, "down_proj": 1e5}),
    "ffn norm": ({}, {"post_attention_layernorm": 1e6, "gate_proj": 1e-6, "up_proj": 1e-6}),
    "qkv": ({}, {"input_layernorm": 1e7, "q_proj": 1e-7, "k_proj": 1e-7, "v_proj": 1e-7}),
    "q and k": ({}, {"q_proj": 3e-7, "k_proj": 1 / 3e-7}),
    "k and q": ({}, {"q_proj": 3e7, "k_proj": 1 / 3e7}),
    "v and o": ({}, {"v_proj": 1e-8, "o_proj": 1e8}),
    "o and v": ({}, {"v_proj": 1e8, "o_proj": 1e-8}),
    "embedding": (UNTIED | {"scale_emb": 3e7}, {"embed_tokens": 1e-7}),
    "head": (UNTIED, {"model.norm": 1e9, "lm_head": 1e-9}),
    "tied": ({"scale_emb": 3e6}, {"embed_tokens": 1e-6, "model.norm": 1e6}),
}


@pytest.mark.parametrize("name", EQUAL_MODELS)
def test_a_model_that_equals_an_ordinary_one_computes_its_logits(tmp_path, format, name):
    changes, factors = EQUAL_MODELS[name]
    base = UNTIED if name in ("embedding", "head") else {}
    expected = logits_of(write_model(tmp_path / "ordinary", **base), format)
    folder = write_model(tmp_path / "scaled", **(base | changes))
    actual = logits_of(scale_weights(folder, factors), format)
    assert difference(actual, expected) < 0.05


@pytest.mark.parametrize("has_preview", [False, True])
def test_a_previewed_head_of_tiny_weights_estimates_its_logits(tmp_path, has_preview):
    expected = logits_of(write_model(tmp_path / "a", **UNTIED), Format.q8, has_preview=has_preview)
    folder = write_model(tmp_path / "b", **UNTIED)
    scale_weights(folder, {"model.norm": 1e25, "lm_head": 1e-25})
    actual = logits_of(folder, Format.q8, has_preview=has_preview)
    assert difference(actual, expected) < 0.05


def test_the_scales_are_the_oracles_too(tmp_path, format):
    folder = write_model(tmp_path)
    for layer in range(2):
        scale_weights(folder, {f"{layer}.mlp.up_proj": 1e-6, f"{layer}.mlp.down_proj": 1e6})
    with open_checkpoint(folder) as checkpoint:
        weights = read_weights(checkpoint, format)
        session = ReferenceSession(weights, checkpoint.config, format)
        expected = session.prefill(IDS[:3].tolist())
    assert difference(logits_of(folder, format)[:3], expected) < 0.02


def test_the_bundled_model_writes_the_same_text_at_any_scale(tmp_path):
    with hybrid.load(STORIES) as engine:
        expected = "".join(engine.generate("Once upon a time", max_tokens=40, temperature=0))
    folder = copy_stories(tmp_path / "model")
    scale_weights(folder, {"up_proj": 1e-5, "down_proj": 1e5})
    with hybrid.load(folder) as engine:
        assert (
            "".join(engine.generate("Once upon a time", max_tokens=40, temperature=0)) == expected
        )


def test_selfcheck_finds_weights_that_the_format_does_not_hold(tmp_path, monkeypatch):
    """Engine and oracle round alike, so only the comparison with unrounded weights can see it."""
    folder = copy_stories(tmp_path / "model")
    scale_weights(folder, {"up_proj": 1e-5, "down_proj": 1e5})
    sound = {check.name: check for check in check_model(folder)}
    assert sound["rounding"].verdict == "ok"
    monkeypatch.setattr(packing, "is_usual", lambda *_: True)
    monkeypatch.setattr(oracle_executor, "find_matrix_scale", lambda *_: 1.0)
    checks = {check.name: check for check in check_model(folder)}
    assert checks["oracle"].verdict == "ok"
    assert checks["rounding"].verdict == "failed"
    assert "bf16" in checks["rounding"].advice


LARGE_KV = ("values", "keys")


def write_large_kv(folder: Path, kind: str) -> Path:
    """Some keys or values are up to some 1e6, which fp32 holds and fp16 does not. No power of two
    for the whole matrix would help. The model equals an ordinary one.
    """
    path = write_model(folder, vocab_size=4096) / "model.safetensors"
    tensors = load_file(path)
    head_dim, group = 16, 3
    for name in tensors:
        if kind == "values" and "v_proj" in name:
            tensors[name][3] *= np.float32(1e6)
            o = tensors[name.replace("v_proj", "o_proj")]
            for head in range(group):
                o[:, head * head_dim + 3] *= np.float32(1e-6)
        if kind == "keys" and "k_proj" in name:  # both halves of a pair, which rope mixes
            pair = [3, 3 + head_dim // 2]
            tensors[name][pair] *= np.float32(1e6)
            q = tensors[name.replace("k_proj", "q_proj")]
            for head in range(group):
                q[[head * head_dim + at for at in pair]] *= np.float32(1e-6)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("kind", LARGE_KV)
@pytest.mark.parametrize("quant", slow_except(["bf16", "f16", "q8", "q4"], "q8"))
def test_keys_and_values_beyond_fp16_are_an_error_that_names_the_remedy(tmp_path, kind, quant):
    folder = write_large_kv(tmp_path / "large", kind)
    with hybrid.load(folder, quant=quant) as engine:
        generation = engine.generate([5, 6, 7], max_tokens=4)
        message = r"KV cache overflows fp16 \(\|k\| or \|v\| up to \d.*e\+0[67]\); load .* kv bf16"
        with pytest.raises(NumericOverflow, match=message):
            list(generation)
    tokens = []
    for model in (folder, write_model(tmp_path / "ordinary", vocab_size=4096)):
        # A block of q8 would lose o's small weights beside the others.
        with hybrid.load(model, quant="bf16", kv="bf16") as engine:
            assert engine.kv == "bf16"
            generation = engine.generate([5, 6, 7], max_tokens=4, temperature=0)
            list(generation)
            tokens.append(generation.tokens)
    assert tokens[0] == tokens[1]


def test_an_overflow_appends_no_token(tmp_path):
    with hybrid.load(write_overflowing_model(tmp_path)) as engine, engine.open_session() as session:
        fresh = engine.open_session()
        session.prefill([5, 6, 7])
        for overflow in (lambda: session.decode(9), lambda: session.prefill([3] * 70 + [9, 4])):
            with pytest.raises(NumericOverflow, match="overflows fp16"):
                overflow()
            assert session.tokens == (5, 6, 7)
        session.decode(8)
        fresh.prefill([5, 6, 7, 8])
        np.testing.assert_array_equal(session.logits, fresh.logits)


@pytest.mark.parametrize("n", [1, 65, 90])
def test_prefill_equals_decode_with_a_bf16_cache(tmp_path, isa, format, n):
    folder = write_model(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, format)
        model = pack_model(checkpoint, layout)
    results = []
    for n_threads in (1, 3):
        executor = CpuExecutor(model, layout, n_threads=n_threads, n_context=100)
        session = executor.open_session(kv=KvFormat.bf16)
        results.append(session.prefill(IDS[:n], all_logits=True))
        decoding = executor.open_session(kv=KvFormat.bf16)
        for token in IDS[:n]:
            decoding.decode(int(token))
        np.testing.assert_array_equal(decoding.logits, session.logits)
        half = executor.open_session()
        for token in IDS[:n]:
            half.decode(int(token))
        assert half.decode_bytes["attend"] == decoding.decode_bytes["attend"]
        assert n == 1 or not np.array_equal(half.logits, decoding.logits)
    np.testing.assert_array_equal(*results)


def test_a_bf16_cache_matches_the_oracle(tmp_path, isa, format):
    folder = write_model(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        layout = packed_layout(checkpoint.config, format)
        executor = CpuExecutor(pack_model(checkpoint, layout), layout, n_threads=2, n_context=100)
        weights = read_weights(checkpoint, format)
    errors = []
    for ids in IDS.reshape(-1, 3):
        session = executor.open_session(kv=KvFormat.bf16)
        session.prefill(ids)
        oracle = ReferenceSession(weights, layout.config, format, KvFormat.bf16)
        expected = oracle.prefill(ids.tolist())[-1]
        errors.append(np.abs(session.logits - expected).max() / expected.std())
    assert max(errors) < 0.1
    assert np.mean(np.array(errors) < 1e-5) > 0.5


def test_selfcheck_names_the_overflow_and_passes_with_bf16(tmp_path):
    folder = write_large_kv(tmp_path, "values")
    *_, last = check_model(folder, quant="bf16")
    assert (last.name, last.verdict) == ("weights", "failed")
    assert "KV cache overflows fp16" in last.message
    checks = {c.name: c.verdict for c in check_model(folder, quant="bf16", kv="bf16")}
    assert checks["oracle"] == checks["prefill = decode"] == checks["rounding"] == "ok"


@pytest.mark.parametrize(
    "options",
    [{"device": "cuda"}, {"vram_budget": 1 << 30}, {"plan": Path("plan.json")}, {"kv": "fp8"}],
    ids=lambda options: next(iter(options)),
)
def test_a_bf16_cache_and_f16_weights_are_for_the_cpu(options):
    with pytest.raises(hybrid.InvalidOption, match=r"^kv"):
        hybrid.LoadOptions(**({"kv": "bf16"} | options))
    with pytest.raises(hybrid.InvalidOption, match=r"^(quant f16 is for the CPU|kv)"):
        hybrid.LoadOptions(**({"quant": "f16"} | options))


TEXT = "Once upon a time there was a cat. "


@pytest.mark.parametrize("arguments", [["--quant", "fp32"], [], ["--quant", "bf16"]])
def test_eval_ends_with_one_line_if_logits_are_not_finite(tmp_path, capsys, arguments):
    (tmp_path / "text").write_text(TEXT)
    folder = copy_stories(tmp_path / "model")
    scale_weights(folder, {"model.norm": 1e30, "embed_tokens": 1e10})  # logits of 1e40
    arguments = ["perplexity", "-m", str(folder), "--text", str(tmp_path / "text"), *arguments]
    assert eval.main(arguments) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "not finite" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_eval_says_that_the_kv_cache_overflows(tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    folder = write_large_kv(tmp_path / "model", "values")
    arguments = ["perplexity", "-m", str(folder), "--text", str(tmp_path / "text")]
    assert eval.main(arguments) == 1
    assert "KV cache overflows fp16" in capsys.readouterr().err
    assert eval.main([*arguments, "--kv", "bf16"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.norm", "model.embed_tokens"])
def test_fp32_refuses_weights_that_are_not_finite(tmp_path, capsys, name):
    (tmp_path / "text").write_text(TEXT)
    folder = write_model(tmp_path / "model", vocab_size=4096)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"].flat[7] = np.nan
    save_file(tensors, folder / "model.safetensors")
    arguments = ["perplexity", "--quant", "fp32", "-m", str(folder)]
    assert eval.main([*arguments, "--text", str(tmp_path / "text")]) == 1
    assert "not finite; its weights are broken" in capsys.readouterr().err


def test_choices_end_with_one_line_too(tmp_path, capsys):
    question = {"context": "The cat", "choices": ["sat.", "flew."], "answer": 0}
    (tmp_path / "questions").write_text(json.dumps(question))
    folder = write_large_kv(tmp_path / "model", "values")
    arguments = ["choices", "-m", str(folder), "--file", str(tmp_path / "questions")]
    assert eval.main(arguments) == 1
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert "KV cache overflows fp16" in error
