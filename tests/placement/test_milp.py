"""The solver's plans are within 0.1 % of those of a mixed-integer program."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement.test_solver import ALL, CONFIG, CPU_ONLY, machines, time_model
from slow import slow_except

pytest.importorskip("scipy")

from placement.milp import solve_milp

from hybrid.kernels import Format
from hybrid.placement.machine import MODELLED
from hybrid.placement.plan import PlacementPlan, cpu_plan, whole_plan
from hybrid.placement.sizes import ModelSizes
from hybrid.placement.solver import solve
from hybrid.placement.time_model import TimeModel
from hybrid.weights.formats import GPU_FORMATS
from hybrid.weights.layout import packed_layout

TOLERANCE = 1.001


def optimum(model: TimeModel, cpu_only: PlacementPlan, budget: int) -> float:
    """Return the least seconds per token that the program finds."""
    plan = solve_milp(model, cpu_only, budget)
    assert plan is None or plan.vram_bytes <= budget
    return min(model.plan(plan or cpu_only), model.plan(cpu_only))


@given(machine=machines, budget=st.integers(0, 2 * ALL))
def test_random_machines(machine, budget):
    model = time_model(machine)
    # The solver rounds bytes, so the program gets 0.1 % less.
    least = optimum(model, CPU_ONLY, budget * 999 // 1000)
    assert model.plan(solve(model, CPU_ONLY, budget)) <= TOLERANCE * least


SHARES = (0.1, 0.25, 0.5, 0.8)  # of the bytes that the whole model takes


@pytest.mark.parametrize("format", slow_except(GPU_FORMATS, Format.q4))
@pytest.mark.parametrize("share", slow_except(SHARES, 0.25))
def test_a_model_of_52_layers(share, format):
    config = replace(
        CONFIG, vocab_size=122_753, hidden_size=1536, n_layers=52, n_heads=24, n_kv_heads=8,
        n_neurons=3840, max_context=4096,
    )  # fmt: skip
    hot_first = np.random.default_rng(0).beta(0.6, 4.4, (52, 3840))
    hot_first = -np.sort(-hot_first, 1)
    sizes = ModelSizes(packed_layout(config, format), 4096)
    model = TimeModel(MODELLED["ddr4-rtx3050"](), sizes, hot_first)
    cpu_only = cpu_plan(config, format.name, 4096, "model", "order")
    budget = int(share * sizes.plan(whole_plan(cpu_only)))
    plan = solve(model, cpu_only, budget)
    assert plan.vram_bytes <= budget
    assert model.plan(plan) <= TOLERANCE * optimum(model, cpu_only, budget)
