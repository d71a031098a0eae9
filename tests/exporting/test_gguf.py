"""A GGUF file that we write is what the `gguf` package, llama.cpp and hybrid itself read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from exporting_models import (
    SHARED,
    export,
    fp32_logits,
    greedy,
    read_with_gguf_package,
    values_of,
)
from gguf_files import gguf_name, permuted, vocabulary_of, write_gguf
from safetensors.numpy import load_file, save_file
from slow import slow_except
from tiny_models import STORIES, write_model

from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.gguf.reader import read_gguf
from hybrid.errors import InvalidCheckpoint, NumericOverflow
from hybrid.kernels import Format
from hybrid.text.tokenizer import Tokenizer
from hybrid.weights.formats import round_weights

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
WHOLE = {"hidden_size": 96, "intermediate_size": 192, "vocab_size": 4096}
LLAMA = tiny_models.LLAMA | WHOLE
SMALL = {"vocab_size": 320}  # no tokenizer: the `gguf` package takes a second to read one
FORMATS = {"q8_0": Format.q8, "q4_0": Format.q4, "bf16": Format.bf16}
LAYOUT = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
VOCABULARY = vocabulary_of(LAYOUT)


@pytest.fixture(scope="module", params=["minicpm", "llama"])
def model(request, tmp_path_factory) -> Path:
    """A model whose rows are whole blocks."""
    changes = LLAMA if request.param == "llama" else WHOLE
    return write_model(tmp_path_factory.mktemp(request.param), **changes)


@pytest.fixture(scope="module", params=["minicpm", "llama"])
def small(request, tmp_path_factory) -> Path:
    changes = LLAMA if request.param == "llama" else WHOLE
    return write_model(tmp_path_factory.mktemp(request.param), **changes | SMALL)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gguf_package_reads_our_rounded_values(small, tmp_path, kind):
    """All matrices have the values of hybrid's own formats; q and k are permuted; norms are F32."""
    out = tmp_path / "tiny.gguf"
    export(small, "gguf", out, kind)
    _, tensors = read_with_gguf_package(out)
    stored = load_file(small / "model.safetensors")
    assert tensors.keys() == {gguf_name(name) for name in stored}
    for name, w in stored.items():
        type_name, data = tensors[gguf_name(name)]
        values = values_of(type_name, data)
        assert type_name == (kind.upper() if w.ndim == 2 else "F32")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = permuted(w, 6 if name.endswith("q_proj.weight") else 2)
        if w.ndim == 2 and kind == "f16":
            w = w.astype(np.float16).astype(np.float32)
        elif w.ndim == 2:
            w = round_weights(FORMATS.get(kind), w)
        np.testing.assert_array_equal(values.reshape(w.shape), w, err_msg=name)


