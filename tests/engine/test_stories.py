"""The native engine's logits of the bundled model stay within LOGIT_BOUND of fp32.

The model is teacher-forced on a story that it was not trained on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import STORIES

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.kernels import Format

STORY = (Path(__file__).parents[1] / "data" / "held_out_story.txt").read_text(encoding="utf-8")
# Largest difference of any logit from fp32, caused by rounding weights, activations and KV cache.
# The story's logits have a standard deviation of about 3. A change beyond a bound is a regression.
LOGIT_BOUND = {"bf16": 0.3, "f16": 0.2, "q8": 0.5}
N_TOKENS = 128


@pytest.fixture(scope="module")
def fp32() -> tuple[np.ndarray, float, np.ndarray]:
    """Ids of the story, its active fraction and its logits in plain fp32."""
    with hybrid.load("stories") as engine:
        ids = np.array(engine.tokenizer.encode(STORY)[:N_TOKENS], np.int32)
    assert len(ids) == N_TOKENS
    with open_checkpoint(STORIES) as checkpoint:
        session = ReferenceSession(read_weights(checkpoint, None), checkpoint.config)
        logits = session.prefill(ids)
    return ids, float(np.mean([active.mean() for active in session.active])), logits


@pytest.mark.parametrize("quant", list(LOGIT_BOUND))
def test_the_argmax_equals_the_oracles_if_its_lead_is_clear(fp32, isa, quant):
    ids, active_fraction, expected = fp32
    with hybrid.load("stories", quant=quant, threads=2) as engine:
        session = engine.open_session()
        logits = session.prefill(ids, all_logits=True)
        config = engine.config
    bound = LOGIT_BOUND[quant]
    assert np.abs(logits - expected).max() <= bound
    top = np.sort(expected, -1)
    is_clear = top[:, -1] - top[:, -2] > 2 * bound
    assert is_clear.sum() >= 20  # the comparison below compares something
    np.testing.assert_array_equal(logits.argmax(-1)[is_clear], expected.argmax(-1)[is_clear])
    n_pairs = N_TOKENS * config.n_layers * config.n_neurons
    assert sum(session.active_counts) / n_pairs == pytest.approx(active_fraction, abs=0.002)


def test_the_model_is_sparse_and_predicts_the_story(fp32):
    ids, active_fraction, logits = fp32
    assert 1 - active_fraction >= 0.70
    shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss = -log_probability[np.arange(N_TOKENS - 1), ids[1:]].mean()
    assert loss < 3.5  # an untrained model: log(4096) = 8.3


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
def test_the_kernels_add_nothing_to_the_rounding_of_their_format(fp32, quant):
    """Against fp32, the engine errs as its format's oracle does, which also rounds activations."""
    ids, _, exact = fp32
    with open_checkpoint(STORIES) as checkpoint:
        weights = read_weights(checkpoint, Format[quant])
        oracle = ReferenceSession(weights, checkpoint.config, Format[quant]).prefill(ids)
    with hybrid.load("stories", quant=quant) as engine:
        logits = engine.open_session().prefill(ids, all_logits=True)

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x * x)))

    assert rms(logits - exact) < 1.2 * rms(oracle - exact)
    assert rms(logits - oracle) < rms(oracle - exact)


def test_f16_of_a_model_by_others_errs_as_its_kv_cache_does(tmp_path, shared_data):
    """Weights that are fp16 values stay as they are. Only keys and values are rounded."""
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    shutil.copytree(folder / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: w.astype(np.float16) for name, w in tensors.items()}, path)
    ids = np.array(json.loads((folder / "expected.json").read_text())["ids"])
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        weights, config = read_weights(checkpoint, Format.f16), checkpoint.config
        exact = ReferenceSession(read_weights(checkpoint, None), config).prefill(ids)
    first = ReferenceSession(weights, config, Format.f16).prefill(ids[:1])[0]
    with hybrid.load(tmp_path / "hf", quant="f16") as engine:
        logits = engine.open_session().prefill(ids, all_logits=True)
    assert np.abs(logits - exact).max() <= 0.05  # of bf16: 0.14
    assert np.abs(logits[0] - first).max() <= 2e-5  # later keys and values may cross a step
