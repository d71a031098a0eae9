"""A GGUF file computes what the same model in a folder does; a broken one is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from fuzz.gguf_parts import GgufParts
from gguf_files import vocabulary_of, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import STORIES, scale_weights, write_model

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.gguf.activation import choose_activation, parse_activation
from hybrid.checkpoint.gguf.blocks import BLOCK_TYPES
from hybrid.checkpoint.gguf.reader import GgufFile, read_gguf
from hybrid.errors import (
    HybridError,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsupportedModel,
)
from hybrid.kernels import Format, _native
from hybrid.weights.formats import round_weights
from hybrid.weights.layout import packed_layout
from hybrid.weights.packing import pack_model

gguf = pytest.importorskip("gguf", reason="gguf")

SHARED = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = [
    SHARED / "models" / "llama-2-tiny-random" / "llama-2-tiny-random.gguf",
    SHARED / "gguf-vocab" / "ggml-vocab-llama-spm.gguf",
]
LAYOUT = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
VOCABULARY = vocabulary_of(LAYOUT)
LLAMA = tiny_models.LLAMA | {"rope_theta": 50000.0}


def write_pair(folder: Path, kind: str = "F32", **changes: Any) -> tuple[Path, Path]:
    """Write a model as a folder and as a GGUF file."""
    model = write_model(folder / "model", vocab_size=4096, **changes)
    return model, write_gguf(folder / "tiny.gguf", model, kind, vocabulary=VOCABULARY)


def logits(model: Path, **options: Any) -> np.ndarray:
    with hybrid.load(model, threads=1, **options) as engine, engine.open_session() as session:
        session.prefill(engine.tokenizer.encode("Once upon a time there was a cat"))
        return session.logits.copy()


# Types of weights


@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_blocks_have_the_values_of_the_gguf_package(number: int) -> None:
    kind = BLOCK_TYPES[number]
    draw = np.random.default_rng(number)
    data = draw.integers(0, 256, (200, kind.n_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(number))
        found = kind.values(data)
    np.testing.assert_array_equal(found, expected.reshape(found.shape))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == kind[1:3]
    assert gguf.GGMLQuantizationType(number).name == kind.name


# Reading


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_files_read_as_in_the_gguf_package(path: Path) -> None:
    if not path.exists():
        pytest.skip("not on this machine")
    compare(path)


def compare(path: Path) -> None:
    file, reference = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: f for key, f in reference.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for key, field in fields.items():
        found = file.metadata[key]
        found = found.tolist() if isinstance(found, np.ndarray) else found
        assert found == field.contents(), key
    assert file.tensors.keys() == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert info.begin == tensor.data_offset
        assert info.n_bytes == tensor.n_bytes
        assert info.type.name == tensor.tensor_type.name


def test_a_written_file_reads_as_in_the_gguf_package(tmp_path: Path) -> None:
    metadata = {"a.bool": True, "a.text": "ü", "a.number": 2.5, "a.numbers": [1.5, 2.0]}
    metadata |= {"a.texts": ["x", "", "你好"], "general.alignment": 64}
    model = write_model(tmp_path / "model", vocab_size=4096, intermediate_size=160)
    compare(write_gguf(tmp_path / "x.gguf", model, "Q8_0", metadata=metadata))


# The same model


@pytest.mark.parametrize("changes", [{}, LLAMA, LLAMA | {"hidden_act": "relu"}])
def test_a_gguf_file_computes_what_its_folder_does(tmp_path: Path, changes: Any) -> None:
    model, path = write_pair(tmp_path, **changes)
    activation = "fatrelu:0.1" if not changes else changes["hidden_act"]
    expected = logits(model, quant="bf16")
    found = logits(path, quant="bf16", activation=activation)
    if changes:
        np.testing.assert_array_equal(found, expected)
    else:  # MiniCPM's scales are float32 in the file
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_stored_types_have_their_own_values(tmp_path: Path, kind: str) -> None:
    """The tensors that are read are those that the `gguf` package dequantises."""
    _, path = write_pair(
        tmp_path,
        kind,
        **LLAMA,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        head_dim=16,
    )
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        for role, name in (("up", "ffn_up"), ("down", "ffn_down"), ("v", "attn_v")):
            tensor = reference[f"blk.1.{name}.weight"]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = checkpoint.tensor(role, 1)
            np.testing.assert_array_equal(found.fp32(), expected)
            np.testing.assert_array_equal(found.fp32((slice(3, 9),)), expected[3:9])
            with open_checkpoint(path, use_mmap=False) as unmapped:
                read = unmapped.tensor(role, 1)
                np.testing.assert_array_equal(read.fp32(), expected)
                np.testing.assert_array_equal(read.fp32((slice(3, 9),)), expected[3:9])
            columns = np.array([5, 1, 8])
            np.testing.assert_array_equal(
                found.in_memory().fp32((slice(None), columns)), expected[:, columns]
            )


SAME = {"F16": "f16", "BF16": "bf16", "Q8_0": "q8", "Q4_0": "q4"}


@pytest.mark.parametrize("size", [1.0, 2.0**-12], ids=["ordinary", "small"])
@pytest.mark.parametrize("ranks", [None, (8, 4)], ids=["llama", "powerinfer"])
@pytest.mark.parametrize("kind", SAME)
def test_stored_types_are_packed_to_the_bit(
    tmp_path: Path, kind: str, ranks: tuple[int, ...] | None, size: float
) -> None:
    """The kernels read what the `gguf` package reads, even where matrices have a scale."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    model = write_model(tmp_path / "model", vocab_size=4096, **LLAMA, **shape)
    scale_weights(model, dict.fromkeys(("mlp", "o_proj", "embed_tokens"), size))
    path = write_gguf(tmp_path / "x.gguf", model, kind, predictor_ranks=ranks)
    with open_checkpoint(path) as checkpoint:
        packed = pack_model(checkpoint, packed_layout(checkpoint.config, Format[SAME[kind]]))
    path.write_bytes(b"GGUF" + path.read_bytes()[4:])  # the package refuses PowerInfer's magic
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
    layer, blocks = packed.layers[1], "blk.1."
    found = {
        "token_embd": packed.embedding,
        f"{blocks}attn_output": layer.o,
        f"{blocks}ffn_gate": layer.gate,
        f"{blocks}ffn_up": layer.up,
    }
    if ranks is not None:
        found[f"{blocks}ffn_down_t"] = layer.down
    elif kind in ("F16", "BF16"):
        stored[f"{blocks}ffn_down.weight"] = stored[f"{blocks}ffn_down.weight"].T
        found[f"{blocks}ffn_down"] = layer.down
    for name, rows in found.items():
        values = [_native.dequantize(rows, row) for row in range(rows.n_rows)]
        np.testing.assert_array_equal(values, stored[f"{name}.weight"], err_msg=name)


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_stored_blocks_are_packed_to_the_same_blocks(tmp_path: Path, quant: str) -> None:
    kind = {"q8": "Q8_0", "q4": "Q4_0"}[quant]
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    _, path = write_pair(tmp_path, kind, **LLAMA, **shape)
    with open_checkpoint(path) as checkpoint:
        for role in ("gate", "up", "q", "o"):
            w = checkpoint.read(role, 0)
            np.testing.assert_array_equal(round_weights(Format[quant], w), w)
        down = checkpoint.read("down", 0)
        assert not np.array_equal(round_weights(Format[quant], down.T), down.T)
    with hybrid.load(path, quant=quant, threads=1) as engine:
        assert not any("stored as" in notice for notice in engine.notices)
        assert any("ffn_down is rounded once more" in notice for notice in engine.notices)
    with hybrid.load(path, quant="bf16", threads=1) as engine:
        assert any(f"stored as {kind} and packed to bf16" in line for line in engine.notices)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0"])
