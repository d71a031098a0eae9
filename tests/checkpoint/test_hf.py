"""Folders in Hugging Face's layout are read exactly; broken ones are refused with the reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import change_json

from hybrid.checkpoint import Checkpoint, open_checkpoint
from hybrid.errors import (
    EngineClosed,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsupportedModel,
)

LAYER_ROLES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
Arrays = dict[str, np.ndarray]
Save = Callable[..., None]


def read_all(checkpoint: Checkpoint) -> Arrays:
    """Read every tensor of a checkpoint, keyed by its name in the files."""
    arrays = {
        "model.embed_tokens.weight": checkpoint.read("embedding"),
        "model.norm.weight": checkpoint.read("norm"),
        "lm_head.weight": checkpoint.read("head"),
    }
    for layer in range(checkpoint.config.n_layers):
        for role, name in LAYER_ROLES.items():
            arrays[f"model.layers.{layer}.{name}.weight"] = checkpoint.read(role, layer)
    return arrays


def assert_reads(folder: Path, expected: Arrays) -> None:
    with open_checkpoint(folder) as checkpoint:
        actual = read_all(checkpoint)
    head = expected.get("lm_head.weight", expected["model.embed_tokens.weight"])
    expected = {**expected, "lm_head.weight": head}
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name, strict=True)


def save_bin(path: Path, arrays: Arrays, dtype: str = "float32") -> None:
    torch = pytest.importorskip("torch", reason="torch writes the .bin file that is read")
    state = {
        name: torch.tensor(array, dtype=getattr(torch, dtype)) for name, array in arrays.items()
    }
    torch.save(state, path)


def save_index(path: Path, weight_map: object) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_one_safetensors_file_is_read(
    model: Path, arrays: Arrays, save_safetensors: Save, dtype: str
) -> None:
    save_safetensors(model / "model.safetensors", arrays, dtype)
    assert_reads(model, arrays)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_bin_file_is_read(model: Path, arrays: Arrays, dtype: str) -> None:
    (model / "model.safetensors").unlink()
    save_bin(model / "pytorch_model.bin", arrays, dtype)
    assert_reads(model, arrays)


@pytest.fixture
def sharded(model: Path, arrays: Arrays, save_safetensors: Save) -> tuple[Path, dict[str, str]]:
    """The folder in two shards, and its weight map."""
    (model / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(arrays)}
    for shard in shards:
        save_safetensors(
            model / shard, {name: arrays[name] for name, s in weight_map.items() if s == shard}
        )
    save_index(model / "model.safetensors.index.json", weight_map)
    return model, weight_map


def test_sharded_safetensors_are_read(sharded: tuple[Path, dict[str, str]], arrays: Arrays) -> None:
    assert_reads(sharded[0], arrays)


def test_sharded_bin_files_are_read(model: Path, arrays: Arrays) -> None:
    (model / "model.safetensors").unlink()
    names = list(arrays)
    for shard, part in (("a.bin", names[::2]), ("b.bin", names[1::2])):
        save_bin(model / shard, {name: arrays[name] for name in part})
    weight_map = {name: "ab"[i % 2] + ".bin" for i, name in enumerate(names)}
    save_index(model / "pytorch_model.bin.index.json", weight_map)
    assert_reads(model, arrays)


def test_safetensors_is_preferred(model: Path, arrays: Arrays) -> None:
    (model / "pytorch_model.bin").write_bytes(b"not even opened")
    save_index(model / "pytorch_model.bin.index.json", {"a": "b"})
    assert_reads(model, arrays)


def test_links_into_a_cache_are_followed(model: Path, arrays: Arrays) -> None:
    """In huggingface_hub's cache, every file of a snapshot is a link to ../../blobs/…"""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for path in list(model.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert_reads(model, arrays)
    (blobs / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors: is missing, or is a link"):
        open_checkpoint(model)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_stored_head_that_equals_the_embedding_stays_tied(
    model: Path, arrays: Arrays, save_safetensors: Save, use_mmap: bool
) -> None:
    stored = {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"]}
    save_safetensors(model / "model.safetensors", stored)
    with open_checkpoint(model, use_mmap=use_mmap) as checkpoint:
        assert checkpoint.config.has_tied_head
        assert checkpoint.notices == checkpoint.unused_tensors == ()
        np.testing.assert_array_equal(checkpoint.read("head"), arrays["model.embed_tokens.weight"])


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("place", [0, -1])
def test_a_stored_head_that_differs_is_used_although_the_config_ties_it(
    model: Path, arrays: Arrays, save_safetensors: Save, use_mmap: bool, place: int
) -> None:
    head = arrays["model.embed_tokens.weight"].copy()
    head.flat[place] += 1
    save_safetensors(model / "model.safetensors", {**arrays, "lm_head.weight": head})
    with open_checkpoint(model, use_mmap=use_mmap) as checkpoint:
        assert not checkpoint.config.has_tied_head
        np.testing.assert_array_equal(checkpoint.read("head"), head)
        [notice] = checkpoint.notices
        assert "'lm_head.weight' differs from the embedding; the stored head is used" in notice
        other_hash = checkpoint.weights_hash
    save_safetensors(model / "model.safetensors", arrays)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.weights_hash != other_hash  # packed weights of the tied model do not fit


def test_a_head_without_an_embedding_serves_as_both(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    arrays["lm_head.weight"] = arrays.pop("model.embed_tokens.weight")
    save_safetensors(model / "model.safetensors", arrays)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.config.has_tied_head
        for role in ("embedding", "head"):
            np.testing.assert_array_equal(checkpoint.read(role), arrays["lm_head.weight"])
        assert "it serves as both" in checkpoint.notices[0]


def test_a_tied_model_that_torch_saved_stores_one_array_twice(model: Path, arrays: Arrays) -> None:
    torch = pytest.importorskip("torch", reason="torch writes the .bin file that is read")
    (model / "model.safetensors").unlink()
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, model / "pytorch_model.bin")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.config.has_tied_head
        assert checkpoint.notices == ()


def test_an_untied_head_is_its_own(model: Path, arrays: Arrays, save_safetensors: Save) -> None:
    change_json(model / "config.json", tie_word_embeddings=False)
    with pytest.raises(InvalidCheckpoint) as raised:
        open_checkpoint(model)
    assert "has no tensor 'lm_head.weight', and tie_word_embeddings is false" in str(raised.value)
    assert "write tie_word_embeddings true" in str(raised.value)
    arrays["lm_head.weight"] = -arrays["model.embed_tokens.weight"]
    save_safetensors(model / "model.safetensors", arrays)
    assert_reads(model, arrays)


def test_a_llama_with_wide_heads_is_read(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    changes = {"hidden_act": "relu", "head_dim": 16, "vocab_size": 12}
    change_json(model / "config.json", architectures=["LlamaForCausalLM"], **changes)
    rng = np.random.default_rng(3)
    for name, array in arrays.items():
        shape = array.shape
        if "q_proj" in name or "k_proj" in name or "v_proj" in name:
            shape = (2 * shape[0], shape[1])
        elif "o_proj" in name:
            shape = (shape[0], 2 * shape[1])
        elif "embed" in name:
            shape = (12, 32)
        arrays[name] = rng.standard_normal(shape, np.float32)
    arrays["lm_head.weight"] = rng.standard_normal((12, 32), np.float32)
    save_safetensors(model / "model.safetensors", arrays)
    assert_reads(model, arrays)


def test_buffers_that_the_config_determines_are_ignored(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    buffers = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "position_ids")
    extra = {f"model.layers.0.self_attn.{name}": np.ones(4, np.float32) for name in buffers}
    save_safetensors(model / "model.safetensors", {**arrays, **extra})
    assert_reads(model, arrays)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.notices == checkpoint.unused_tensors == ()


def test_tensors_that_are_not_used_are_named(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    """Biases without attention_bias, and a third layer of a model that has two."""
    bias = "model.layers.0.self_attn.q_proj.bias"
    third = [name.replace(".1.", ".2.") for name in arrays if ".1." in name]
    extra = dict.fromkeys([bias, *third], np.ones(4, np.float32))
    save_safetensors(model / "model.safetensors", {**arrays, **extra})
    assert_reads(model, arrays)
    with open_checkpoint(model) as checkpoint:
        assert set(checkpoint.unused_tensors) == {bias, *third}
        [notice] = checkpoint.notices
    assert f"tensors for which config.json has no place are not used: {bias!r}" in notice
    assert notice.endswith("and 6 more")


def test_the_notice_about_unused_tensors_stays_short(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    extra = {f"{'x' * 500}.{i}": np.ones(1, np.float32) for i in range(1000)}
    save_safetensors(model / "model.safetensors", {**arrays, **extra})
    with open_checkpoint(model) as checkpoint:
        [notice] = checkpoint.notices
        assert len(checkpoint.unused_tensors) == 1000
    assert len(notice) < 600


def test_unused_tensors_of_shards_are_named_even_if_the_index_lacks_them(
    sharded: tuple[Path, dict[str, str]], arrays: Arrays, save_safetensors: Save
) -> None:
    folder, weight_map = sharded
    shard = weight_map["model.norm.weight"]
    kept = {name: arrays[name] for name, file in weight_map.items() if file == shard}
    save_safetensors(folder / shard, {**kept, "extra": np.ones(1, np.float32)})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.unused_tensors == ("extra",)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("rename", "stored"),
    [
        (lambda name: name.removeprefix("model."), "embed_tokens.weight"),
        (lambda name: f"_orig_mod.{name}", "_orig_mod.model.embed_tokens.weight"),
        (lambda name: f"module.{name}", "module.model.embed_tokens.weight"),
        (
            lambda name: f"module._orig_mod.{name.removeprefix('model.')}",
            "module._orig_mod.embed_tokens.weight",
        ),
        (
            lambda name: re.sub(r"(layers\.\d+)", r"\1._orig_mod", name),
            "model.layers.0._orig_mod.input_layernorm.weight",
        ),
    ],
    ids=["base model", "compiled", "parallel", "both", "compiled layers"],
)
def test_names_with_other_prefixes_are_read(
    model: Path,
    arrays: Arrays,
    save_safetensors: Save,
    kind: str,
    rename: Callable[[str], str],
    stored: str,
) -> None:
    renamed = {rename(name): array for name, array in arrays.items()}
    if kind == "bin":
        (model / "model.safetensors").unlink()
        save_bin(model / "pytorch_model.bin", renamed)
    else:
        save_safetensors(model / "model.safetensors", renamed)
    assert_reads(model, arrays)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.unused_tensors == ()
        [notice] = checkpoint.notices
    assert "tensors have other names than the family's" in notice
    assert repr(stored) in notice


def test_two_names_for_one_tensor_are_refused(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    norm = arrays.pop("model.norm.weight")
    arrays |= {"norm.weight": norm, "module.norm.weight": -norm}
    save_safetensors(model / "model.safetensors", arrays)
    with pytest.raises(InvalidCheckpoint, match=r"both stand for 'model\.norm\.weight'"):
        open_checkpoint(model)
    arrays["model.norm.weight"] = norm  # the right name wins
    save_safetensors(model / "model.safetensors", arrays)
    with open_checkpoint(model) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("norm"), norm)
        assert checkpoint.unused_tensors == ("module.norm.weight", "norm.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["SparseLlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "auto_map": {"a": "b.C"}},
    ],
    ids=["SparseLlama", "code of its own"],
)
def test_a_llama_with_tensors_for_its_own_code_is_refused(
    model: Path, arrays: Arrays, save_safetensors: Save, changes: dict[str, object]
) -> None:
    """As NOSA, whose attention has two parameters more and whose name is SparseLlama's."""
    change_json(model / "config.json", **changes, tie_word_embeddings=True)
    assert_reads(model, arrays)
    for layer in range(2):
        arrays[f"model.layers.{layer}.self_attn.A"] = np.ones(2, np.float32)
        arrays[f"model.layers.{layer}.self_attn.delta.weight"] = np.ones((2, 16), np.float32)
    save_safetensors(model / "model.safetensors", arrays)
    with pytest.raises(UnsupportedModel) as raised:
        open_checkpoint(model)
    assert "has tensors that a Llama lacks: 'model.layers.0.self_attn.A'" in str(raised.value)


def test_an_adapter_beside_the_model_is_said_not_to_be_applied(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with open_checkpoint(model) as checkpoint:
        assert "LoRA adapter, which is not applied" in checkpoint.notices[0]


def test_a_checkpoint_reads_known_roles_until_it_is_closed(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.folder == model
        assert checkpoint.config.hidden_size == 32
        weights = checkpoint.read("gate", 1)
        for role, layer in (("gate", None), ("gate", 2), ("gate", -1), ("norm", 0), ("w1", 0)):
            with pytest.raises(InvalidOption, match=f"role '{role}' of layer {layer}"):
                checkpoint.read(role, layer)
    with pytest.raises(EngineClosed, match="was closed"):
        checkpoint.read("norm")
    checkpoint.close()
    assert np.isfinite(weights).all()  # arrays outlive their checkpoint


# Folders that are refused


@pytest.mark.parametrize("name", ["nothing here", "config.json"])
def test_a_path_that_is_not_a_folder_is_refused(model: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"{name}: is not a folder"):
        open_checkpoint(model / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"vocab_size": 1' + b"0" * 10_000 + b"}", "is not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"vocab_size": 10, "vocab_size": 12}', "has the field 'vocab_size' twice"),
        (b'{"rope_scaling": {"a": 1, "b": 2, "a": 1}}', "has the field 'a' twice"),
    ],
    ids=lambda value: str(value[:20]),
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_files_that_are_not_json_objects_are_refused(
    model: Path, name: str, content: bytes, message: str
) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=message) as raised:
        open_checkpoint(model)
    assert str(raised.value).startswith(str(model / name))


@pytest.mark.parametrize("constant", ["NaN", "-Infinity"])
def test_what_is_no_number_in_json_is_refused_where_it_decides_the_model(
    model: Path, constant: str
) -> None:
    (model / "config.json").write_text(f'{{"rms_norm_eps": {constant}}}')
    with pytest.raises(InvalidCheckpoint, match=f"config.json: is not JSON: {constant} is not a n"):
        open_checkpoint(model)


def test_a_folder_without_a_config_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"config\.json: is missing"):
        open_checkpoint(model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_block(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(InvalidCheckpoint, match=rf"{name}: is (missing, or|not a regular file)"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_huge_json_file_is_not_read(model: Path, name: str) -> None:
    with (model / name).open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no disk space
    with pytest.raises(InvalidCheckpoint, match=rf"{name}: has 1,099,511,627,776 bytes"):
        open_checkpoint(model)


def test_an_index_of_thousands_of_files_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(1001)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        InvalidCheckpoint, match=r"index\.json: lists 1,001 files, expected at most"
    ):
        open_checkpoint(model)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model.savetensors")
    with pytest.raises(InvalidCheckpoint) as raised:
        open_checkpoint(model)
    for name in ("model.safetensors", "pytorch_model.bin.index.json", "found config.json, model.s"):
        assert name in str(raised.value)


def test_an_index_with_a_name_twice_is_refused(sharded: tuple[Path, dict[str, str]]) -> None:
    path = sharded[0] / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "b", "a": "c"}}')
    with pytest.raises(InvalidCheckpoint, match="has the field 'a' twice"):
        open_checkpoint(sharded[0])


LORA = '{"base_model_name_or_path": "openbmb/MiniCPM-S-1B-sft"}'


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.Q4_0.gguf": "GGUF"}, "it is a GGUF model; name the file itself"),
        ({"model.onnx": "", "model.onnx_data": ""}, "it is an ONNX model; get the original"),
        ({"onnx/model.onnx": ""}, "it is an ONNX model"),
        (
            {"adapter_config.json": LORA, "adapter_model.safetensors": ""},
            "it is a LoRA adapter; merge it into 'openbmb/MiniCPM-S-1B-sft' with peft",
        ),
        ({"adapter_config.json": "[", "adapter_model.bin": ""}, "merge it into its base model"),
        (
            {"gptq_model-4bit-128g.safetensors": "", "quantize_config.json": "{}"},
            "quantised by GPTQ; get the original model, a folder with config.json and",
        ),
        ({"quant_config.json": "{}", "weights.pt": ""}, "quantised by AWQ"),
        ({"consolidated.00.pth": "", "params.json": "{}"}, "in its authors' own format; convert"),
        ({"openvino_model.xml": ""}, "an OpenVINO model"),
        ({"flax_model.msgpack": ""}, "a Flax model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_another_program_is_named(
    model: Path, has_config: bool, files: dict[str, str], message: str
) -> None:
    (model / "model.safetensors").unlink()
    if not has_config:
        (model / "config.json").unlink()
    for name, content in files.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    with pytest.raises(UnsupportedModel) as raised:
        open_checkpoint(model)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(model))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tiny.gguf", b"", "it does not begin as GGUF files do"),
        ("early", b"tjgg\3\0\0\0", "it is a file of an early llama.cpp"),
        ("tiny.onnx", b"", "it is an ONNX model"),
        ("model.safetensors", b"", "name the folder that it is in"),
        ("other", b"", "expected one with config.json and weights"),
    ],
)
def test_a_file_of_another_program_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelNotFound, match="is not a folder") as raised:
        open_checkpoint(tmp_path / name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("end", "tool"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight.absmax", "bitsandbytes"),
    ],
)
def test_quantised_tensors_are_named_even_if_the_config_does_not_say_so(
    model: Path, arrays: Arrays, save_safetensors: Save, end: str, tool: str
) -> None:
    name = "model.layers.0.self_attn.q_proj."
    arrays[name + end] = arrays.pop(name + "weight")
    save_safetensors(model / "model.safetensors", arrays)
    with pytest.raises(UnsupportedModel, match=f"the weights are quantised by {tool}"):
        open_checkpoint(model)


