"""A folder that we write is what transformers and hybrid read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from exporting_models import TEXT, config_of, export, fp32_logits, greedy
from gguf_files import vocabulary_of, write_gguf
from safetensors.numpy import load_file
from slow import slow_except
from tiny_models import STORIES, write_chatml_model, write_model

from hybrid.errors import InvalidOption, NumericOverflow
from hybrid.exporting import hf_folder
from hybrid.text.tokenizer import Tokenizer

LAYOUT = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
VOCABULARY = vocabulary_of(LAYOUT)
RELU = tiny_models.LLAMA | {"vocab_size": 4096, "hidden_act": "relu"}


def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def encoded(model: Path) -> list[int]:
    tokenizer = Tokenizer.from_folder(model, vocab_size=4096, bos_id=1)
    return tokenizer.encode(TEXT)


@pytest.mark.parametrize("kind", slow_except(["f32", "f16", "bf16"], "bf16"))
def test_transformers_computes_the_logits_of_a_gguf_file(tmp_path, kind):
    model = write_model(tmp_path / "model", **RELU)
    source = write_gguf(
        tmp_path / "source.gguf",
        model,
        vocabulary=VOCABULARY,
        metadata={"hybrid.activation": "relu"},
    )
    out = tmp_path / "out"
    exported = export(source, "hf", out, kind)
    assert exported.is_same_elsewhere
    ids = encoded(source)
    assert encoded(out) == ids
    np.testing.assert_allclose(
        transformers_logits(out, ids), fp32_logits(source, ids), rtol=0, atol=2e-4
    )


def test_transformers_computes_a_folded_minicpm_with_relu(tmp_path):
    model = write_model(tmp_path / "model", vocab_size=4096, hidden_act="relu")
    out = tmp_path / "out"
    export(model, "hf", out, "f32", is_folded=True)
    ids = encoded(model)
    np.testing.assert_allclose(
        transformers_logits(out, ids), fp32_logits(model, ids), rtol=0, atol=2e-4
    )


def test_a_folders_own_files_are_kept(tmp_path):
    model = write_chatml_model(tmp_path / "model", rope_theta=5000.0)
    (model / "modeling_minicpm.py").write_text("# code\n")
    (model / "generation_config.json").write_text('{"top_p": 0.8}')
    (model / "notes.txt").write_text("private")
    out = tmp_path / "out"
    export(model, "hf", out)
    added = {"torch_dtype": "bfloat16", "tie_word_embeddings": True}
    assert config_of(out) == config_of(model) | added
    names = {path.name for path in model.iterdir()} - {"notes.txt"}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    for kind in ("bf16", "f32"):
        export(model, "hf", out, kind, may_replace=True)
        assert greedy(out, quant="bf16") == greedy(model, quant="bf16")


def test_a_minicpm_in_gguf_keeps_its_scales(tmp_path):
    model = write_model(tmp_path / "model", vocab_size=4096)
    export(model, "gguf", tmp_path / "tiny.gguf", "f32")
    export(tmp_path / "tiny.gguf", "hf", tmp_path / "out", "f32")
    config = config_of(tmp_path / "out")
    assert config["architectures"] == ["MiniCPMForCausalLM"]
    assert config["scale_emb"] == 3.0
    assert config["scale_depth"] == pytest.approx(1.4)
    assert config["dim_model_base"] == pytest.approx(48)
    assert (config["hidden_act"], config["hidden_act_param"]) == ("fatrelu", 0.1)
    logits = fp32_logits(tmp_path / "out")
    np.testing.assert_allclose(logits, fp32_logits(model), rtol=0, atol=1e-5)


def test_weights_are_cut_into_files_only_if_they_are_large(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model")
    monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 100_000)
    export(model, "hf", tmp_path / "out", "f32")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    found = {k: v for name in names for k, v in load_file(tmp_path / "out" / name).items()}
    expected = load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    export(tmp_path / "out", "hf", tmp_path / "again", "f32")
    monkeypatch.undo()
    export(model, "hf", tmp_path / "again", "f32", may_replace=True)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path):
    model = write_model(tmp_path / "model")
    out = tmp_path / "out"
    export(model, "hf", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InvalidOption, match=r"out: exists already; .*--force"):
        export(model, "hf", out)
    tiny_models.scale_weights(model, {"norm.weight": 1e30})
    with pytest.raises(NumericOverflow, match="too large for F16"):
        export(model, "hf", out, "f16", may_replace=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_empty_folder_is_no_hindrance(tmp_path):
    model = write_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    export(model, "hf", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
