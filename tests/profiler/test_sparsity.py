"""The sparsity that the native engine counts on a text equals the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import write_model

import hybrid
from hybrid.checkpoint import open_checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, read_weights
from hybrid.kernels import Format
from profiler import sparsity


def test_layers_match_the_oracle_over_windows(tmp_path):
    folder = write_model(tmp_path, vocab_size=4096)
    ids = np.random.default_rng(0).integers(3, 4096, 250).tolist()
    with hybrid.load(folder) as engine:
        report = sparsity.measure_sparsity(engine, ids, window=100)
    with open_checkpoint(folder) as checkpoint:
        weights = read_weights(checkpoint, Format.q8)
        active = np.zeros(2)
        for first in (0, 100, 200):
            session = ReferenceSession(weights, checkpoint.config, Format.q8)
            session.prefill(ids[first : first + 100])
            active += [mask.sum() for mask in session.active]
    assert report.n_tokens == 250
    np.testing.assert_allclose(1 - report.sparsity, active / (250 * 200), rtol=3e-3)


def test_no_tokens_are_refused():
    with hybrid.load("stories") as engine, pytest.raises(ValueError, match="no tokens"):
        sparsity.measure_sparsity(engine, [])


def test_the_command_prints_layers_and_mean(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. The cat was happy.")
    assert sparsity.main(["--text", str(text)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert float(lines[-1].split()[1]) > 0.7


def test_a_missing_text_gives_one_line_of_error(capsys):
    assert sparsity.main(["--text", "/no/such/text"]) == 2
    assert "No such file" in capsys.readouterr().err
