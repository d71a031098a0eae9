"""Open the executor of a plan: the CPU's alone, or the one for both devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.loading.model_spec import ModelSpec
from hybrid.engine.loading.planning import PlanDecision, measured_gpu, solve_for
from hybrid.engine.session import NativeSession
from hybrid.errors import OutOfMemory
from hybrid.kernels import Predictor, ThreadPool
from hybrid.placement.plan import PlacementPlan
from hybrid.weights.packing import PackedModel

SMALLER = 0.8  # share of a budget that is tried next if the budget was too large
_ATTEMPTS = 4


class Executor(Protocol):
    """A model that is ready to run."""

    @property
    def pool(self) -> ThreadPool: ...
    def open_session(self, *, is_dense: bool = False, is_timed: bool = False) -> NativeSession: ...
    def close(self) -> None: ...


def open_executor(
    decision: PlanDecision,
    spec: ModelSpec,
    model: PackedModel,
    predictors: Sequence[Predictor | None] | None,
    home: Path | None,
) -> tuple[Executor, PlacementPlan, tuple[str, ...]]:
    """Return the executor, the plan in use, and notices.

    If a plan that was solved for this load does not fit into VRAM after all, a plan for a smaller
    budget is solved and tried. A plan from a file is never replaced. Raises OutOfMemory,
    InvalidOption, DeviceFailed.
    """
    notices = list(decision.notices)
    for attempt in range(_ATTEMPTS):
        plan = decision.plan
        cpu = CpuExecutor(
            model,
            spec.config,
            spec.format,
            n_threads=spec.n_threads,
            n_context=spec.n_context,
            predictors=predictors,
            plan=plan,
        )
        if not plan.uses_gpu:
            return cpu, plan, tuple(notices)
        try:
            return _hybrid(decision, spec, model, cpu), plan, tuple(notices)
        except OutOfMemory as error:
            if not decision.is_solved or attempt == _ATTEMPTS - 1:
                raise
            assert decision.device is not None
            assert decision.kernels is not None
            machine = measured_gpu(decision.device, decision.kernels, spec, home)
            budget = int(SMALLER * plan.vram_budget)
            smaller, _ = solve_for(machine, spec, budget)
            smaller = replace(smaller, hand_offs=plan.hand_offs)
            notices.append(f"planned anew for {budget / 2**20:.0f} MiB of VRAM, because {error}")
            decision = replace(decision, plan=smaller)
    raise AssertionError("the last attempt returns or raises")


def _hybrid(
    decision: PlanDecision,
    spec: ModelSpec,
    model: PackedModel,
    cpu: CpuExecutor,
) -> Executor:
    from hybrid.engine.gpu.executor import HybridExecutor
    from hybrid.weights.unpacked import PackedReader

    assert decision.device is not None
    reader = PackedReader(model.embedding.memory, spec.layout)
    return HybridExecutor(
        cpu,
        model,
        reader,
        decision.plan,
        decision.device,
        n_context=spec.n_context,
        decode_kernels=decision.kernels,
    )