@pytest.mark.parametrize("use_mmap", [True, False])
def test_powerinfers_files_compute_what_the_folder_does(
    tmp_path: Path, kind: str, use_mmap: bool
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    changes = LLAMA | {"hidden_act": "relu"} | shape
    model = write_model(tmp_path / "model", vocab_size=4096, **changes)
    path = write_gguf(
        tmp_path / "powerinfer.gguf", model, kind, vocabulary=VOCABULARY, predictor_ranks=(8, 4)
    )
    assert path.read_bytes()[:4] == b"PWRI"
    with open_checkpoint(path, use_mmap=use_mmap) as found, open_checkpoint(model) as expected:
        assert found.config == expected.config
        assert any("computed with relu, as PowerInfer" in line for line in found.notices)
        down, w = found.tensor("down", 1), expected.read("down", 1)
        assert down.shape == w.shape
        if kind == "F32":
            np.testing.assert_array_equal(down.fp32(), w)
        np.testing.assert_allclose(down.fp32(), w, atol=0.1)
        columns = np.array([5, 1, 159])
        part = down.in_memory().fp32((slice(None), columns))
        np.testing.assert_array_equal(part, down.fp32()[:, columns])
        np.testing.assert_array_equal(down.fp32((slice(3, 9),)), down.fp32()[3:9])
    if kind == "F32":
        np.testing.assert_array_equal(logits(path), logits(model))
    if kind == "Q4_0":  # blocks run along hidden, so nothing is rounded again
        with open_checkpoint(path, Format.q4) as found:
            w = found.read("down", 0).T
            np.testing.assert_array_equal(round_weights(Format.q4, w), w)
            assert not any("rounded once more" in line for line in found.notices)


@pytest.mark.parametrize(
    ("architecture", "ffn"),
    [("bamboo", "dReLU"), ("sparse-qwen2", "dReLU"), ("relu-falcon", "an FFN without a gate")],
)
def test_another_ffn_of_powerinfers_or_kairoxs_is_named(
    tmp_path: Path, architecture: str, ffn: str
) -> None:
    model = write_model(tmp_path / "model", vocab_size=4096, **LLAMA)
    keys = VOCABULARY | {"general.architecture": architecture}
    path = write_gguf(tmp_path / "x.gguf", model, metadata=keys, predictor_ranks=(4, 4))
    expected = f"architecture '{architecture}': not supported yet: {ffn}"
    with pytest.raises(UnsupportedModel, match=expected):
        hybrid.load(path)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model, path = write_pair(tmp_path, **LLAMA)
    for at in range(3):
        name = f"big-0000{at + 1}-of-00003.gguf"
        vocabulary = VOCABULARY if at == 0 else None
        write_gguf(tmp_path / name, model, vocabulary=vocabulary, split=(at, 3))
    first = tmp_path / "big-00001-of-00003.gguf"
    np.testing.assert_array_equal(logits(first), logits(path))
    np.testing.assert_array_equal(logits(tmp_path / "big-00003-of-00003.gguf"), logits(path))
    (tmp_path / "big-00002-of-00003.gguf").rename(tmp_path / "other.gguf")
    with pytest.raises(InvalidCheckpoint, match=r"lacks 'big-00002-of-00003\.gguf'"):
        hybrid.load(first)
    first.rename(tmp_path / "alone.gguf")
    with pytest.raises(InvalidCheckpoint, match="one of 3 files, but its name does not say"):
        hybrid.load(tmp_path / "alone.gguf")


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    _, path = write_pair(tmp_path, **LLAMA)
    path.rename(tmp_path / "folder" / "tiny.gguf")
    with hybrid.load(tmp_path / "folder", threads=1) as engine:
        assert engine.name == "tiny.gguf"
    (tmp_path / "folder" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"holds 2 GGUF models: 'other.gguf', 'tiny.gguf'"):
        hybrid.load(tmp_path / "folder")


# The activation


def file_named(name: str, **metadata: Any) -> GgufFile:
    keys = {"general.architecture": "llama"} | metadata
    path = Path(f"{name}.gguf")
    return GgufFile(path, None, 3, False, keys, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (file_named("SmolLM2-135M.Q4_0"), ("silu", 0.0)),
        (file_named("prosparse-llama-2-7b.Q4_0"), ("fatrelu", 0.01)),
        (file_named("x", **{"general.name": "ReluLLaMA 7B"}), ("relu", 0.0)),
        (file_named("MiniCPM-S-1B-sft-Q8_0"), ("relu", 0.0)),
        (
            file_named("MiniCPM-S-1B-sft-Q8_0", **{"general.architecture": "minicpm"}),
            ("fatrelu", 0.03),
        ),
    ],
)
def test_the_activation_of_a_known_model(file: GgufFile, expected: tuple[str, float]) -> None:
    chosen = choose_activation(file, None)
    assert chosen[:2] == expected
    assert (chosen.notice is None) == (expected[0] == "silu")
    assert choose_activation(file, "fatrelu:0.5")[:2] == ("fatrelu", 0.5)


