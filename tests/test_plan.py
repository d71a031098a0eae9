"""hybrid.plan prints, explains and saves plans, and refuses bad options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_model

from hybrid.placement.plan import load_plan
from hybrid.plan import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def fast_gpu(tmp_path: Path) -> str:
    """Write a hardware file with a GPU so fast that it pays even for a small model."""
    path = tmp_path / "my pc.json"
    gpu = {"name": "mine", "vram_bytes": 1 << 30, "context_bytes": 1 << 20}
    gpu |= {"stream_gbs": 900, "gather_gbs": 600, "node_us": 0, "hand_off_us": 0.1}
    path.write_text(json.dumps({"gpu": gpu}))
    return str(path)


def test_plans_are_explained(tmp_path, capsys):
    hardware = fast_gpu(tmp_path)
    options = ["-c", "256", "--vram-budget", "7MiB", "--hardware", hardware, "--explain"]
    assert main([*options, "--save", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    for line in ("GPU     mine: streams 900 GB/s", "CPU only", "whole layers", "hybrid", "head"):
        assert line in out
    assert "CUDA takes 1 and torch 0" in out
    plan = load_plan(tmp_path / "plan.json")
    assert plan.uses_gpu
    assert plan.vram_bytes + (1 << 20) <= 7 << 20


def test_what_is_not_read_of_a_model_is_said(tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra": np.ones(4, np.float32)}, folder / "model.safetensors")
    assert main(["-m", str(folder), "--hardware", "ddr4-rtx3050"]) == 0
    assert "note: tensors for which config.json has no place" in capsys.readouterr().err


def test_json_output_for_a_modelled_machine(capsys):
    assert main(["--hardware", "ddr4-rtx3050", "--vram-budget", "1g", "--json"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert summary["machine"]["is_modelled"]
    assert set(summary["predicted_tps"]) >= {"CPU only"}
    assert "modelled, not measured" in shown.err


@pytest.mark.slow
def test_a_plot_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "tps.png"
    hardware = fast_gpu(tmp_path)
    assert main(["--hardware", hardware, "-c", "256", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert main(["--hardware", hardware, "--plot", str(tmp_path / "none" / "tps.png")]) == 2
    assert "--plot" in capsys.readouterr().err


def test_a_budget_of_zero_puts_everything_on_the_cpu(capsys):
    assert main(["--hardware", "ddr5-rtx4060", "--vram-budget", "0"]) == 0
    out = capsys.readouterr().out
    assert "all on the CPU" in out
    assert "\nwhole layers" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vram-budget", "much"], "expected an amount"),
        (["--vram-budget", "-1GiB"], "expected"),
        (["--hardware", "cray"], "expected a JSON file, or one of ddr4-gtx1650"),
        (
            ["--hardware", "ddr4-rtx3050", "--quant", "f16"],
            "the GPU has no kernels for f16 weights",
        ),
        (["-c", "0"], "context_size"),
        (["-m", "none/such"], "none/such"),
    ],
)
def test_bad_options_give_one_line_of_error(options, message, capsys):
    with pytest.raises(SystemExit) if "-budget" in options[0] else _returns():
        assert main([*options, "--offline"]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


class _returns:
    """Stands in for pytest.raises if main() returns instead of raising SystemExit."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_broken_hardware_files_are_named(tmp_path, capsys):
    path = tmp_path / "pc.json"
    path.write_text('{"cpu": {"stream_gbs": -3}}')
    assert main(["--hardware", str(path)]) == 1
    assert f"{path}: cpu.stream_gbs" in capsys.readouterr().err
