"""Engines with a preview of the head compute likely rows exactly, decode and prefill the same bits
on any number of threads, and count their bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predictor_files import decode_counted, write_predictor
from tiny_models import ODD_SHAPES, write_model

import hybrid
from hybrid.weights import packed_file, preview

VOCAB = 5003  # more than one piece of a shortlist; the last tile is not full
IDS = np.random.default_rng(2).integers(0, 320, 70)  # more than one chunk of prefill


MODELS = {
    "tied": {},
    "own head": {"tie_word_embeddings": False},
    "hidden 100": ODD_SHAPES["hidden 100"],
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(tmp_path, request):
    return write_model(tmp_path / "model", vocab_size=VOCAB, **request.param)


def all_logits(engine: hybrid.Engine, *, dense: bool = False) -> np.ndarray:
    logits = engine.open_session(dense=dense).prefill(IDS, all_logits=True)
    assert logits is not None
    return logits


@pytest.fixture
def previewing(monkeypatch):
    """Preview heads of any size."""
    monkeypatch.setattr(preview, "LEAST_ROWS", 0)


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
def test_likely_rows_are_exact_and_the_others_are_near(tmp_path, model, quant, previewing):
    with hybrid.load(model, quant=quant) as engine:
        exact = all_logits(engine)
    with hybrid.load(model, quant=quant, preview_head=True) as engine:
        assert engine.previews_head
        previewed = all_logits(engine)
        np.testing.assert_array_equal(all_logits(engine, dense=True), exact)
    is_exact = previewed == exact
    assert 0.02 < is_exact.mean() < 0.08
    np.testing.assert_array_equal(previewed.argmax(1), exact.argmax(1))
    top = np.argsort(-exact, 1)[:, :10]
    assert np.take_along_axis(is_exact, top, 1).mean() > 0.95
    spread = exact.std()
    assert 0.1 * spread < np.std((previewed - exact)[~is_exact]) < 0.5 * spread


def test_a_predictor_alone_leaves_the_head_exact(tmp_path, model, previewing):
    with hybrid.load(model) as engine:
        exact = all_logits(engine)
        path = write_predictor(tmp_path / "p", engine, margin=1e7)  # names every neuron
    with hybrid.load(model, predictor=path) as engine:
        assert not engine.previews_head
        np.testing.assert_array_equal(all_logits(engine), exact)


def test_a_small_vocabulary_gets_no_preview_but_a_notice(model):
    with hybrid.load(model) as engine:
        exact = all_logits(engine)
    with hybrid.load(model, preview_head=True) as engine:
        assert not engine.previews_head
        assert any("preview_head has no effect: the vocabulary" in n for n in engine.notices)
        np.testing.assert_array_equal(all_logits(engine), exact)


@pytest.mark.parametrize("quant", ["bf16", "f16", "q4"])
@pytest.mark.parametrize("predicts", [True, False], ids=["predicting", "exact"])
def test_decode_equals_prefill_with_any_number_of_threads(
    tmp_path, model, quant, predicts, previewing
):
    options = options_of(tmp_path, model, quant, predicts)
    logits = []
    for threads in (1, 3):
        with hybrid.load(model, threads=threads, **options) as engine:
            logits.append(all_logits(engine))
            session, last = engine.open_session(), engine.open_session()
            for position, token in enumerate(IDS[:9].tolist()):
                session.decode(token)
                np.testing.assert_array_equal(session.logits, logits[-1][position])
            last.prefill(IDS)
            np.testing.assert_array_equal(last.logits, logits[-1][-1])
            session.truncate(0)
            session.prefill(IDS[:1], all_logits=True)
            np.testing.assert_array_equal(session.logits, logits[-1][0])
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize("predicts", [True, False], ids=["predicting", "exact"])
def test_counted_bytes_equal_the_formula(tmp_path, model, quant, predicts, previewing):
    with hybrid.load(model, threads=3, **options_of(tmp_path, model, quant, predicts)) as engine:
        session = decode_counted(engine, IDS)
        assert 0 < session.shortlisted_count < 3 * VOCAB // 8
        session.reset_counts()
        assert session.shortlisted_count == 0


def options_of(tmp_path: Path, model: Path, quant: str, predicts: bool) -> dict[str, Any]:
    """Return options that preview the head, with a random predictor or without one."""
    options: dict[str, Any] = {"quant": quant, "preview_head": True}
    if predicts:
        with hybrid.load(model, quant=quant) as engine:
            options["predictor"] = write_predictor(tmp_path / "p", engine)
    return options


def test_models_packed_with_and_without_a_preview_have_files_of_their_own(
    tmp_path, model, monkeypatch, previewing
):
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 0)
    home = tmp_path / "home"
    monkeypatch.setenv("HYBRID_HOME", str(home))
    results = []
    for preview_head in (True, False, True):
        with hybrid.load(model, preview_head=preview_head) as engine:
            results.append(all_logits(engine))
            if len(results) == 2:
                made = {path: path.stat().st_mtime_ns for path in (home / "packed").iterdir()}
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != results[1]).any()
    names = sorted(path.name.removesuffix(".safetensors") for path in made)
    assert names[1] == f"{names[0]}-preview"
    assert made == {path: path.stat().st_mtime_ns for path in (home / "packed").iterdir()}


def test_the_commands_say_that_the_head_is_previewed(tmp_path, model, capsys, previewing):
    from hybrid.eval import main as evaluate
    from hybrid.run import main as run

    assert run(["-m", str(model), "-p", "a", "-n", "2", "--raw", "--preview-head"]) == 0
    assert " | head previewed | " in capsys.readouterr().err
    path = tmp_path / "text"
    path.write_text("a small text")
    arguments = ["perplexity", "-m", str(model), "--text", str(path), "--json"]
    for option in ([], ["--preview-head"]):
        assert evaluate([*arguments, *option]) == 0
        assert json.loads(capsys.readouterr().out)["previews_head"] is bool(option)
    with pytest.raises(SystemExit):
        evaluate([*arguments, "--quant", "fp32", "--preview-head"])
    assert "takes no --preview-head" in capsys.readouterr().err