@pytest.mark.parametrize(
    "name", ["Bamboo-base", "my-sparse-model", "TurboSparse-Mistral", "x-relu"]
)
def test_a_name_that_hints_at_a_sparse_model_is_never_guessed(name: str) -> None:
    for file in (file_named(name), file_named("x", **{"general.name": name})):
        with pytest.raises(UnsupportedModel, match=r"--activation relu .*hybrid selfcheck -m"):
            choose_activation(file, None)
        assert choose_activation(file, "relu").name == "relu"


@pytest.mark.parametrize("text", ["gelu", "", "fatrelu", "fatrelu:x", "fatrelu:-1", "fatrelu:inf"])
def test_other_activations_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match="activation: expected silu, relu or fatrelu:T"):
        parse_activation(text)
    with pytest.raises(InvalidOption, match="activation: expected"):
        hybrid.load("stories", activation=text)


def test_an_activation_is_for_gguf_files_only() -> None:
    with pytest.raises(InvalidOption, match="activation: it is for GGUF files"):
        hybrid.load("stories", activation="relu")


@pytest.mark.parametrize(("text", "name"), [("drelu", "dReLU"), ("relu2", "ReLU²")])
def test_ffns_that_the_engine_lacks_are_refused_by_name(text: str, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"activation: not supported yet: {name}"):
        hybrid.load("stories", activation=text)


