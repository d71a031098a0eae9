"""Solver: finds the placement plan with the least predicted time within a VRAM budget.

It is a dynamic program over the layers. Its state is the device that holds the residual stream, and
the bytes in use so far, rounded to LEVELS levels of the budget. Hot sets end at buckets of neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hybrid.placement.plan import ON_CPU, LayerPlacement, PlacementPlan, whole_plan
from hybrid.placement.time_model import TimeModel, buckets

LEVELS = 1 << 14
# Where the residual stream is: on the CPU while the GPU is unused, on the GPU, on the CPU again.
_UNUSED, _ON_GPU, _BACK = range(3)
# Hand-offs of the stream from state (row) to state (column).
_SWITCHES = np.array([[0.0, 1.0, np.nan], [np.nan, 0.0, 1.0], [np.nan, 1.0, 0.0]])


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan with a name and its predicted time."""

    name: str
    plan: PlacementPlan
    seconds: float  # per token


def solve(model: TimeModel, cpu_only: PlacementPlan, budget: int) -> PlacementPlan:
    """Return the fastest plan whose tensors take at most `budget` bytes.

    The budget excludes what CUDA needs for itself. `cpu_only` identifies the model.
    """
    return best(alternatives(model, cpu_only, budget)).plan


def best(alternatives: list[Alternative]) -> Alternative:
    """Return the fastest alternative. Among equals it is the one that uses least VRAM."""
    return min(alternatives, key=lambda a: (a.seconds, a.plan.vram_bytes))


def alternatives(model: TimeModel, cpu_only: PlacementPlan, budget: int) -> list[Alternative]:
    """Return the best plan of each kind that fits: CPU only, whole layers, hybrid, all on GPU.

    Whole layers and hybrid use the GPU even if that is slower than the CPU alone.
    """
    n = cpu_only.n_neurons
    hot_sets = (0, *(last for _, last in buckets(n)[:-1]))
    whole = (ON_CPU, LayerPlacement(True, n, n))
    all_gates = (LayerPlacement(True, n, n_hot) for n_hot in hot_sets)
    own_gates = (LayerPlacement(True, n_hot, n_hot) for n_hot in hot_sets)
    plans: dict[str, PlacementPlan | None] = {"CPU only": cpu_only}
    if model.machine.gpu is not None:
        plans["whole layers"] = _fastest(model, cpu_only, budget, whole)
        plans["hybrid"] = _fastest(model, cpu_only, budget, (*whole, *all_gates, *own_gates))
        everything = _sized(model, whole_plan(cpu_only))
        plans["all on the GPU"] = everything if everything.vram_bytes <= budget else None
    return [Alternative(name, plan, model.plan(plan)) for name, plan in plans.items() if plan]


def _fastest(
    model: TimeModel,
    cpu_only: PlacementPlan,
    budget: int,
    placements: Sequence[LayerPlacement],
) -> PlacementPlan | None:
    """Return the fastest plan that uses the GPU, each layer in one of `placements`.

    Return None if nothing fits.
    """
    # Buffers grow with the widest hot set, so plans without any have more room.
    without_hot = [placement for placement in placements if placement.n_hot == 0]
    found = [
        plan for some in (without_hot, placements) for plan in _solve(model, cpu_only, budget, some)
    ]
    return min(found, key=lambda plan: (model.plan(plan), plan.vram_bytes), default=None)


def _solve(
    model: TimeModel,
    cpu_only: PlacementPlan,
    budget: int,
    placements: Sequence[LayerPlacement],
) -> Iterator[PlacementPlan]:
    """Yield the fastest plans that fit, without and with the head on the GPU.

    They have room for buffers of the widest hot set of all `placements`.
    """
    sizes, n_layers = model.sizes, len(cpu_only.layers)
    room = budget - sizes.buffers(max(placement.n_hot for placement in placements))
    if room <= 0:
        return

    def levels(n_bytes: int) -> int:
        return round(n_bytes * LEVELS / room)

    fitting = [(p, levels(sizes.layer(p))) for p in placements if sizes.layer(p) <= room]
    arrival = np.where(np.isnan(_SWITCHES), np.inf, _SWITCHES * model.switch)
    # [state, level]: least seconds of the layers so far, with at most so many levels in use. Each
    # layer's rounded bytes may be half a level too many.
    seconds = np.full((len(arrival), LEVELS + n_layers // 2 + 2), np.inf)
    seconds[_UNUSED] = 0.0
    n_levels = seconds.shape[1]
    steps = []  # per layer: the state before it, and the index of its placement
    for layer in range(n_layers):
        arrived = seconds[:, None] + arrival[:, :, None]
        before, arrived = arrived.argmin(0).astype(np.int8), arrived.min(0)
        seconds, chosen = np.full_like(seconds, np.inf), np.zeros(seconds.shape, np.int8)
        for index, (placement, used) in enumerate(fitting):
            cost = model.layer(layer, placement).total
            for state in (_ON_GPU,) if placement.is_on_gpu else (_UNUSED, _BACK):
                total = arrived[state, : n_levels - used] + cost
                is_less = total < seconds[state, used:]
                np.copyto(seconds[state, used:], total, where=is_less)
                np.copyto(chosen[state, used:], np.int8(index), where=is_less)
        steps.append((before, chosen))

    def plan_at(is_head_on_gpu: bool, level: int) -> PlacementPlan | None:
        """Return the fastest plan whose layers use at most `level` levels."""
        arrived = seconds[:, level] + arrival[:, _ON_GPU if is_head_on_gpu else _BACK]
        if arrived.min() == np.inf:
            return None
        layers, state = [], arrived.argmin()
        for before, chosen in reversed(steps):
            placement, used = fitting[chosen[state, level]]
            layers.append(placement)
            level -= used
            state = before[state, level]
        layers.reverse()
        plan = replace(cpu_only, layers=tuple(layers), is_head_on_gpu=is_head_on_gpu)
        return _sized(model, plan)

    for is_head_on_gpu in (False, True):
        used = levels(sizes.head) if is_head_on_gpu else 0
        plans = (plan_at(is_head_on_gpu, level) for level in range(n_levels - 1 - used, -1, -1))
        fits = (plan for plan in plans if plan is not None and plan.vram_bytes <= budget)
        yield from itertools.islice(fits, 1)


def _sized(model: TimeModel, plan: PlacementPlan) -> PlacementPlan:
    return replace(plan, vram_bytes=model.sizes.plan(plan))
