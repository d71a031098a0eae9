"""hybrid.export as a command: its line, and mistakes in one line each."""

from __future__ import annotations

import errno
import os
import re

import pytest
from tiny_models import LLAMA, write_model

from hybrid import export


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", vocab_size=4096, **LLAMA)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = export.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_line_says_what_was_written_and_what_runs_it(model, tmp_path, capsys):
    out = tmp_path / "a b.gguf"
    code, text, _ = run(capsys, "-m", model, "--to", "gguf", "--type", "q8_0", out)
    assert code == 0
    shown = re.escape(str(out))
    assert re.fullmatch(
        rf"{shown}: [\d.]+ MB, Q8_0; run it with hybrid run -m '{shown}', "
        rf"or llama\.cpp: llama-cli -m '{shown}'\n",
        text,
    )
    assert out.stat().st_size / 1e6 == pytest.approx(float(text.split(": ")[1].split()[0]), abs=0.1)


def test_a_fatrelu_model_is_not_said_to_run_elsewhere(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    out = tmp_path / "a.gguf"
    code, text, notes = run(capsys, "-m", model, "--to", "gguf", "--no-tokenizer", out)
    assert code == 0
    assert "llama-cli" not in text
    assert "note: this model needs fatrelu 0.1" in notes
    assert "SiLU" in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gguf", "--type", "q5_0", "OUT"], "--type: invalid choice"),
        (["--to", "onnx", "OUT"], "--to: invalid choice"),
        (["OUT"], "required: --to"),
        (["--to", "gguf"], "required: OUT"),
        (["--to", "hf", "--type", "q4_0", "OUT"], "--type q4_0: hf is written as bf16, f32, f16"),
        (["--to", "powerinfer", "--type", "bf16", "OUT"], "powerinfer is written as f16, q4_0"),
        (["--to", "gguf", "OUT/none/a.gguf"], "there is no folder"),
        (["--to", "gguf", "MODEL"], "is the model that is read"),
        (["--to", "hf", "--force", "MODEL"], "is the model that is read"),
        (["--to", "gguf", "--force", "MODEL/model.safetensors"], "is the model that is read"),
        (["--to", "gguf", "MODEL/config.json"], "exists already; choose another name, or --force"),
        (["--to", "hf", "--force", "MODEL/config.json"], "expected the name of a folder"),
        (["-m", "synthetic:MiniCPM-S-1B", "--to", "gguf", "OUT"], "is synthetic"),
        (["-m", "no-such-model", "--to", "gguf", "OUT"], "no model 'no-such-model'"),
        (["--activation", "relu", "--to", "gguf", "OUT"], "activation: it is for GGUF files"),
        (["--recall", "2", "--to", "powerinfer", "OUT"], "recall: expected a value between"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    model, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    before = sorted(tmp_path.rglob("*"))
    names = {"OUT": str(tmp_path / "out"), "MODEL": str(model)}
    given = [
        option.replace("OUT", names["OUT"]).replace("MODEL", names["MODEL"])
        if option.startswith(("OUT", "MODEL"))
        else option
        for option in options
    ]
    given = given if "-m" in given else ["-m", str(model), *given]
    code, text, error = run(capsys, *given)
    assert code in (1, 2)
    assert not text
    assert message in error
    assert len(error.strip().splitlines()) == 1
    left = [path for path in sorted(tmp_path.rglob("*")) if "home" not in path.parts]
    assert left == [path for path in before if "home" not in path.parts]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no space")
@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_full_disk_is_one_line(model, tmp_path, capsys, monkeypatch, target):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    code, _, error = run(capsys, "-m", model, "--to", target, tmp_path / "out")
    assert code == 1
    assert error.strip().endswith("out: cannot be written: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
