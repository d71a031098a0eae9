"""lm-evaluation-harness measures a model over HTTP, and gets the score of `hybrid eval choices`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_items import write_items
from http_client import serving
from tiny_models import STORIES

import hybrid
from hybrid.evaluation import measure_choices, read_questions

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra `clients`")
pytest.importorskip("tenacity", reason="its part for APIs: the extra `clients`")
pytestmark = pytest.mark.slow


def tokenizer_folder(folder: Path) -> Path:
    """Return the bundled model's tokenizer as transformers reads it."""
    folder.mkdir()
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((STORIES / name).read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_local_completions_has_the_same_score(tmp_path):
    file = write_items(tmp_path / "piqa.jsonl", "piqa", 30)
    (original,) = (Path(lm_eval.__file__).parent / "tasks").glob("*/piqa.yaml")
    task = {
        "include": str(original),
        "task": "our_piqa",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "training_split": None,
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "our_piqa.yaml").write_text(json.dumps(task))  # JSON is YAML
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    with hybrid.load("stories", threads=2) as engine, serving(engine) as client:
        expected = measure_choices(engine, read_questions(file, "piqa"))
        has_bos = bool(engine.tokenizer.bos)
        address = f"http://127.0.0.1:{client.port}/v1/completions"
        model = f"model=stories,base_url={address},tokenizer_backend=huggingface"
        model += f",tokenizer={tokenizer},add_bos_token={has_bos},num_concurrent=4,max_length=512"
        out = tmp_path / "out"
        run = subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
            + ["--model_args", model, "--tasks", "our_piqa", "--include_path", tmp_path / "tasks"]
            + ["--output_path", out],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    (results,) = out.rglob("results*.json")
    scores = json.loads(results.read_text())["results"]["our_piqa"]
    assert scores["acc,none"] == pytest.approx(expected.plain, abs=1e-9)
    assert scores["acc_norm,none"] == pytest.approx(expected.normalised, abs=1e-9)
    assert 0.2 < expected.plain < 1
