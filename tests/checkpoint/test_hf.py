"""Folders in Hugging Face's layout are read exactly; broken ones are refused with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def test_a_tied_head_is_the_embedding(model: Path, arrays: Arrays, save_safetensors: Save) -> None:
    stray = {**arrays, "lm_head.weight": np.zeros((10, 32), np.float32)}
    save_safetensors(model / "model.safetensors", stray)
    with open_checkpoint(model) as checkpoint:  # tied, whatever the file holds
        np.testing.assert_array_equal(checkpoint.read("head"), arrays["model.embed_tokens.weight"])


def test_an_untied_head_is_its_own(model: Path, arrays: Arrays, save_safetensors: Save) -> None:
    change_config(model, tie_word_embeddings=False)
    with pytest.raises(InvalidCheckpoint, match=r"has no tensor 'lm_head\.weight'"):
        open_checkpoint(model)
    arrays["lm_head.weight"] = -arrays["model.embed_tokens.weight"]
    save_safetensors(model / "model.safetensors", arrays)
    assert_reads(model, arrays)


def test_a_llama_with_wide_heads_is_read(
    model: Path, arrays: Arrays, save_safetensors: Save
) -> None:
    change_config(
        model, architectures=["LlamaForCausalLM"], hidden_act="relu", head_dim=16, vocab_size=12
    )
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


def test_extra_tensors_are_ignored(model: Path, arrays: Arrays, save_safetensors: Save) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_safetensors(model / "model.safetensors", {**arrays, **extra})
    assert_reads(model, arrays)


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
        (b"", "is not readable as JSON"),
        (b"{", "is not readable as JSON"),
        (b"\xff{}", "is not readable as JSON"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a JSON number"),
        (b'{"rms_norm_eps": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 100_000, "is not readable as JSON"),
        (b'{"vocab_size": 1' + b"0" * 10_000 + b"}", "is not readable as JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
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


def test_a_folder_without_a_config_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"config\.json: is missing"):
        open_checkpoint(model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_does_not_block(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(InvalidCheckpoint, match=rf"{name}: is missing, or"):
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
    (model / "model.safetensors").rename(model / "model.gguf")
    with pytest.raises(InvalidCheckpoint) as raised:
        open_checkpoint(model)
    for name in ("model.safetensors", "pytorch_model.bin.index.json", "found config.json, model.g"):
        assert name in str(raised.value)


def test_end_tokens_come_from_generation_config(model: Path) -> None:
    path = model / "generation_config.json"
    for content, expected in (('{"eos_token_id": [2, 7]}', (2, 7)), ("{}", (2,))):
        path.write_text(content)
        with open_checkpoint(model) as checkpoint:
            assert checkpoint.config.eos_ids == expected
    path.write_text('{"eos_token_id": 10}')
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json: eos_token_id is 10"):
        open_checkpoint(model)


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
