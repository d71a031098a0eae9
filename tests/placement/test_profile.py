"""Activation profiles are found and checked, and packing by them changes only neurons' order."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_model

import hybrid
from hybrid import InvalidArtifact
from hybrid.placement.profile import (
    FILE_NAME,
    POSITION_BUCKETS,
    ActivationProfile,
    load_profile,
    profile_path,
)
from hybrid.weights.packing import SOURCE_ORDER, order_hash


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", vocab_size=4096)


def random_profile(engine: hybrid.Engine, seed: int = 0) -> ActivationProfile:
    config, rng = engine.config, np.random.default_rng(seed)
    counts = rng.integers(0, 100, (2, config.n_layers, config.n_neurons))
    zeros = np.zeros(config.n_layers, np.int64)
    return ActivationProfile(
        model_hash=engine.model_hash,
        n_tokens=200,
        counts=counts.sum(0),
        text_counts=counts,
        position_active=np.zeros((config.n_layers, POSITION_BUCKETS), np.int64),
        position_tokens=np.zeros(POSITION_BUCKETS, np.int64),
        overlap=zeros,
        overlap_base=zeros,
        about={"model": "tiny", "texts": []},
    )


def test_orders_are_by_falling_frequency_and_stable():
    counts = np.array([[3, 9, 3, 0, 9]])
    profile = ActivationProfile("", 9, counts, counts[None], *(np.zeros(1, int),) * 4, {})
    (order,) = profile.neuron_orders()
    assert order.tolist() == [1, 4, 0, 2, 3]


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
def test_the_order_of_neurons_does_not_change_the_logits(tmp_path, model, quant):
    ids = np.random.default_rng(1).integers(0, 4000, 80)
    with hybrid.load(model, quant=quant) as engine:
        straight = engine.open_session().prefill(ids, all_logits=True)
        random_profile(engine).save(tmp_path / "profile")
    with hybrid.load(model, quant=quant, profile=tmp_path / "profile") as engine:
        assert any((np.diff(order) != 1).any() for order in engine.neuron_orders)
        ordered = engine.open_session().prefill(ids, all_logits=True)
    error = np.abs(ordered - straight).max(1) / straight.std()
    # Sums in another order move an activation across a rounding step at a few positions.
    assert np.median(error) < 1e-5
    assert np.quantile(error, 0.9) < 1e-3
    assert error.max() < 0.1


def test_profiles_are_found_in_the_models_folder_and_in_hybrid_home(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    with hybrid.load(model) as engine:
        assert engine.neuron_orders is None
        ours, other = random_profile(engine), random_profile(engine, seed=1)
        model_hash = engine.model_hash
    ours.save(model / FILE_NAME)
    with hybrid.load(model) as engine:
        assert order_hash(engine.neuron_orders) == order_hash(ours.neuron_orders())
    kept = profile_path(tmp_path / "home", model_hash)
    kept.parent.mkdir(parents=True)
    other.save(kept)
    with hybrid.load(model) as engine:  # setup recorded it on the user's texts
        assert order_hash(engine.neuron_orders) == order_hash(other.neuron_orders())
    with hybrid.load(model, profile="none") as engine:
        assert order_hash(engine.neuron_orders) == SOURCE_ORDER


def test_a_models_hash_depends_on_its_weights_and_not_on_its_folder(tmp_path, model):
    other = write_model(tmp_path / "other", vocab_size=4096, seed=1)
    copy = write_model(tmp_path / "copy", vocab_size=4096)
    hashes = []
    for folder in (model, copy, other):
        with hybrid.load(folder) as engine:
            hashes.append(engine.model_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_profile_of_another_model_is_refused_or_reported(tmp_path, model):
    wider = write_model(tmp_path / "wider", vocab_size=4096, intermediate_size=128)
    with hybrid.load(model) as engine:
        profile = random_profile(engine)
    replace(profile, model_hash="1" * 64).save(tmp_path / "other-weights")
    profile.save(tmp_path / "other-shape")
    with pytest.raises(InvalidArtifact, match="other weights"):
        hybrid.load(model, profile=tmp_path / "other-weights")
    with pytest.raises(InvalidArtifact, match="2 x 200 neurons; this one has 2 x 128"):
        hybrid.load(wider, profile=tmp_path / "other-shape")
    profile.save(wider / FILE_NAME)
    with hybrid.load(wider) as engine:  # found, but not named by the caller
        assert engine.neuron_orders is None
        assert any("profile not used" in notice for notice in engine.notices)


def test_more_than_ten_layers_keep_their_order(tmp_path):
    model = write_model(tmp_path / "model", vocab_size=4096, num_hidden_layers=12)
    with hybrid.load(model) as engine:
        profile = random_profile(engine)
    profile.save(tmp_path / "profile")
    for saved, order in zip(
        load_profile(tmp_path / "profile").neuron_orders(), profile.neuron_orders(), strict=True
    ):
        np.testing.assert_array_equal(saved, order)


def damaged(path, damage) -> None:
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no metadata":
        save_file(load_file(path), path)
    else:
        tensors = load_file(path)
        about = {"version": 2, "n_tokens": 200, "model_hash": "0"}
        if damage == "version":
            about["version"] = 99
        elif damage == "negative":
            tensors["counts"] = -tensors["counts"] - 1
        elif damage == "shape":
            tensors["counts"] = tensors["counts"][:, :-1].copy()
        elif damage == "type":
            tensors["counts"] = tensors["counts"].astype(np.float64)
        elif damage == "too many":
            about["n_tokens"] = 3
        elif damage == "missing":
            del tensors["overlap"]
        save_file(tensors, path, {"hybrid_profile": json.dumps(about)})


DAMAGES = ["cut", "empty", "no metadata", "version", "negative", "shape", "type", "too many"]


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_damaged_files_are_refused(tmp_path, model, damage):
    path = tmp_path / "profile.safetensors"
    with hybrid.load(model) as engine:
        random_profile(engine).save(path)
    load_profile(path)
    damaged(path, damage)
    with pytest.raises(InvalidArtifact, match=r"profile\.safetensors"):
        load_profile(path)
