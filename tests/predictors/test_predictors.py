"""Predictors learn a planted structure, reach the requested recall, and are used only if they are
cheaper.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from predictors import train as training
from predictors.errors import PredictorError
from predictors.evaluate import evaluate
from predictors.evaluate import main as evaluate_main
from predictors.file import load_predictor_file
from predictors.predictors import (
    margin_for_recall,
    measure_quality,
    quantize_lowrank,
    round_blocks,
)
from predictors.selection import CostTable, HeldOut, candidates_for, cheapest
from predictors.trace import LayerTrace, Trace, TraceSizes, TraceWriter, load_trace
from predictors.train import Options, train

HIDDEN, N_NEURONS, RANK = 64, 120, 6
# Gates depend on RANK directions, and a neuron fires for one token in eight. With these costs,
# predictors pay.
CHEAP = {
    "exact_ns": 1000.0,
    "named_row_ns": 5.0,
    "lowrank_ns": {"8": 50.0, "16": 100.0, "32": 200.0},
}


def write_trace(folder: Path, *, n_tokens: int = 1500, seed: int = 0, **about: object) -> Trace:
    """Write a trace of two layers with the same planted structure and different tokens.

    The bits of the masks are in the engine's order.
    """
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((N_NEURONS, RANK)) @ rng.standard_normal((RANK, HIDDEN))
    gate = (mix + 0.3 * rng.standard_normal((N_NEURONS, HIDDEN))) * 0.05
    tokens = np.random.default_rng(seed + 1)
    writer = TraceWriter(folder, TraceSizes(2, N_NEURONS, HIDDEN), capacity=n_tokens + 1)
    x = tokens.standard_normal((2, n_tokens, HIDDEN)).astype(np.float16)
    threshold = float(np.quantile(x[0].astype(np.float32) @ gate.T, 0.875))
    active = x.astype(np.float32) @ gate.T >= threshold
    writer.add(x, np.packbits(active, axis=2, bitorder="little"))
    writer.finish(
        [gate.astype(np.float16)] * 2,
        {
            "model": "planted",
            "model_hash": "m" * 64,
            "order_hash": "o" * 64,
            "quant": "q8",
            "input": "normed",
            "activation": "fatrelu",
            "threshold": threshold,
            "texts": [],
            "costs": CHEAP,
            **about,
        },
    )
    return load_trace(folder)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("trace"))


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("trace"), seed=9)


@pytest.fixture(scope="module")
def trained(trace):
    pytest.importorskip("torch", reason="training needs torch")
    return train(trace, Options(ranks=(8, 16), epochs=3))


def test_training_finds_the_planted_rank(trained, trace):
    for recall, choices in trained.choices.items():
        for choice in choices:
            assert choice.kind == "lowrank"
            assert choice.recall > recall - 0.04  # 150 tokens are few
            assert choice.cost_ns < choice.exact_ns
            assert choice.weighted_recall >= choice.recall  # strong activations are easier
    predicted = [np.mean([c.predicted for c in trained.choices[r]]) for r in (0.95, 0.99, 0.999)]
    assert 0.12 < predicted[0] < predicted[1] < predicted[2] < 0.6
    assert trained.about["model_hash"] == trace.model_hash


def test_training_beats_its_initialisation(trace):
    pytest.importorskip("torch")
    from predictors.lowrank import SvdBasis, TokenSplit, TrainingOptions, train_lowrank

    layer = trace.layer(0)
    tokens = np.arange(1500)
    training_tokens, held_out = tokens[:1000], tokens[1000:]
    basis = SvdBasis(layer, training_tokens, trace.threshold)
    active = layer.active()[held_out]
    shares = []
    for predictor in (
        basis.predictor(4, layer.inputs),
        train_lowrank(
            basis, 4, layer, TokenSplit(training_tokens, held_out), TrainingOptions(epochs=8)
        ),
    ):
        scores = predictor.scores(layer.inputs[held_out])
        margin = margin_for_recall(scores, active, 0.99)
        shares.append(measure_quality(scores, active, active * 1.0, margin).predicted)
    assert shares[1] < shares[0]


def test_recall_and_precision_hold_on_other_tokens(trained, other_tokens):
    for recall in (0.95, 0.99):
        for quality in evaluate(trained, other_tokens, recall):
            assert quality.recall > recall - 0.02
            assert quality.precision > 0.2


def test_exact_is_kept_if_nothing_is_cheaper(trace):
    pytest.importorskip("torch")
    dear = CHEAP | {"lowrank_ns": {"8": 2000.0, "16": 2000.0}}
    costly = replace(trace, about=trace.about | {"costs": dear})
    file = train(costly, Options(ranks=(8,), epochs=0))
    assert {choice.kind for choices in file.choices.values() for choice in choices} == {"exact"}
    assert not file.predictors


def test_without_torch_nothing_is_trained(trace, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` fails
    assert training.main([str(trace.folder), "-o", str(tmp_path / "p")]) == 1
    error = capsys.readouterr().err
    assert "training needs torch: pip install 'hybrid-inference[train]'\n" in error
    assert not (tmp_path / "p").exists()


def test_quality_by_hand():
    scores = np.array([[1.0, -1.0, 0.5, -0.2]])
    active = np.array([[True, True, False, True]])
    magnitude = np.array([[6.0, 1.0, 0.0, 3.0]])
    quality = measure_quality(scores, active, magnitude, 0.0)
    assert quality.recall == pytest.approx(1 / 3)
    assert quality.weighted_recall == pytest.approx(0.6)
    assert quality.precision == 0.5
    assert quality.predicted == 0.5
    nothing = measure_quality(scores, np.zeros((1, 4), bool), magnitude, -9.0)
    assert (nothing.recall, nothing.precision, nothing.predicted) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.99, 0.999])
def test_margins_reach_the_recall_and_no_more(recall):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((100, 50)).astype(np.float32)
    active = rng.random((100, 50)) < 0.2
    margin = margin_for_recall(scores, active, recall)
    hits = (scores + np.float32(margin) >= 0)[active].mean()
    assert recall <= hits <= recall + 2 / active.sum()
    assert margin_for_recall(scores, np.zeros_like(active), recall) == 0.0


def test_rounded_matrices_give_nearly_the_same_scores():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((24, 70)), rng.standard_normal((30, 24))
    a[7] *= 100  # z's elements differ in size
    b[:, 7] /= 100
    b[:, 1] *= 50  # so large that 4 bits would hold no other direction beside it
    x = rng.standard_normal((200, 70)).astype(np.float16)
    rounded = quantize_lowrank(a.astype(np.float32), b.astype(np.float32), np.ones(30), x)
    expected = x.astype(np.float32) @ a.T @ b.T + 1
    lost = round_blocks(a[1:2].astype(np.float32)) - a[1:2]  # only that direction
    error = rounded.scores(x) - expected - x.astype(np.float32) @ lost.T @ b[:, 1:2].T
    others = np.delete(np.arange(24), 1)
    own = x.astype(np.float32) @ a[others].T @ b[:, others].T
    assert np.sqrt(np.mean(error**2)) < 0.3 * own.std()
    np.testing.assert_array_equal(round_blocks(rounded.a), rounded.a)


def test_costs_between_measured_ranks_are_interpolated():
    costs = CostTable.of(CHEAP, N_NEURONS)
    assert costs.of_predictor(12, 0.0) == 75.0
    assert costs.of_predictor(16, 0.5) == 100.0 + 60 * 5.0


def test_costs_of_an_older_trace_are_read():
    older = CHEAP | {"sign_ns": 100.0}
    assert CostTable.of(older, N_NEURONS) == CostTable.of(CHEAP, N_NEURONS)


def test_exact_is_chosen_over_a_dearer_predictor(trace):
    layer, costs = trace.layer(0), CostTable.of(CHEAP, N_NEURONS)
    held_out = HeldOut.of(layer, np.arange(400))
    left, sizes, right = np.linalg.svd(layer.gate.astype(np.float32))
    b, a = left[:, :8] * sizes[:8], right[:8]
    predictor = quantize_lowrank(a, b, np.zeros(N_NEURONS), layer.inputs)
    choice = candidates_for(predictor, held_out, [0.9], costs)[0.9]
    assert cheapest([choice], costs) is choice
    assert cheapest([replace(choice, cost_ns=1001.0)], costs).kind == "exact"


def test_a_file_is_read_as_it_was_written(trained, tmp_path):
    trained.save(tmp_path / "p")
    loaded = load_predictor_file(tmp_path / "p")
    assert loaded.choices == {r: tuple(c) for r, c in trained.choices.items()}
    assert loaded.about == json.loads(json.dumps(trained.about))
    x = np.random.default_rng(0).standard_normal((9, HIDDEN))
    for (choice, ours), (_, read) in zip(trained.select(0.99), loaded.select(0.99), strict=True):
        assert choice.rank == read.rank
        np.testing.assert_array_equal(ours.scores(x), read.scores(x))
    assert list(tmp_path.iterdir()) == [tmp_path / "p"]


def damage(path: Path, how: str) -> None:
    tensors, (about,) = load_file(path), metadata(path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-64])
        return
    name = next(name for name in tensors if name.endswith(".b"))
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][:, :-4].copy()
    elif how == "type":
        tensors[name] = tensors[name].astype(np.int16)
    elif how == "not finite":
        tensors[name + "ias"][0] = np.nan
    elif how == "version":
        about["version"] = 99
    elif how == "bits":
        tensors[name][0, -1] = 8
    elif how == "kind":
        about["choices"]["0.99"][0]["kind"] = "magic"
    elif how == "layers":
        about["choices"]["0.99"].pop()
    elif how == "fields":
        del about["choices"]["0.99"][0]["margin"]
    save_file(
        tensors, path, None if how == "no metadata" else {"hybrid_predictor": json.dumps(about)}
    )


def metadata(path: Path) -> list[dict]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return [json.loads(file.metadata()["hybrid_predictor"])]


@pytest.mark.parametrize(
    "how",
    ["cut", "missing", "shape", "type", "not finite", "version", "bits", "kind", "layers"]
    + ["fields", "no metadata"],
)
def test_damaged_files_are_refused(trained, tmp_path, how):
    path = tmp_path / "p.safetensors"
    trained.save(path)
    damage(path, how)
    with pytest.raises(PredictorError, match=r"p\.safetensors"):
        load_predictor_file(path)


def test_another_models_trace_is_refused(trained, tmp_path):
    for key in ("model_hash", "order_hash"):
        other = write_trace(tmp_path / key, n_tokens=70, **{key: "x" * 64})
        with pytest.raises(PredictorError, match="another"):
            evaluate(trained, other, 0.99)


def test_the_commands_train_and_evaluate(trace, trained, tmp_path, capsys):
    path = tmp_path / "p.safetensors"
    arguments = [str(trace.folder), "-o", str(path), "--rank", "8", "--epochs", "1"]
    assert training.main([*arguments, "--recall", "0.9"]) == 0
    assert "2 lowrank8" in capsys.readouterr().out
    assert evaluate_main([str(path), str(trace.folder), "--recall", "0.9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["worst_recall"] == pytest.approx(0.9, abs=0.03)
    assert len(lines) == 5
    assert evaluate_main([str(path), str(trace.folder), "--recall", "0.5"]) == 1
    assert "the file holds 0.9" in capsys.readouterr().err


def test_bad_input_gives_one_line_of_error(trace, tmp_path, capsys):
    few = write_trace(tmp_path / "few", n_tokens=20)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trace.json").write_text("{")
    for folder, message in (
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "broken", "broken"),
        (few.folder, "too few"),
        (trace.folder, "no rank fits a hidden size of 64"),
    ):
        rank = ["--rank", "40"] if folder == trace.folder else []
        assert training.main([str(folder), "-o", str(tmp_path / "p"), *rank]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for options in (["--recall", "1.5"], ["--rank", "7"], ["--epochs", "-1"]):
        with pytest.raises(SystemExit):
            training.main([str(trace.folder), "-o", "p", *options])


def test_layers_that_do_not_fit_their_trace_are_refused(tmp_path):
    trace = write_trace(tmp_path / "trace", n_tokens=70)
    path = tmp_path / "trace" / "layer_001.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(PredictorError, match="layer_001"):
        trace.layer(1)
    trace.layer(0)
    about = json.loads((tmp_path / "trace" / "trace.json").read_text())
    (tmp_path / "trace" / "trace.json").write_text(json.dumps(about | {"n_tokens": 60}))
    with pytest.raises(PredictorError, match="does not match"):
        load_trace(tmp_path / "trace").layer(0)


def test_masks_of_odd_sizes_unpack():
    masks = np.packbits(np.array([[1, 0, 1, 1, 0, 0, 0, 0, 0, 1]]), axis=1, bitorder="little")
    layer = LayerTrace(np.zeros((1, 4), np.float16), masks, np.zeros((10, 4), np.float16))
    assert layer.active().tolist() == [[True, False, True, True] + [False] * 5 + [True]]