def test_the_keys_are_llama_cpps(tmp_path):
    model = write_model(tmp_path / "model", **WHOLE, rope_theta=5000.0)
    export(model, "gguf", tmp_path / "tiny.gguf", "q8_0")
    keys, _ = read_with_gguf_package(tmp_path / "tiny.gguf")
    expected = {
        "general.architecture": "minicpm",
        "general.name": "model",
        "general.file_type": 7,
        "general.alignment": 32,
        "general.quantization_version": 2,
        "minicpm.context_length": 600,
        "minicpm.embedding_length": 96,
        "minicpm.block_count": 2,
        "minicpm.feed_forward_length": 192,
        "minicpm.attention.head_count": 6,
        "minicpm.attention.head_count_kv": 2,
        "minicpm.rope.dimension_count": 16,
        "minicpm.rope.freq_base": 5000.0,
        "minicpm.vocab_size": 4096,
        "minicpm.embedding_scale": 3.0,
        "minicpm.logit_scale": 2.0,
        "hybrid.activation": "fatrelu:0.1",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert expected.items() <= keys.items()
    assert keys["minicpm.residual_scale"] == pytest.approx(1.4 / 2**0.5)
    assert keys["minicpm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "minicpm.attention.key_length" not in keys


def test_heads_of_another_size_are_said(tmp_path):
    model = write_model(tmp_path / "model", **WHOLE, head_dim=8)
    export(model, "gguf", tmp_path / "tiny.gguf")
    keys, _ = read_with_gguf_package(tmp_path / "tiny.gguf")
    assert keys["minicpm.attention.key_length"] == keys["minicpm.attention.value_length"] == 8
    logits = fp32_logits(tmp_path / "tiny.gguf")
    np.testing.assert_allclose(logits, fp32_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", slow_except(["f32", "f16", "bf16"], "f16"))
def test_hybrid_computes_the_same_with_the_file(model, tmp_path, kind):
    """The weights are bf16 values; of the three types only f16 rounds some, below 6e-5."""
    out = tmp_path / "tiny.gguf"
    export(model, "gguf", out, kind)
    np.testing.assert_allclose(fp32_logits(out), fp32_logits(model), rtol=0, atol=1e-5)
    assert greedy(out, quant="bf16") == greedy(model, quant="bf16")


def test_the_bundled_model_tells_the_same_story(tmp_path):
    out = tmp_path / "no such story.gguf"
    exported = export(STORIES, "gguf", out)
    assert not exported.is_same_elsewhere
    assert any("SiLU" in notice for notice in exported.notices)
    assert greedy(out, quant="bf16") == greedy(STORIES, quant="bf16", profile="none")


def test_folded_scales_are_in_the_weights_of_a_llama(tmp_path):
    model = write_model(tmp_path / "model", **WHOLE)
    out = tmp_path / "tiny.gguf"
    export(model, "gguf", out, "f32", is_folded=True)
    keys, tensors = read_with_gguf_package(out)
    assert keys["general.architecture"] == "llama"
    assert not [key for key in keys if key.endswith("_scale")]
    assert "output.weight" in tensors
    expected = fp32_logits(model)
    np.testing.assert_allclose(fp32_logits(out), expected, rtol=0, atol=1e-5 * expected.std())


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path):
    model = write_model(tmp_path / "model")  # 200 neurons
    exported = export(model, "gguf", tmp_path / "tiny.gguf", "q8_0")
    _, tensors = read_with_gguf_package(tmp_path / "tiny.gguf")
    kinds = {name: kind for name, (kind, data) in tensors.items() if data.ndim == 2}
    assert {n for n, kind in kinds.items() if kind == "F16"} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }
    assert [line for line in exported.notices if "ffn_down" in line and "F16" in line]


# Round trips


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_a_file_of_the_gguf_package_is_copied_byte_by_byte(tmp_path, kind):
    """Q4_0 of the package has other scales than ours, so nothing may be rounded again."""
    model = write_model(tmp_path / "model", **LLAMA | SMALL)
    source = write_gguf(tmp_path / "source.gguf", model, kind)
    export(source, "gguf", tmp_path / "copy.gguf", kind.lower())
    _, tensors = read_with_gguf_package(source)
    _, copied = read_with_gguf_package(tmp_path / "copy.gguf")
    assert copied.keys() == tensors.keys()
    for name, (type_name, data) in tensors.items():
        assert copied[name][0] == type_name
        np.testing.assert_array_equal(copied[name][1], data, err_msg=name)


@pytest.mark.parametrize("kind", slow_except(["q8_0", "q4_0"], "q4_0"))
def test_export_after_import_gives_the_same_file(model, tmp_path, kind):
    """Byte by byte, with all keys: the vocabulary's too."""
    first, second, third = (tmp_path / f"{n}.gguf" for n in range(3))
    export(model, "gguf", first, kind)
    export(first, "gguf", second, kind)
    export(second, "gguf", third, kind)
    assert second.read_bytes() == third.read_bytes()
    files = [read_gguf(path) for path in (first, second)]
    assert files[0].tensors.keys() == files[1].tensors.keys()
    for name in files[0].tensors:
        before, after = (
            file.buffer[file.tensors[name].begin :][: file.tensors[name].n_bytes] for file in files
        )
        assert before == after


@pytest.mark.parametrize("kind", slow_except(["Q8_0", "Q4_0"], "Q4_0"))
def test_values_survive_a_folder_in_between(tmp_path, kind):
    """Blocks are rounded to themselves: all their values are multiples of their scale."""
    model = write_model(tmp_path / "model", **LLAMA | SMALL)
    source = write_gguf(tmp_path / "source.gguf", model, kind)
    export(source, "hf", tmp_path / "folder", "f32", has_tokenizer=False)
    export(tmp_path / "folder", "gguf", tmp_path / "back.gguf", kind.lower())
    _, tensors = read_with_gguf_package(source)
    _, back = read_with_gguf_package(tmp_path / "back.gguf")
    for name, (type_name, data) in tensors.items():
        np.testing.assert_array_equal(
            values_of(*back[name]), values_of(type_name, data), err_msg=name
        )


def test_the_metadata_of_a_gguf_source_is_copied_as_it_is(tmp_path):
    """Types of values too: the reader does not keep them."""
    model = write_model(tmp_path / "model", **LLAMA)
    extra = {"general.license": "mit", "tokenizer.ggml.some_numbers": [1, -2, 3]}
    extra |= {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.add_eos_token": False}
    source = write_gguf(tmp_path / "source.gguf", model, vocabulary=VOCABULARY, metadata=extra)
    export(source, "gguf", tmp_path / "copy.gguf")
    gguf = pytest.importorskip("gguf", reason="gguf")
    before, after = (gguf.GGUFReader(path).fields for path in (source, tmp_path / "copy.gguf"))
    names = [name for name in before if name.startswith("tokenizer.")] + ["general.license"]
    assert len(names) > 7
    for name in names:
        assert after[name].types == before[name].types
        assert after[name].contents() == before[name].contents()


def test_powerinfers_down_matrices_become_plain_ones(tmp_path):
    model = write_model(tmp_path / "model", **LLAMA | {"hidden_act": "relu"})
    source = write_gguf(
        tmp_path / "s.gguf", model, "F16", vocabulary=VOCABULARY, predictor_ranks=(8, 16)
    )
    export(source, "gguf", tmp_path / "plain.gguf", "f16")
    _, tensors = read_with_gguf_package(tmp_path / "plain.gguf")
    expected = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(
        values_of(*tensors["blk.1.ffn_down.weight"]), expected.astype(np.float16)
    )
    np.testing.assert_array_equal(fp32_logits(tmp_path / "plain.gguf"), fp32_logits(source))


# The activation


@pytest.mark.parametrize(("name", "threshold"), [("silu", None), ("relu", None), ("fatrelu", 0.03)])
def test_the_files_own_key_says_the_activation(tmp_path, name, threshold):
    """Even where the file's name would hint at another one."""
    model = write_model(
        tmp_path / "m", **WHOLE | SMALL, hidden_act=name, hidden_act_param=threshold
    )
    out = tmp_path / "prosparse-llama-2-7b.gguf"
    exported = export(model, "gguf", out)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.config.activation == name
        assert checkpoint.config.threshold == (threshold or 0.0)
    with open_checkpoint(out, activation="relu") as checkpoint:
        assert checkpoint.config.activation == "relu"
    assert exported.is_same_elsewhere == (name == "silu")


def test_a_broken_key_is_refused(tmp_path):
    model = write_model(tmp_path / "model", **LLAMA)
    path = write_gguf(tmp_path / "a.gguf", model, metadata={"hybrid.activation": "gelu"})
    with pytest.raises(InvalidCheckpoint, match=r"a\.gguf: hybrid\.activation: .*'gelu'"):
        open_checkpoint(path)


# Values that a type cannot hold


def test_values_too_large_for_f16_are_refused_and_leave_nothing(tmp_path):
    model = write_model(tmp_path / "model", **WHOLE | SMALL)
    tiny_models.scale_weights(model, {"layers.1.mlp.up_proj": 1e8})
    for kind in ("f16", "q4_0"):
        with pytest.raises(NumericOverflow, match=r"layers\.1\.mlp\.up_proj.*too large for"):
            export(model, "gguf", tmp_path / "tiny.gguf", kind)
    export(model, "gguf", tmp_path / "tiny.gguf", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_values_too_small_for_fp16_are_refused_and_leave_nothing(tmp_path, kind):
    model = write_model(tmp_path / "model", **WHOLE | SMALL)
    tiny_models.scale_weights(model, {"layers.1.mlp.up_proj": 2.0**-20})
    with pytest.raises(NumericOverflow, match=r"layers\.1\.mlp\.up_proj.*too small for"):
        export(model, "gguf", tmp_path / "tiny.gguf", kind)
    export(model, "gguf", tmp_path / "tiny.gguf", "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]


def test_a_few_neurons_with_tiny_weights_are_no_hindrance(tmp_path):
    model = write_model(tmp_path / "model", **WHOLE | SMALL)
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][::3] *= np.float32(2.0**-20)
    save_file(tensors, path)
    export(model, "gguf", tmp_path / "tiny.gguf", "q8_0")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = write_model(tmp_path / "model", **WHOLE | SMALL)
    tiny_models.scale_weights(model, {"layers.0.mlp.gate_proj": np.nan})
    with pytest.raises(NumericOverflow, match="not finite"):
        export(model, "gguf", tmp_path / "tiny.gguf", "f32")


# Another engine


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_continues_a_real_model_with_the_same_ids(tmp_path, shared_data, kind):
    """stories260K, 200 greedy tokens, wherever our two likeliest differ by more than 0.05."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model, out = SHARED / "models" / "stories260K" / "hf", tmp_path / "stories260K.gguf"
    exported = export(model, "gguf", out, kind)
    assert exported.is_same_elsewhere
    ids = [1]
    while len(ids) < 201:
        ids.append(int(fp32_logits(out, ids)[-1].argmax()))
    ours = fp32_logits(model, ids)
    peer = llama_cpp.Llama(str(out), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    peer.eval(ids)
    theirs = np.array(peer.scores[: len(ids)])
    top = np.sort(ours, axis=1)
    is_clear = top[:, -1] - top[:, -2] > 0.05
    assert is_clear.sum() > 150
    np.testing.assert_array_equal(theirs.argmax(1)[is_clear], ours.argmax(1)[is_clear])
    text = "Once upon a time, there was a cat. It said: 12 café 你好!\n"
    tokens = peer.tokenize(text.encode(), add_bos=False)
    own = Tokenizer.from_folder(model, vocab_size=512, bos_id=1)
    assert tokens == [id for id in own.encode(text) if id != 1]
