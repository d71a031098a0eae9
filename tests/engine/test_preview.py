"""Engines with a preview of the head compute likely rows exactly, decode and prefill the same bits
on any number of threads, and count their bytes.
"""

from __future__ import annotations

import numpy as np
import pytest
from predictor_files import decode_counted, write_predictor
from tiny_models import write_model

import hybrid
from hybrid.weights import packed_file, preview

VOCAB = 5003  # more than one piece of a shortlist; the last tile is not full
IDS = np.random.default_rng(2).integers(0, 320, 70)  # more than one chunk of prefill


@pytest.fixture(params=[True, False], ids=["tied", "own head"])
def model(tmp_path, request):
    return write_model(tmp_path / "model", vocab_size=VOCAB, tie_word_embeddings=request.param)


def all_logits(engine: hybrid.Engine, *, dense: bool = False) -> np.ndarray:
    logits = engine.open_session(dense=dense).prefill(IDS, all_logits=True)
    assert logits is not None
    return logits


@pytest.fixture
def previewing(monkeypatch):
    """Preview heads of any size."""
    monkeypatch.setattr(preview, "LEAST_ROWS", 0)


@pytest.mark.parametrize("quant", ["bf16", "q8", "q4"])
def test_likely_rows_are_exact_and_the_others_are_near(tmp_path, model, quant, monkeypatch):
    with hybrid.load(model, quant=quant) as engine:
        exact = all_logits(engine)
        path = write_predictor(tmp_path / "p", engine, margin=1e7)  # names every neuron
    with hybrid.load(model, quant=quant, predictor=path) as engine:
        assert not engine.previews_head  # too few rows for a preview to pay
        np.testing.assert_array_equal(all_logits(engine), exact)
    monkeypatch.setattr(preview, "LEAST_ROWS", 0)
    with hybrid.load(model, quant=quant, predictor=path) as engine:
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


@pytest.mark.parametrize("quant", ["bf16", "q4"])
def test_decode_equals_prefill_with_any_number_of_threads(tmp_path, model, quant, previewing):
    with hybrid.load(model, quant=quant) as engine:
        path = write_predictor(tmp_path / "p", engine)
    logits = []
    for threads in (1, 3):
        with hybrid.load(model, quant=quant, predictor=path, threads=threads) as engine:
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


@pytest.mark.parametrize("quant", ["bf16", "q8", "q4"])
def test_counted_bytes_equal_the_formula(tmp_path, model, quant, previewing):
    with hybrid.load(model, quant=quant) as engine:
        path = write_predictor(tmp_path / "p", engine)
    with hybrid.load(model, quant=quant, predictor=path, threads=3) as engine:
        session = decode_counted(engine, IDS)
        assert 0 < session.shortlisted_count < 3 * VOCAB // 8
        session.reset_counts()
        assert session.shortlisted_count == 0


def test_a_model_is_packed_again_if_a_preview_is_added_or_dropped(tmp_path, model, monkeypatch):
    """Files with and without a preview have the same name but different content."""
    monkeypatch.setattr(packed_file, "KEEP_FROM_BYTES", 0)
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine)
    results = []
    for least in (0, 10**9, 0):
        monkeypatch.setattr(preview, "LEAST_ROWS", least)
        with hybrid.load(model, predictor=path) as engine:
            results.append(all_logits(engine))
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != results[1]).any()
