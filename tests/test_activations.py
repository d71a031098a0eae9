"""`hybrid selfcheck` names the activation of a GGUF file that records none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf_files import vocabulary_of, write_gguf
from safetensors.numpy import save_file
from tiny_models import STORIES, write_model

from hybrid import selfcheck
from hybrid.checking.activations import Attempt, Attempts
from hybrid.checkpoint.json_file import read_object
from hybrid.checkpoint.safetensors import SafetensorsFile


def write_stories(path: Path) -> Path:
    """Write the bundled model as a GGUF file. It has FATReLU, which the file does not say."""
    weights = SafetensorsFile(STORIES / "model.safetensors")
    folder = path.parent / "stories"
    folder.mkdir()
    shutil.copy(STORIES / "config.json", folder)
    tensors = {name: weights.tensor(name).fp32() for name in weights.names}
    save_file(tensors, folder / "model.safetensors")
    vocabulary = vocabulary_of(read_object(STORIES / "tokenizer.json"))
    return write_gguf(path, folder, vocabulary=vocabulary)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, dict[str, dict[str, object]]]:
        code = selfcheck.main([*arguments, "--json", "-t", "1"])
        checks = json.loads(capsys.readouterr().out)["checks"]
        return code, {check["name"]: check for check in checks}

    return run


def test_the_bundled_model_under_a_neutral_name_is_found_to_have_relu(tmp_path, report):
    path = write_stories(tmp_path / "tale.gguf")
    code, checks = report("-m", str(path))
    found = checks["activation"]
    assert code == 1
    assert found["verdict"] == "failed"  # SiLU would be taken
    assert " relu fits" in found["message"]
    assert "silu does not" in found["message"]
    assert found["advice"].endswith("--activation relu")
    assert found["figures"]["perplexity_silu"] > 10 * found["figures"]["perplexity_relu"]
    assert found["figures"]["active_silu"] == 1.0


def test_a_file_that_is_refused_is_checked_with_the_activation_that_fits(tmp_path, report):
    path = write_stories(tmp_path / "sparse-tale.gguf")
    code, checks = report("-m", str(path))
    assert code == 0
    assert checks["activation"]["verdict"] == "warning"
    assert checks["architecture"]["figures"]["activation"] == "relu"
    assert checks["oracle"]["verdict"] == "ok"


def test_a_chosen_threshold_is_tried_too_and_shown(tmp_path, capsys):
    path = write_stories(tmp_path / "tale.gguf")
    assert selfcheck.main(["-m", str(path), "--activation", "fatrelu:0.32", "-t", "1"]) == 0
    shown = capsys.readouterr().out
    assert "cannot tell relu, fatrelu:0.01, fatrelu:0.03, fatrelu:0.32" in shown
    assert "fatrelu:0.32 " in shown.split("perplexity", 1)[1]


def test_a_published_model_is_found_to_have_silu(tmp_path, report, shared_data):
    folder = shared_data / "models" / "stories260K" / "hf"
    layout = read_object(folder / "tokenizer.json")
    path = write_gguf(tmp_path / "tale.gguf", folder, vocabulary=vocabulary_of(layout))
    _, checks = report("-m", str(path))
    assert checks["activation"]["verdict"] == "ok"
    assert " silu fits" in checks["activation"]["message"]


def test_a_random_model_has_no_activation_that_fits(tmp_path, report):
    model = write_model(tmp_path / "model", vocab_size=4096)
    layout = read_object(STORIES / "tokenizer.json")
    path = write_gguf(tmp_path / "my-relu.gguf", model, vocabulary=vocabulary_of(layout))
    code, checks = report("-m", str(path))
    assert code == 1
    assert list(checks) == ["activation"]
    assert "none fits well" in checks["activation"]["message"]


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([("silu", 10, 1.0), ("relu", 200, 0.4)], "silu"),
        ([("silu", 200, 1.0), ("relu", 10, 0.4), ("fatrelu:0.01", 9.9, 0.3)], "relu"),
        ([("silu", 200, 1.0), ("relu", 12, 0.4), ("fatrelu:0.01", 10, 0.3)], "fatrelu:0.01"),
        ([("silu", 14, 1.0), ("relu", 10, 0.4)], None),
        ([("silu", 200, 1.0), ("relu", 10, 0.7)], None),  # more fire than in any such model
        ([("silu", 2000, 1.0), ("relu", 100, 0.4)], None),  # guessing would be hardly worse
        ([("silu", float("inf"), 1.0), ("relu", float("inf"), 0.0)], None),
    ],
)
def test_the_activation_that_fits(tried, expected):
    found = Attempts(tuple(Attempt(*each) for each in tried), 64, 4096).fitting
    assert (found and found.activation) == expected
