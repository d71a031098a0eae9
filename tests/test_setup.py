"""hybrid.setup makes a profile, a predictor and a plan. A second run does nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_models import write_model

import hybrid
import hybrid.setup
from hybrid.engine.loading.planning import plan_path
from hybrid.setup import main


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def setup(*arguments: str) -> int:
    return main(["--trace-budget", "64MiB", *arguments])


@pytest.mark.slow
def test_setup_makes_a_model_ready(home, capsys):
    model = "synthetic:tiny"
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.neuron_orders is None
        assert any("hybrid.setup" in notice for notice in engine.notices)
    assert setup("-m", model) == 0
    out = capsys.readouterr().out
    for line in ("to do      profile, predictor", "selfcheck  done", "profile    done"):
        assert line in out
    assert "predictor  done" in out
    assert "plan       " in out
    assert "--predictor auto" in out
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.neuron_orders is not None
        # Which kind pays depends on this machine. If none does, a notice says so.
        prediction = engine.prediction
        assert prediction is not None
        if prediction.n_predicted_layers < engine.config.n_layers:
            assert any("no predictor pays" in notice for notice in engine.notices)
    assert not list((home / "setup").iterdir())
    files = {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")}
    assert setup("-m", model) == 0
    assert "everything is there already" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")}
    assert setup("-m", model, "--redo", "--no-predictor") == 0
    assert [path.parent.name for path in home.rglob("*.safetensors")].count("predictors") == 0


@pytest.mark.slow
def test_without_torch_no_predictor_is_trained(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` fails
    assert setup("-m", "synthetic:tiny") == 0
    out = capsys.readouterr().out
    assert "predictor  none: training needs torch: pip install 'hybrid-inference[train]'\n" in out
    assert "to do      profile: about" in out
    assert "--predictor auto" not in out
    assert not (home / "predictors").exists()
    assert setup("-m", "synthetic:tiny") == 0
    assert "everything is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_setup_continues(home, tmp_path, capsys, monkeypatch):
    from hybrid import setup as module

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(module, "train", interrupt)
        assert setup("-m", "synthetic:tiny") == 130
    assert "profile    done" in capsys.readouterr().out
    assert setup("-m", "synthetic:tiny") == 0
    out = capsys.readouterr().out
    assert "to do      predictor" in out
    with hybrid.load("synthetic:tiny", predictor="auto") as engine:
        assert engine.prediction is not None


def test_the_bundled_profile_needs_no_recording(home, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. The cat was happy. " * 40)
    assert setup("-m", "stories", "--no-predictor") == 0
    assert not (home / "profiles").exists()
    assert setup("-m", "stories", "--text", str(text), "--max-tokens", "300") == 0
    assert len(list((home / "profiles").iterdir())) == 1
    assert "ready in" in capsys.readouterr().out


def test_what_cannot_be_set_up_gives_one_line_of_error(home, tmp_path, capsys):
    silu = write_model(tmp_path / "m", vocab_size=4096, hidden_act="silu", hidden_act_param=None)
    assert setup("-m", str(silu)) == 2
    assert "nothing to skip" in capsys.readouterr().err
    assert setup("-m", "no-such-model") == 1
    assert "no-such-model" in capsys.readouterr().err
    assert main(["-m", "synthetic:tiny", "--trace-budget", "900TiB"]) == 2
    error = capsys.readouterr().err
    assert "GB are free" in error
    assert error.count("\n") == 1


def test_run_recommends_setup(home):
    code = "from hybrid.run import main; main(['-m', 'synthetic:tiny', '-p', 'x', '-n', '2'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python -m hybrid.setup" in done.stderr
    assert json.dumps(done.stdout)


def test_setup_for_another_kv_cache_keeps_the_plan(home, capsys):
    args = hybrid.setup.parse_arguments(["-m", "stories", "--kv", "bf16"])
    with hybrid.load("stories") as engine:
        path = plan_path(home, engine.spec)
    path.parent.mkdir(parents=True)
    path.write_text("a plan")
    assert not hybrid.setup.make_plan(args)
    assert path.read_text() == "a plan"
    assert "the GPU has no KV cache in bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_setup_ends_with_a_plan(home, capsys, monkeypatch):
    pytest.importorskip("torch")
    from hybrid.engine.gpu import measurement
    from hybrid.engine.gpu.device import HostDevice
    from hybrid.engine.loading import planning
    from hybrid.placement.machine import GpuSpeeds

    speeds = GpuSpeeds("a GPU", 64 << 20, 0, 400.0, 250.0, 0.0, 0.1, "synchronise")
    monkeypatch.setattr(planning, "open_device", HostDevice)
    monkeypatch.setattr(measurement, "measure_gpu", lambda *_, **__: speeds)
    options = ("-m", "synthetic:tiny", "--no-predictor")
    assert setup(*options, "--vram-budget", "0") == 0
    out = capsys.readouterr().out
    assert "plan       all on the CPU: as requested" in out
    assert "exact, the plan" not in out
    assert setup(*options) == 0
    out = capsys.readouterr().out
    assert "plan       on the GPU all layers and the head" in out
    assert "--predictor exact, the plan" in out
    with hybrid.load("synthetic:tiny") as engine:
        assert engine.plan.is_all_on_gpu
