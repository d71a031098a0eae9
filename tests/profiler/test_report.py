"""Reports equal numbers worked out by hand; the command prints and draws them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from isa_note import ISA_NOTE

from hybrid.placement.profile import FILE_NAME, POSITION_BUCKETS, ActivationProfile
from profiler.report import main
from profiler.summary import carrying_share, common_share, summarise


def profile(text_counts: np.ndarray, n_tokens: int = 10) -> ActivationProfile:
    n_texts, n_layers, _ = text_counts.shape
    position_tokens = np.zeros(POSITION_BUCKETS, np.int64)
    position_tokens[:2] = n_tokens // 2
    position_active = np.zeros((n_layers, POSITION_BUCKETS), np.int64)
    position_active[:, 0] = text_counts.sum((0, 2))
    return ActivationProfile(
        model_hash="0" * 64,
        n_tokens=n_tokens,
        counts=text_counts.sum(0),
        text_counts=text_counts,
        position_active=position_active,
        position_tokens=position_tokens,
        overlap=np.full(n_layers, 3, np.int64),
        overlap_base=np.full(n_layers, 12, np.int64),
        about={
            "model": "tiny",
            "quant": "q8",
            "window": 8,
            "texts": [{"name": f"text {i}", "tokens": 5} for i in range(n_texts)],
        },
    )


TWO_TEXTS = np.array(
    [
        [[5, 4, 0, 0, 0, 0, 0, 0, 0, 1]],  # hot: 0 and 1
        [[5, 0, 4, 1, 0, 0, 0, 0, 0, 0]],  # hot: 0 and 2
    ]
)


def test_summary_by_hand():
    summary = summarise(profile(TWO_TEXTS))
    # counts: 10 4 4 1 0 0 0 0 0 1 of 10 tokens
    assert summary.sparsity.tolist() == [pytest.approx(1 - 20 / 100)]
    assert summary.carrying.tolist() == [pytest.approx(0.3)]  # 10 + 4 + 4 of 20, 80 % are 16
    assert summary.never.tolist() == [pytest.approx(0.5)]
    assert summary.overlap.tolist() == [0.25]
    squares = 1.0 + 2 * 0.16 + 2 * 0.01
    assert summary.overlap_by_chance.tolist() == [pytest.approx(squares / 2.0)]
    assert summary.stability.tolist() == [0.5]
    assert summary.hot_carries.tolist() == [0.5]  # 5 of 10, in both directions
    assert summary.own_hot_carries.tolist() == [pytest.approx(0.9)]
    assert summary.sparsity_by_position[0] == pytest.approx(1 - 20 / 5 / 10)
    assert summary.sparsity_by_position[1] == 1.0
    assert np.isnan(summary.sparsity_by_position[2:]).all()


def test_the_share_of_neurons_that_carries_most_activations():
    assert carrying_share(np.array([8, 1, 1, 0])) == 0.25
    assert carrying_share(np.array([4, 4, 1, 1])) == 0.5
    assert carrying_share(np.array([1, 1, 1, 1, 1])) == 0.8
    assert np.isnan(carrying_share(np.zeros(4, np.int64)))


def test_common_share_of_a_text_with_itself_is_all():
    np.testing.assert_allclose(common_share(TWO_TEXTS), [[1, 0.5], [0.5, 1]])


def test_one_text_has_no_stability():
    summary = summarise(profile(TWO_TEXTS[:1]))
    assert summary.stability is summary.hot_carries is None


@pytest.mark.slow
def test_the_command_prints_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    profile(TWO_TEXTS).save(tmp_path / FILE_NAME)
    assert main([str(tmp_path), "--json", "--plots", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert "text 1: 5 tokens" in out
    assert "    0  " in out
    assert "80.0%" in out
    summary = json.loads(out.splitlines()[-1])
    assert summary["carrying"] == [0.3]
    assert summary["sparsity_by_position"][2] is None
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["hot_cold.png", "overlap.png", "sparsity.png", "stability.png"]
    for name in plots:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_printed(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith("matplotlib") or (name == "profiler" and "plots" in (args[2] or ())):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    profile(TWO_TEXTS[:1]).save(tmp_path / FILE_NAME)
    assert main([str(tmp_path / FILE_NAME)]) == 0
    out = capsys.readouterr().out
    assert "needs two texts" in out
    assert "matplotlib is not installed" in out


def test_a_file_that_is_not_a_profile_is_refused(tmp_path, capsys):
    (tmp_path / "other").write_bytes(b"\0" * 64)
    for path, message in (
        (tmp_path, FILE_NAME),
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "other", "broken"),
    ):
        assert main([str(path)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_bundled_profile_is_of_the_bundled_model(capsys):
    import hybrid

    folder = Path(hybrid.__file__).parent / "models" / "stories"
    assert main([str(folder), "--no-plots"]) == 0
    assert "stories" in capsys.readouterr().out
    with hybrid.load("stories") as engine:
        assert engine.neuron_orders is not None
        assert not [notice for notice in engine.notices if ISA_NOTE not in notice]
