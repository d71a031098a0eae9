"""Open the executor of a plan: the CPU's alone, or the one for both devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from hybrid.engine.cpu.executor import CpuExecutor
from hybrid.engine.loading.choices import check_context_memory
from hybrid.engine.loading.model_spec import ModelSpec
from hybrid.engine.loading.planning import PlanDecision, measured_gpu, solve_for
from hybrid.engine.session import NativeSession
from hybrid.errors import OutOfMemory
from hybrid.kernels import KvFormat, Predictor, ThreadPool
from hybrid.notices import Notices
from hybrid.placement.plan import PlacementPlan
from hybrid.weights.packing import PackedModel

SMALLER = 0.8  # share of a budget that is tried next if the budget was too large
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Weights:
    """What executors compute with."""

    model: PackedModel
    predictors: Sequence[Predictor | None] | None  # per layer; None: every gate is computed


class Executor(Protocol):
    """A model that is ready to run."""

    @property
    def pool(self) -> ThreadPool: ...
    def open_session(
        self, *, is_dense: bool = False, is_timed: bool = False, kv: KvFormat = KvFormat.fp16
    ) -> NativeSession: ...
    def close(self) -> None: ...


def open_executor(
    decision: PlanDecision,
    spec: ModelSpec,
    weights: Weights,
    home: Path | None,
    notices: Notices,
) -> tuple[Executor, PlacementPlan]:
    """Return the executor and the plan in use.

    If a plan that was solved for this load does not fit into VRAM after all, a plan for a smaller
    budget is solved and tried. A plan from a file is never replaced. Raises OutOfMemory,
    InvalidOption, DeviceFailed.
    """
    for attempt in range(_ATTEMPTS):
        plan = decision.plan
        n_cpu_layers = sum(not layer.is_on_gpu for layer in plan.layers)
        check_context_memory(spec.config, spec.n_context, n_cpu_layers)
        cpu = CpuExecutor(
            weights.model,
            spec.layout,
            n_threads=spec.n_threads,
            n_context=spec.n_context,
            predictors=weights.predictors,
            plan=plan,
        )
        if not plan.uses_gpu:
            return cpu, plan
        try:
            return _hybrid(decision, cpu), plan
        except OutOfMemory as error:
            if not decision.is_solved or attempt == _ATTEMPTS - 1:
                raise
            assert decision.device is not None
            assert decision.kernels is not None
            machine = measured_gpu(decision.device, decision.kernels, spec, home, notices)
            budget = int(SMALLER * plan.vram_budget)
            smaller = solve_for(machine, spec, budget, Notices())
            notices.add(f"planned anew for {budget / 2**20:.0f} MiB of VRAM, because {error}")
            decision = replace(decision, plan=smaller)
    raise AssertionError("the last attempt returns or raises")


def _hybrid(decision: PlanDecision, cpu: CpuExecutor) -> Executor:
    from hybrid.engine.gpu.executor import HybridExecutor

    assert decision.device is not None
    return HybridExecutor(cpu, decision.plan, decision.device, decode_kernels=decision.kernels)
