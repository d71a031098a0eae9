"""hybrid inspect says what a model is, runs it or not, and finds what is broken in its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import vocabulary_of, write_gguf
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA, STORIES, write_chat_model, write_model

import hybrid
from hybrid import inspect

VOCABULARY = vocabulary_of(json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8")))


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert inspect.main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    folder = tmp_path_factory.mktemp("llama") / "model"
    return write_model(folder, vocab_size=4096, **LLAMA | shape)


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, "stories")
    assert found["runs"]
    assert found["kind"].startswith("bundled with hybrid")
    with hybrid.load("stories") as engine:
        config = engine.config
        assert found["running"]["quant"] == engine.quant
        assert found["packed_bytes"][engine.quant] == engine.stats.weight_bytes
    shapes = {key: found["shapes"][key] for key in ("layers", "hidden", "neurons", "kv_heads")}
    assert list(shapes.values()) == [
        config.n_layers,
        config.hidden_size,
        config.n_neurons,
        config.n_kv_heads,
    ]
    assert found["activation"] == {
        "name": "fatrelu",
        "threshold": pytest.approx(0.32),
        "source": "config.json",
    }
    (row,) = found["types"]
    assert (row["type"], row["bits_per_weight"], row["weights"]) == (
        "BF16",
        16.0,
        found["parameters"],
    )
    assert 0.9 < found["sparsity"]["published"] < 1
    assert found["tokenizer"]["size"] == config.vocab_size
    assert found["content"] is None


def test_the_page_fits_and_names_what_a_newcomer_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["stories"]) == 0
    page = capsys.readouterr().out
    names = {line[:13].strip() for line in page.splitlines()}
    expected = {"model", "kind", "architecture", "shapes", "weights", "activation", "tokenizer"}
    assert expected | {"packed", "KV cache", "runs"} <= names
    assert all(len(line) <= inspect.WIDTH for line in page.splitlines() if "hybrid run" not in line)
    assert 'hybrid run -m stories -p "Once upon a time"' in page


def test_a_gguf_file_and_what_it_runs_as(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, "Q4_0", vocabulary=VOCABULARY)
    found = inspected(capsys, str(path))
    assert found["kind"] == "GGUF version 3"
    assert found["running"]["quant"] == "q4"
    assert {row["type"] for row in found["types"]} == {"Q4_0", "F32"}
    assert found["activation"]["name"] == "silu"
    assert "a guess" in found["activation"]["source"]
    blob = tmp_path / "sha256-0123"  # as ollama keeps files
    shutil.copy(path, blob)
    assert inspected(capsys, str(blob))["runs"]


def test_the_predictors_of_powerinfers_files(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.gguf"
    write_gguf(path, llama, "F16", vocabulary=VOCABULARY, predictor_ranks=(8, 4))
    found = inspected(capsys, str(path))
    assert found["kind"] == "PowerInfer's GGUF version 3"
    assert found["predictors"] == [{"source": "PowerInfer's format", "ranks": [8, 4]}]
    assert found["activation"]["name"] == "relu"


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("relu-model", {}, "hints at ReLU"),
        ("x", {"general.architecture": "bamboo"}, "dReLU"),
        ("x", {"llama.rope.scaling.type": "yarn"}, "scaled rotary positions"),
    ],
)
def test_a_model_that_does_not_run_is_inspected_all_the_same(
    tmp_path: Path,
    llama: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    metadata: Any,
    message: str,
) -> None:
    path = write_gguf(tmp_path / f"{name}.gguf", llama, vocabulary=VOCABULARY, metadata=metadata)
    found = inspected(capsys, str(path))
    assert not found["runs"]
    assert message in found["refused"]
    assert found["types"]
    with pytest.raises(hybrid.HybridError) as refused:
        hybrid.load(path)
    assert str(refused.value) == found["refused"]


def test_a_folder_without_weights(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    found = inspected(capsys, str(folder))
    assert "has no weights" in found["refused"]
    assert found["architecture"] == "LlamaForCausalLM"


def test_verify_hashes_each_tensor_and_finds_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_chat_model(tmp_path / "model")
    sound = inspected(capsys, str(folder), "--verify")["content"]
    assert {content["not_finite"] for content in sound} == {0}
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    changed = weights[name].copy()
    changed[0, :3] = 0x7FC0 if changed.dtype == np.uint16 else np.nan  # NaN in bf16
    save_file(weights | {name: changed}, folder / "model.safetensors")
    broken = inspected(capsys, str(folder), "--verify", code=1)["content"]
    different = [old["name"] for old, new in zip(sound, broken, strict=True) if old != new]
    assert different == [name]
    assert next(each for each in broken if each["name"] == name)["not_finite"] == 3
    assert inspect.main([str(folder), "--verify"]) == 1
    assert "1 have values that are NaN or infinite" in capsys.readouterr().out


def test_names_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = inspected(capsys, "ProSparse-7B")
    assert "not on this machine" in found["kind"]
    assert "downloads it" in found["refused"]
    assert inspect.main(["no such model"]) == 1
    assert "no model 'no such model'" in capsys.readouterr().err
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03")
    assert inspect.main([str(tmp_path / "x.gguf")]) == 1
    assert "x.gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        inspect.main([])
