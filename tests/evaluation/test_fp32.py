"""fp32 perplexity equals that of Hugging Face transformers, on the bundled model as a Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from folded_llama import folded_stories

import hybrid
from hybrid import eval
from hybrid.evaluation.perplexity import windows

torch = pytest.importorskip("torch", reason="the other implementation needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

TEXT = Path(__file__).parents[1] / "data" / "held_out_story.txt"


@pytest.fixture(scope="module")
def llama():
    return folded_stories()


def perplexity_of(llama, window: int, stride: int) -> float:
    with hybrid.load("stories") as engine:
        ids = engine.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    nats = 0.0
    for first, scored, last in windows(len(ids), window, stride):
        part = torch.tensor(ids[first:last])[None]
        with torch.no_grad():
            losses = torch.log_softmax(llama(part).logits[0].double(), -1)
        targets = torch.arange(scored, last)
        nats -= float(losses[targets - first - 1, part[0, targets - first]].sum())
    return math.exp(nats / (len(ids) - 1))


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (64, 40)])
def test_perplexity_equals_transformers(llama, capsys, window, stride):
    arguments = ["perplexity", "--quant", "fp32", "--text", str(TEXT), "--json"]
    assert eval.main([*arguments, "--window", str(window), "--stride", str(stride)]) == 0
    actual = json.loads(capsys.readouterr().out)["perplexity"]
    assert actual == pytest.approx(perplexity_of(llama, window, stride), abs=1e-3)


@pytest.mark.parametrize(
    ("quant", "bound"), [("bf16", 0.01), ("f16", 0.001), ("q8", 0.02), ("q4", 0.10)]
)
@pytest.mark.slow
def test_formats_are_near_fp32(capsys, quant, bound):
    found = []
    for name in ("fp32", quant):
        assert eval.main(["perplexity", "--quant", name, "--text", str(TEXT), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert np.log(found[1] / found[0]) == pytest.approx(0.0, abs=bound)


def test_fp32_takes_no_predictor(capsys):
    with pytest.raises(SystemExit):
        eval.main(["perplexity", "--quant", "fp32", "--predictor", "auto", "--text", str(TEXT)])
    assert "fp32 computes every gate" in capsys.readouterr().err