# What is not supported, and what is broken


@pytest.mark.parametrize(
    ("metadata", "error", "problem"),
    [
        ({"general.architecture": "qwen2"}, UnsupportedModel, "architecture 'qwen2'"),
        ({"general.architecture": "arcee"}, UnsupportedModel, "yet: an FFN without a gate"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "for a part of each head"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModel, "scaled rotary positions"),
        ({"llama.expert_count": 8}, UnsupportedModel, "experts"),
        ({"llama.attention.head_count": 0}, InvalidCheckpoint, "head_count: expected an integer"),
        ({"llama.attention.head_count": 4}, InvalidCheckpoint, "shape|heads"),
        ({"llama.attention.head_count_kv": 4}, InvalidCheckpoint, "kv|key_value|heads"),
        ({"llama.embedding_length": None}, InvalidCheckpoint, "embedding_length: .* found nothing"),
        ({"llama.block_count": 3}, InvalidCheckpoint, "has no tensor"),
        ({"llama.block_count": 2**31 - 1}, InvalidCheckpoint, "too few for the 2,147,483,647"),
        ({"llama.feed_forward_length": 100}, InvalidCheckpoint, "has shape"),
        (
            {"llama.attention.layer_norm_rms_epsilon": float("nan")},
            InvalidCheckpoint,
            "rms_epsilon: expected a finite number",
        ),
        ({"general.architecture": ["llama"]}, InvalidCheckpoint, "expected one value"),
        ({"llama.rope.scaling.type": [1, 2]}, InvalidCheckpoint, "expected one value"),
        ({"llama.attention.sliding_window": [0, 0]}, InvalidCheckpoint, "expected one value"),
        ({"llama.expert_count": [1, 2]}, InvalidCheckpoint, "expected one value"),
        ({"llama.attention.layer_norm_rms_epsilon": [1.0]}, InvalidCheckpoint, "one value"),
        ({"split.count": [1, 1]}, InvalidCheckpoint, "expected one value"),
        ({"split.count": "3"}, InvalidCheckpoint, "expected an integer, 1 or more"),
        ({"tokenizer.ggml.bos_token_id": [1, 2]}, InvalidCheckpoint, "expected one value"),
        ({"tokenizer.ggml.model": [1, 2]}, InvalidCheckpoint, "expected one value"),
        ({"tokenizer.ggml.precompiled_charsmap": "abc"}, InvalidCheckpoint, "no bytes"),
        (
            {"tokenizer.ggml.precompiled_charsmap": [255, 255, 255, 127, 1, 2, 3]},
            InvalidCheckpoint,
            "precompiled_charsmap is broken",
        ),
        (
            {"tokenizer.ggml.scores": [float("nan")] * 4096},
            InvalidCheckpoint,
            "expected finite numbers",
        ),
        (
            {"tokenizer.ggml.token_type": [1.0] * 4096},
            InvalidCheckpoint,
            "token_type: expected integers",
        ),
        (
            {"tokenizer.ggml.tokens": [f"p{id}" * (1 + 500 * (id == 7)) for id in range(4096)]},
            InvalidCheckpoint,
            "a piece of 1,002 characters",
        ),
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedModel, "tokenizer of kind 'rwkv'"),
        ({"tokenizer.ggml.scores": [0.0]}, InvalidCheckpoint, "expected 4,096 numbers"),
        ({"tokenizer.ggml.bos_token_id": 9999}, InvalidCheckpoint, "bos_token_id is 9999"),
        ({"tokenizer.ggml.eos_token_id": 9999}, InvalidCheckpoint, "eos_token_id is 9999"),
        ({"tokenizer.ggml.eot_token_id": 9999}, InvalidCheckpoint, "eot_token_id is 9999"),
        ({"tokenizer.ggml.tokens": None}, InvalidCheckpoint, "tokens: expected an array"),
        (
            {"tokenizer.ggml.tokens": ["<0xZZ>" if id == 9 else f"p{id}" for id in range(4096)]},
            InvalidCheckpoint,
            "no merges|lacks the piece",
        ),
    ],
)
def test_what_the_engine_does_not_run_is_named(
    tmp_path: Path, metadata: Any, error: type[HybridError], problem: str
) -> None:
    model = write_model(tmp_path / "model", vocab_size=4096, **LLAMA)
    keys = VOCABULARY | {key: value for key, value in metadata.items() if value is not None}
    for key in metadata:
        if metadata[key] is None:
            keys[key] = None
    path = write_gguf(tmp_path / "x.gguf", model, metadata=keys)
    with pytest.raises(error, match=problem) as caught:
        hybrid.load(path)
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("logit_scale", 0.0), ("logit_scale", float("inf")), ("residual_scale", float("nan"))],
)
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, key: str, value: float) -> None:
    model = write_model(tmp_path / "model", vocab_size=4096)
    keys = VOCABULARY | {f"minicpm.{key}": value}
    path = write_gguf(tmp_path / "x.gguf", model, metadata=keys)
    with pytest.raises(InvalidCheckpoint, match=f"minicpm.{key}"):
        hybrid.load(path, activation="relu")


