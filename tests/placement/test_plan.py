"""Plan and machine files are read as written; broken ones and other models' are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from placement.test_solver import CONFIG, CPU_ONLY, MACHINE
from tiny_models import change_json

from hybrid.errors import InvalidArtifact
from hybrid.placement.machine import MODELLED, load_machine, override, read_overrides
from hybrid.placement.plan import LayerPlacement, check_plan, cpu_plan, load_plan, split_active

PLAN = replace(
    CPU_ONLY,
    layers=(LayerPlacement(True, 1024, 128),) * 5,
    is_head_on_gpu=True,
    vram_budget=1 << 30,
    vram_bytes=123,
)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert load_plan(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 2, found 1"),
        ({"layers": []}, None),
        ({"layers": [{"is_on_gpu": True, "n_gate": 64, "n_hot": 128}] * 5}, "n_hot <= n_gate"),
        ({"layers": [{"is_on_gpu": True, "n_gate": 65, "n_hot": 0}] * 5}, "layer 0"),
        ({"layers": [{"is_on_gpu": False, "n_gate": 64, "n_hot": 0}] * 5}, "on the CPU"),
        ({"layers": [{"is_on_gpu": 1, "n_gate": 64, "n_hot": 0}] * 5}, r"layers\[0\]\.is_on_gpu"),
        ({"layers": [{"n_gates": 64}] * 5}, "n_gates"),
        ({"layers": 7}, "broken"),
        ({"n_context": -1}, "n_context"),
        ({"n_neurons": "many"}, "n_neurons"),
        ({"quant": 8}, "quant"),
        ({"is_head_on_gpu": "yes"}, "is_head_on_gpu"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_damaged_plans_are_refused(tmp_path, change, message):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    change_json(path, **change)
    if message is None:  # sound, but of another model
        with pytest.raises(InvalidArtifact, match="layers: expected 5, found 0"):
            check(load_plan(path), path)
        return
    with pytest.raises(InvalidArtifact, match=message) as error:
        load_plan(path)
    assert str(path) in str(error.value)


def check(plan, path, **other) -> None:
    """Check a plan against this model's facts, with `other` in place of some."""
    facts = {"quant": "q8", "n_context": 256, "model_hash": "model", "order_hash": "order"}
    check_plan(plan, path, cpu_plan(CONFIG, **(facts | other)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"quant": "q4"}, "format: expected q4, found q8"),
        ({"model_hash": "another"}, "model hash"),
        ({"order_hash": "another"}, "neuron order"),
        ({"n_context": 257}, "context of 256 positions, but 257 are requested"),
    ],
)
def test_plans_of_another_model_or_context_are_refused(tmp_path, other, message):
    check(PLAN, tmp_path)
    with pytest.raises(InvalidArtifact, match=message):
        check(PLAN, tmp_path, **other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_files_that_are_not_plans_are_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArtifact, match="plan"):
        load_plan(path)
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        load_plan(tmp_path / "none.json")


def test_active_neurons_are_split_at_the_boundary():
    hot, cold = split_active(np.array([0, 3, 64, 70]), 64)
    assert hot.tolist() == [0, 3]
    assert cold.tolist() == [64, 70]


def test_a_machine_is_read_as_it_was_written(tmp_path):
    for index, machine in enumerate((MACHINE, replace(MACHINE, gpu=None))):
        path = tmp_path / "machines" / f"{index}.json"
        machine.save(path)
        assert load_machine(path) == machine


def test_some_fields_of_a_machine_can_be_replaced(tmp_path):
    path = tmp_path / "my.json"
    path.write_text('{"cpu": {"stream_gbs": 33}, "gpu": {"hand_off_us": 7.5}}')
    machine = override(MACHINE, read_overrides(path), path)
    assert machine.cpu == replace(MACHINE.cpu, stream_gbs=33)
    assert machine.gpu == replace(MACHINE.gpu, hand_off_us=7.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "object"),
        ('{"cpu": 3}', "cpu: expected an object"),
        ('{"cpu": {"stream_gbs": 0}}', "stream_gbs: expected a number from 1e-06"),
        ('{"cpu": {"stream_gbs": -1}}', "stream_gbs"),
        ('{"cpu": {"stream_gbs": "fast"}}', "fast"),
        ('{"gpu": {"name": 3}}', "name"),
        ('{"speed": 3}', "speed"),
        ('{"version": 99}', "version"),
    ],
)
def test_broken_machines_are_refused(tmp_path, text, message):
    path = tmp_path / "my.json"
    path.write_text(text)
    with pytest.raises(InvalidArtifact, match=message) as error:
        override(MACHINE, read_overrides(path), path)
    assert str(path) in str(error.value)
    with pytest.raises(InvalidArtifact):
        load_machine(path)


def test_modelled_machines_are_marked_as_modelled():
    for make in MODELLED.values():
        assert make().is_modelled
        assert make().gpu is not None
