"""CPU executor: owns the native program of a model and the threads that run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.engine.scheduler import SILENT, Scheduler
from hybrid.errors import InvalidOption
from hybrid.kernels import KvFormat, Predictor, Rows, Session, ThreadPool
from hybrid.model.forward import Operations, forward
from hybrid.model.program import ProgramRecorder, new_program
from hybrid.placement.plan import PlacementPlan
from hybrid.weights.layout import PackedLayout
from hybrid.weights.packing import PackedModel


class CpuExecutor:
    """A packed model that is ready to run: one program, one thread pool, many sessions."""

    def __init__(
        self,
        model: PackedModel,
        layout: PackedLayout,
        *,
        n_threads: int,
        n_context: int,
        predictors: Sequence[Predictor | None] | None = None,
        plan: PlacementPlan | None = None,
    ) -> None:
        """`predictors` has one entry per layer; an entry of None computes all gates.

        With a plan, the program holds only what the plan leaves to the CPU. Raises InvalidOption if
        the threads cannot be started.
        """
        self.model, self.layout, self.n_context = model, layout, n_context
        config = layout.config
        try:
            self.pool = ThreadPool(n_threads)
        except RuntimeError as error:
            raise InvalidOption(f"threads: cannot start {n_threads} threads ({error})") from error
        self.program = new_program(config, layout.format, n_context)
        recorder = ProgramRecorder(self.program, config, predictors)
        ops: Operations[Rows, Any, Any, None] = recorder
        if plan is not None:
            ops = Scheduler(plan, recorder, SILENT)
        forward(ops, model, config)
        self.program.seal()

    @property
    def n_segments(self) -> int:
        """Number of segments, the parts between hand-offs. It is 1 if all is on the CPU."""
        return self.program.n_segments

    def close(self) -> None:
        """Do nothing: open sessions keep the program and the threads alive."""

    def open_session(
        self, *, is_dense: bool = False, is_timed: bool = False, kv: KvFormat = KvFormat.fp16
    ) -> Session:
        """Open a new sequence with its own KV cache. It keeps the program and the threads alive.

        `kv` is what the KV cache stores. `is_dense` computes all neurons, for comparisons; the
        results are the same. `is_timed` measures where time goes.
        """
        return Session(self.program, self.pool, self.n_context, is_dense, is_timed, kv)
