"""Engines with a predictor err only by missed neurons, decode and prefill the same bits, count
their bytes, and refuse files of another model.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from predictor_files import decode_counted, write_predictor
from tiny_models import ODD_SHAPES, write_model

import hybrid
from hybrid import InvalidArtifact, InvalidOption
from hybrid.engine.loading.prediction import predictor_path

IDS = np.random.default_rng(2).integers(0, 320, 90)
SIZES = {
    "whole tiles": {"intermediate_size": 256},
    "odd sizes": {"intermediate_size": 203, "hidden_size": 160, "num_attention_heads": 5},
}
SIZES["odd sizes"] |= {"num_key_value_heads": 5}
SIZES |= {name: ODD_SHAPES[name] for name in ("hidden 36", "hidden 100")}


@pytest.fixture
def model(tmp_path, request):
    return write_model(tmp_path / "model", vocab_size=4096, **getattr(request, "param", {}))


def prefill(engine: hybrid.Engine) -> np.ndarray:
    logits = engine.open_session().prefill(IDS, all_logits=True)
    assert logits is not None
    return logits


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
def test_a_predictor_that_names_all_neurons_changes_no_bit(tmp_path, model, quant):
    with hybrid.load(model, quant=quant) as engine:
        expected = prefill(engine)
        path = write_predictor(tmp_path / "p", engine, margin=1e7)
    with hybrid.load(model, quant=quant, predictor=path) as engine:
        np.testing.assert_array_equal(prefill(engine), expected)
        assert engine.prediction.kinds == ("lowrank12",) * 2


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize("model", SIZES.values(), ids=SIZES, indirect=True)
def test_decode_equals_prefill_and_no_inactive_neuron_is_added(tmp_path, model, quant):
    with hybrid.load(model, quant=quant) as engine:
        path = write_predictor(tmp_path / "p", engine)
        exact = engine.open_session().observe(IDS[:1]).masks
    logits = []
    for threads in (1, 3):
        with hybrid.load(model, quant=quant, predictor=path, threads=threads) as engine:
            logits.append(prefill(engine))
            session = engine.open_session()
            for position, token in enumerate(IDS.tolist()):
                session.decode(token)
                np.testing.assert_array_equal(session.logits, logits[-1][position])
            n_pairs = IDS.size * engine.config.n_neurons
            for named, active in zip(session.predicted_counts, session.active_counts, strict=True):
                assert 0 < active < named < n_pairs
            masks = engine.open_session().observe(IDS[:1]).masks
    np.testing.assert_array_equal(*logits)
    assert not (masks[0] & ~exact[0]).any()  # the inputs of the first layer are the same
    assert (masks[0] != exact[0]).any()


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize("model", SIZES.values(), ids=SIZES, indirect=True)
@pytest.mark.parametrize("kinds", [("lowrank", "lowrank"), ("exact", "lowrank")], ids="-".join)
def test_counted_bytes_equal_the_formula(tmp_path, model, quant, kinds):
    with hybrid.load(model, quant=quant) as engine:
        path = write_predictor(tmp_path / "p", engine, kinds=kinds)
    with hybrid.load(model, quant=quant, predictor=path, threads=3) as engine:
        session = decode_counted(engine, IDS)
        assert 0 < session.decode_bytes["predict"] < 3 * engine.prediction.bytes_per_token
        assert session.shortlisted_count == 0


def test_a_dense_session_uses_no_predictor(tmp_path, model):
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine, margin=-1e7)
        expected = engine.open_session(dense=True).prefill(IDS, all_logits=True)
    with hybrid.load(model, predictor=path) as engine:
        actual = engine.open_session(dense=True).prefill(IDS, all_logits=True)
        np.testing.assert_array_equal(actual, expected)
        assert (prefill(engine) != expected).any()  # other sessions miss all neurons


def test_layers_without_a_predictor_are_reported(tmp_path, model):
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine, kinds=("exact", "lowrank"))
    with hybrid.load(model, predictor=path) as engine:
        assert engine.prediction.n_predicted_layers == 1
        assert any("1 of 2 layers are exact" in notice for notice in engine.notices)


REFUSED = {
    "other weights": ({"model_hash": "0" * 64}, "other weights"),
    "other order": ({"order_hash": "0" * 64}, "another order of neurons"),
    "residual inputs": ({"input": "residual"}, "'residual' inputs"),
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_a_predictor_of_another_model_is_refused(tmp_path, model, changes):
    about, message = changes
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine, **about)
    with pytest.raises(InvalidArtifact, match=message):
        hybrid.load(model, predictor=path)


def test_a_predictor_of_another_shape_is_refused(tmp_path, model):
    other = write_model(tmp_path / "other", vocab_size=4096, intermediate_size=128)
    with hybrid.load(other) as engine:
        path = write_predictor(tmp_path / "p", engine)
    with pytest.raises(InvalidArtifact, match="128 neurons"):
        hybrid.load(model, predictor=path)


def test_a_predictor_of_another_kind_is_refused_by_name(tmp_path, model):
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine, kinds=("lowrank", "sign"))
    with pytest.raises(InvalidArtifact, match=r"kind 'sign'.*python -m predictors\.train"):
        hybrid.load(model, predictor=path)


def test_missing_and_broken_files_are_refused(tmp_path, model):
    with pytest.raises(InvalidArtifact, match="nowhere"):
        hybrid.load(model, predictor=tmp_path / "nowhere")
    (tmp_path / "broken").write_bytes(b"\0" * 100)
    with pytest.raises(InvalidArtifact, match="broken"):
        hybrid.load(model, predictor=tmp_path / "broken")


def test_an_unknown_recall_is_refused_with_the_known_ones(tmp_path, model):
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine)
    with pytest.raises(InvalidOption, match=r"0\.9; the file holds 0\.99"):
        hybrid.load(model, predictor=path, recall=0.9)
    with pytest.raises(InvalidOption, match="between 0 and 1"):
        hybrid.load(model, recall=1.5)


def test_a_predictor_of_another_weight_format_is_reported(tmp_path, model):
    with hybrid.load(model, quant="q4") as engine:
        path = write_predictor(tmp_path / "p", engine)
    with hybrid.load(model, quant="q8", predictor=path) as engine:
        assert any("trained on q4" in notice for notice in engine.notices)


def test_silu_has_nothing_to_predict(tmp_path):
    silu = {"hidden_act": "silu", "hidden_act_param": None}
    model = write_model(tmp_path / "model", vocab_size=4096, **silu)
    with hybrid.load(model) as engine:
        path = write_predictor(tmp_path / "p", engine)
    with pytest.raises(InvalidOption, match="nothing to predict"):
        hybrid.load(model, predictor=path)
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.prediction is None


def test_auto_uses_the_file_that_setup_made_and_reports_if_it_cannot(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.prediction is None
        assert any("hybrid.setup" in notice for notice in engine.notices)
        path = predictor_path(tmp_path / "home", engine.model_hash, "q8")
        path.parent.mkdir(parents=True)
        write_predictor(path, engine)
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.prediction.path == path
    with hybrid.load(model, predictor="auto", recall=0.9) as engine:  # not what it was made for
        assert engine.prediction is None
        assert any("instead: recall: no predictor for" in notice for notice in engine.notices)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with hybrid.load(model, predictor="auto") as engine:
        assert engine.prediction is None
        assert any("exact instead" in notice for notice in engine.notices)


@pytest.mark.slow
def test_the_command_line_reports_the_predictor_in_use(tmp_path, capsys):
    from hybrid.bench import main as bench
    from hybrid.run import main as run

    with hybrid.load("stories") as engine:
        path = write_predictor(
            tmp_path / "p", engine, kinds=("lowrank", "lowrank", "exact") * 2, margin=30.0
        )
    arguments = ["--predictor", str(path), "-p", "Once", "-n", "4", "--seed", "1"]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert "predicted, recall 0.99" in captured.err
    assert "2 of 6 layers are exact" in captured.err
    assert run([*arguments, "--recall", "0.5"]) == 2
    assert bench(["--predictor", str(path), "-n", "4", "--runs", "1", "--stages"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("predict ") for line in lines)
    summary = json.loads(lines[-1])
    assert summary["predictor"] == str(path)
    assert 0 < summary["predicted_fraction"] < 1