@pytest.mark.parametrize("name", ["blk.0.ffn_up", "blk.0.ffn_down", "token_embd"])
def test_blocks_whose_scale_is_no_number_are_refused(tmp_path: Path, name: str) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 160}
    _, path = write_pair(tmp_path, "Q8_0", **LLAMA, **shape)
    begin = read_gguf(path).tensors[f"{name}.weight"].begin
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(np.float16("nan").tobytes() + b"\1")
    with pytest.raises(InvalidCheckpoint, match="holds values that are not finite"):
        hybrid.load(path, threads=1)


def test_old_files_of_minicpm_have_its_usual_scales(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=4096)
    missing = {f"minicpm.{name}_scale": None for name in ("embedding", "residual", "logit")}
    path = write_gguf(tmp_path / "x.gguf", model, metadata=VOCABULARY | missing)
    with open_checkpoint(path, activation="relu") as checkpoint:
        config = checkpoint.config
        assert config.embedding_scale == 12.0
        assert config.residual_scale == 1.4 / config.n_layers**0.5
        assert config.logit_scale == 256 / config.hidden_size


def test_a_tensor_that_changes_the_mathematics_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(4, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    with pytest.raises(InvalidCheckpoint, match=r"no tensor token_embd\.weight"):
        hybrid.load(tmp_path / "x.gguf")


def raw(
    *,
    version: int = 3,
    n_tensors: int = 0,
    n_keys: int = 0,
    keys: bytes = b"",
    tensors: bytes = b"",
    data: bytes = b"",
) -> bytes:
    """Bytes of a file, written by hand."""
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + tensors
    return head + bytes(-len(head) % 32) + data


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


KEY = text(b"a.b") + struct.pack("<II", 4, 7)
ALIGNMENT = text(b"general.alignment") + struct.pack("<I", 4)
BROKEN = {
    "empty": (b"", "is empty"),
    "magic": (b"GGUX" + bytes(40), "does not begin with GGUF"),
    "html": (b"<!DOCTYPE html><html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    "version 0": (raw(version=0), "version 0"),
    "version 1": (raw(version=1), "version 1"),
    "version 4": (raw(version=4), "version 4"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "many keys": (raw(n_keys=1 << 60), "keys"),
    "many tensors": (raw(n_tensors=1 << 63), "tensors"),
    "key twice": (raw(n_keys=2, keys=KEY + KEY), "there twice"),
    "empty key": (raw(n_keys=1, keys=text(b"") + struct.pack("<II", 4, 7)), "is empty"),
    "long key": (raw(n_keys=1, keys=struct.pack("<Q", 1 << 40)), "a name of"),
    "long string": (
        raw(n_keys=1, keys=text(b"a") + struct.pack("<IQ", 8, 1 << 62)),
        "ends within a field",
    ),
    "long array": (
        raw(n_keys=1, keys=text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 62)),
        "array of",
    ),
    "long array of strings": (
        raw(n_keys=1, keys=text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 20)),
        "within an array",
    ),
    "array of arrays": (
        raw(n_keys=1, keys=text(b"a") + struct.pack("<IIQ", 9, 9, 1) * 9 + bytes(99)),
        "array of",
    ),
    "value's type": (raw(n_keys=1, keys=text(b"a") + struct.pack("<I", 99)), "unknown type 99"),
    "bool": (raw(n_keys=1, keys=text(b"a") + struct.pack("<IB", 7, 9)), "neither 0 nor 1"),
    "not UTF-8": (raw(n_keys=1, keys=text(b"\xff\xfe") + struct.pack("<II", 4, 7)), "not UTF-8"),
    "alignment 0": (raw(n_keys=1, keys=ALIGNMENT + struct.pack("<I", 0)), "no power of two"),
    "alignment 3": (raw(n_keys=1, keys=ALIGNMENT + struct.pack("<I", 48)), "no power of two"),
    "dimensions": (raw(n_tensors=1, tensors=tensor(b"t", (1,) * 5)), "has 5 dimensions"),
    "no dimension": (raw(n_tensors=1, tensors=tensor(b"t", ())), "has 0 dimensions"),
    "size 0": (raw(n_tensors=1, tensors=tensor(b"t", (4, 0))), "has the shape"),
    "negative size": (
        raw(n_tensors=1, tensors=tensor(b"t", (4, 2**64 - 1))),
        "has the shape",
    ),
    "negative counts": (raw(n_tensors=2**64 - 1, n_keys=2**64 - 1), "would have"),
    "overflow": (raw(n_tensors=1, tensors=tensor(b"t", (1 << 39,) * 4)), "has the shape"),
    "tensor's type": (raw(n_tensors=1, tensors=tensor(b"t", (4,), 99)), "type 99"),
    "half a block": (raw(n_tensors=1, tensors=tensor(b"t", (33,), 8)), "no multiple of 32"),
    "beyond the file": (
        raw(n_tensors=1, tensors=tensor(b"t", (4,), 0, 1 << 40), data=bytes(64)),
        "would have 16 bytes",
    ),
    "unaligned": (
        raw(n_tensors=1, tensors=tensor(b"t", (4,), 0, 4), data=bytes(64)),
        "would have 16 bytes",
    ),
    "tensor twice": (
        raw(n_tensors=2, tensors=tensor(b"t", (4,)) + tensor(b"t", (4,), 0, 32), data=bytes(96)),
        "is there twice",
    ),
    "overlap": (
        raw(n_tensors=2, tensors=tensor(b"t", (16,)) + tensor(b"u", (4,), 0, 32), data=bytes(96)),
        "overlaps",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    data, problem = BROKEN[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=problem) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)
    assert "x.gguf" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sound")
    _, path = write_pair(folder, "Q8_0", **LLAMA, num_hidden_layers=1, intermediate_size=160)
    return path.read_bytes()


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "x.gguf"
    draw = np.random.default_rng(0)
    for end in [*range(1, 200, 3), *draw.integers(200, len(sound) - 1, 100).tolist()]:
        path.write_bytes(sound[:end])
        with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
            read_gguf(path)


def test_a_file_that_is_cut_between_sections_is_refused(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "x.gguf"
    parts = GgufParts.of(sound)
    sections = [parts.head, bytes(16), *(part.content() for part in [*parts.keys, *parts.tensors])]
    ends = np.cumsum([len(section) for section in sections]).tolist()
    assert len(ends) > 25
    for end in [4, *ends, len(sound) - len(parts.data)]:
        path.write_bytes(sound[:end])
        with pytest.raises(InvalidCheckpoint, match="not a sound GGUF file"):
            read_gguf(path)


@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=150)
def test_a_damaged_file_ends_in_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, sound: bytes, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(sound)
    for place, value in changes:
        data[int(place**4 * (len(data) - 1))] = value  # most of them near the beginning
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(data)
    try:
        with open_checkpoint(path, activation="silu") as checkpoint:
            checkpoint.read("embedding")
    except HybridError:
        pass


def test_files_of_other_programs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"tjgg" + bytes(100))
    with pytest.raises(HybridError, match="a file of an early llama"):
        hybrid.load(path)
