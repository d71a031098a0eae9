"""Without --quant, the type of most weights of a GGUF file decides; --quant decides otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import vocabulary_of, write_gguf
from tiny_models import LLAMA, STORIES, write_model

import hybrid
from hybrid import bench, eval, run, selfcheck
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.gguf.blocks import BLOCK_TYPES
from hybrid.checkpoint.gguf.stored_types import usual_format
from hybrid.engine.loading.model_spec import read_model_spec
from hybrid.engine.options import LoadOptions
from hybrid.kernels import Format
from hybrid.notices import Notices
from hybrid.placement import hardware

gguf = pytest.importorskip("gguf", reason="gguf")

NEWER = ("IQ4_NL", "IQ4_XS", "MXFP4")
USUAL = {
    "bf16": ("BF16",),
    "f16": ("F16",),
    "q8": ("Q8_0", "F32", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", *NEWER),
    "q4": ("Q4_0", "Q2_K", "Q3_K"),
}
VOCABULARY = vocabulary_of(json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 16}
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder, vocab_size=4096, **LLAMA, **shape)


@pytest.fixture(scope="module", params=["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0"])
def file(request: pytest.FixtureRequest, model: Path) -> tuple[Path, str, str]:
    """Return a file, its type and the format that suits it."""
    kind = request.param
    path = write_gguf(model / f"tiny.{kind}.gguf", model, kind, vocabulary=VOCABULARY)
    return path, kind, next(format for format, types in USUAL.items() if kind in types)


def test_every_type_that_is_read_has_a_usual_format() -> None:
    expected = {kind: format for format, kinds in USUAL.items() for kind in kinds}
    assert expected.keys() == {kind.name for kind in BLOCK_TYPES.values()}
    for kind, format in expected.items():
        assert usual_format({kind: 1}).name == format


def test_most_weights_decide() -> None:
    assert usual_format({"Q6_K": 100, "Q4_0": 101, "F32": 5}) is Format.q4
    assert usual_format({"Q6_K": 102, "Q4_0": 101, "F32": 5}) is Format.q8


def test_the_usual_format_runs_and_is_said(file: tuple[Path, str, str]) -> None:
    path, kind, format = file
    with hybrid.load(path, threads=1) as engine:
        assert engine.quant == format
        (said,) = (notice for notice in engine.notices if "stored as" in notice)
        n_bytes = engine.spec.layout.n_bytes
    smaller = {"q8": "q4", "q4": None}.get(format, "q8")
    advice = f" (--quant {smaller} takes about half of it and is faster)" if smaller else ""
    assert said == (
        f"{path.name}: its weights are stored as {kind}; they run as {format} in "
        f"{n_bytes / 1e6:.0f} MB{advice}"
    )


def test_quant_wins(file: tuple[Path, str, str], format: Format) -> None:
    path, kind, usual = file
    with open_checkpoint(path, format) as checkpoint:
        assert checkpoint.format is format
        said = [notice for notice in checkpoint.notices if "stored as" in notice]
    line = f"{path.name}: its weights are stored as {kind} and packed to {format.name} (--quant)"
    is_same = kind not in ("F32", "Q5_0") and format.name == usual
    assert said == ([] if is_same else [line])


def test_other_models_have_one_default(model: Path) -> None:
    for folder in (model, "stories"):
        with hybrid.load(folder, threads=1) as engine:
            assert engine.quant == "q8"
            assert not any("stored as" in notice for notice in engine.notices)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.format is None


def test_every_command_runs_the_same_format(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "STREAM_BYTES", 8 << 20)
    path = write_gguf(tmp_path / "commands.gguf", model, "F16", vocabulary=VOCABULARY)
    (text := tmp_path / "text").write_text("Once upon a time.")
    for main, arguments in (
        (run.main, ["-p", "Once", "-n", "2", "--json"]),
        (eval.main, ["perplexity", "--text", str(text), "--json"]),
        (bench.main, ["-n", "4", "--runs", "1", "--long-context", "8"]),
        (selfcheck.main, ["--json"]),
    ):
        command = arguments[:1] if main is eval.main else []
        assert main([*command, "-m", str(path), *arguments[len(command) :]]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["quant"] == "f16"
    spec = read_model_spec(path, LoadOptions(), home=None, notices=Notices())
    assert spec.format is Format.f16


def test_f16_runs_on_the_cpu_if_the_user_did_not_choose_it(tmp_path: Path, model: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", model, "F16", vocabulary=VOCABULARY)
    with hybrid.load(path, vram_budget=1 << 30, threads=1) as engine:
        assert not engine.uses_gpu
        line = "the GPU has no kernels for f16 weights, only for bf16, q8, q4 (--quant): everything"
        assert any(notice.startswith(line) for notice in engine.notices)
    with pytest.raises(hybrid.DeviceUnavailable, match="no kernels for f16"):
        hybrid.load(path, device="cuda", threads=1)