def test_end_tokens_come_from_generation_config(model: Path) -> None:
    path = model / "generation_config.json"
    cases = [("[2, 7]", (2, 7)), ("7", (7,)), ("null", (2,)), ("[]", (2,))]
    # An id that the model lacks cannot end an answer, and does not stop the load.
    cases += [("10", (2,)), ("[10, -1, 7]", (7,)), ('"</s>"', (2,)), ("true", (2,))]
    for value, expected in cases:
        path.write_text(f'{{"eos_token_id": {value}}}')
        with open_checkpoint(model) as checkpoint:
            assert checkpoint.config.eos_ids == expected


NAMES = ["model.embed_tokens.weight", "model.norm.weight"] + [
    f"model.layers.1.{name}.weight" for name in LAYER_ROLES.values()
]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_refused(
    model: Path, arrays: Arrays, save_safetensors: Save, name: str
) -> None:
    del arrays[name]
    save_safetensors(model / "model.safetensors", arrays)
    with pytest.raises(InvalidCheckpoint, match=rf"model\.safetensors: has no tensor '{name}'"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_refused(
    model: Path, arrays: Arrays, save_safetensors: Save, name: str
) -> None:
    expected = arrays[name].shape
    arrays[name] = arrays[name].reshape(1, *expected)
    save_safetensors(model / "model.safetensors", arrays)
    with pytest.raises(InvalidCheckpoint) as raised:
        open_checkpoint(model)
    assert f"{name!r} has shape {(1, *expected)}, expected {expected}" in str(raised.value)


def test_a_wrong_type_is_refused(model: Path, arrays: Arrays, save_safetensors: Save) -> None:
    save_safetensors(model / "model.safetensors", arrays, "I64")
    with pytest.raises(UnsupportedModel, match=r"tensor 'model\.embed_tokens\.weight' is I64"):
        open_checkpoint(model)


def test_more_layers_than_tensors_are_refused_at_once(model: Path) -> None:
    change_json(model / "config.json", num_hidden_layers=2**31 - 1)
    with pytest.raises(InvalidCheckpoint, match="has 20 tensors, too few for the 2,147,483,647"):
        open_checkpoint(model)


def test_missing_shards_of_long_names_are_named_briefly(
    sharded: tuple[Path, dict[str, str]],
) -> None:
    folder, weight_map = sharded
    moved = {name: f"{at}" * 10_000 for at, name in enumerate(weight_map)}
    save_index(folder / "model.safetensors.index.json", moved)
    with pytest.raises(InvalidCheckpoint, match="not in its folder") as raised:
        open_checkpoint(folder)
    assert len(str(raised.value)) < 1000


def test_a_missing_shard_is_refused(sharded: tuple[Path, dict[str, str]]) -> None:
    folder, _ = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match="not in its folder: 'model-00002-of-00002"):
        open_checkpoint(folder)


def test_an_index_that_lacks_a_tensor_is_refused(sharded: tuple[Path, dict[str, str]]) -> None:
    folder, weight_map = sharded
    del weight_map["model.norm.weight"]
    save_index(folder / "model.safetensors.index.json", weight_map)
    with pytest.raises(InvalidCheckpoint, match=r"index\.json: lists no tensor 'model\.norm\.w"):
        open_checkpoint(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(
    sharded: tuple[Path, dict[str, str]],
) -> None:
    folder, weight_map = sharded
    right = weight_map["model.norm.weight"]
    [wrong] = set(weight_map.values()) - {right}
    save_index(folder / "model.safetensors.index.json", {**weight_map, "model.norm.weight": wrong})
    with pytest.raises(InvalidCheckpoint, match=rf"{wrong}: has no tensor 'model\.norm\.weight'"):
        open_checkpoint(folder)


def test_shards_outside_the_folder_are_refused(sharded: tuple[Path, dict[str, str]]) -> None:
    folder, weight_map = sharded
    shard = folder / "model-00001-of-00002.safetensors"
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    inside = folder / "inner"
    inside.mkdir()
    (inside / "outside.safetensors").write_bytes(outside.read_bytes())
    for name in (
        "../outside.safetensors",
        str(outside),
        "inner/outside.safetensors",
        "./model-00002-of-00002.safetensors",
        "..",
        "",
        "a\0b",
    ):
        moved = {t: name if s == shard.name else s for t, s in weight_map.items()}
        save_index(folder / "model.safetensors.index.json", moved)
        with pytest.raises(InvalidCheckpoint, match="lists files that are not in its folder"):
            open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], "a", {"a": 1}, {"a": None}], ids=repr)
def test_broken_weight_maps_are_refused(
    sharded: tuple[Path, dict[str, str]], weight_map: object
) -> None:
    folder, _ = sharded
    save_index(folder / "model.safetensors.index.json", weight_map)
    with pytest.raises(InvalidCheckpoint, match="expected an object weight_map"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_without_a_mapping_a_file_that_shrinks_is_an_error(
    model: Path, arrays: Arrays, save_safetensors: Save, kind: str
) -> None:
    if kind == "bin":
        torch = pytest.importorskip("torch")
        name = "pytorch_model.bin"
        tensors = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
        (model / "model.safetensors").unlink(missing_ok=True)
        torch.save(tensors, model / name)
    else:
        name = "model.safetensors"
        save_safetensors(model / name, arrays)
    with open_checkpoint(model) as mapped, open_checkpoint(model, use_mmap=False) as read:
        for role, layer in (("embedding", None), ("gate", 0), ("down", 1), ("norm", None)):
            np.testing.assert_array_equal(read.read(role, layer), mapped.read(role, layer))
        os.truncate(model / name, 2000)
        last = read.config.n_layers - 1
        with pytest.raises(InvalidCheckpoint, match="became shorter"):
            [read.read(role, last) for role in ("q", "gate", "up", "down")]
