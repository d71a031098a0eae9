"""CPU executor: records the forward pass as a native program, and owns the threads that run it."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.engine.scheduler import SILENT, Scheduler
from hybrid.errors import InvalidOption
from hybrid.kernels import Activation, Format, Predictor, Program, Rows, Session, ThreadPool
from hybrid.kernels.reference import rope_tables
from hybrid.model.config import ModelConfig
from hybrid.model.forward import forward
from hybrid.model.weights import LayerWeights, ModelWeights
from hybrid.placement.plan import LayerPlacement, PlacementPlan
from hybrid.weights.packing import PackedModel


class ProgramRecorder:
    """`forward.Operations` that compute nothing. Each one records a native operation."""

    def __init__(
        self, program: Program, config: ModelConfig, predictors: Sequence[Predictor | None]
    ) -> None:
        self.program, self.config, self.predictors = program, config, predictors

    def embed(self, weights: ModelWeights[Rows], scale: float) -> None:
        self.program.embed(weights.embedding, scale)

    def qkv(self, x: None, weights: LayerWeights[Rows], layer: int) -> None:
        self.program.qkv(weights.attention_norm, weights.qkv, layer)

    def attend(
        self, x: None, q: None, weights: LayerWeights[Rows], layer: int, scale: float
    ) -> None:
        self.program.attend(weights.o, scale, layer)

    def ffn(self, x: None, weights: LayerWeights[Rows], layer: int, scale: float) -> None:
        activation = Activation[self.config.activation]
        self.program.ffn(
            weights.ffn_norm,
            weights.gate,
            weights.up,
            weights.down,
            activation,
            self.config.threshold,
            scale,
            layer,
            self.predictors[layer],
        )

    def cold_ffn(self, weights: LayerWeights[Rows], layer: int, placement: LayerPlacement) -> None:
        """Record the partial sum over the cold neurons, which the GPU then adds."""
        has_gates = placement.n_gate < self.config.n_neurons
        self.program.ffn(
            None,
            weights.gate,
            weights.up,
            weights.down,
            Activation[self.config.activation],
            self.config.threshold,
            1.0,
            layer,
            self.predictors[layer] if has_gates else None,
            first_neuron=placement.n_hot,
            n_given=placement.n_gate,
        )

    def end_segment(self, *, sends_x: bool) -> None:
        self.program.end_segment(sends_x=sends_x)

    def receive_x(self) -> None:
        self.program.receive_x()

    def head(self, x: None, weights: ModelWeights[Rows], scale: float) -> None:
        self.program.head(weights.norm, weights.head, scale, weights.preview)


class CpuExecutor:
    """A packed model that is ready to run: one program, one thread pool, many sessions."""

    def __init__(
        self,
        model: PackedModel,
        config: ModelConfig,
        format: Format,
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
        cos, sin = rope_tables(config.head_dim, config.rope_theta, n_context)
        self.n_context = n_context
        try:
            self.pool = ThreadPool(n_threads)
        except RuntimeError as error:
            raise InvalidOption(f"threads: cannot start {n_threads} threads ({error})") from error
        self.program = Program(
            format=format,
            hidden_size=config.hidden_size,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_cos=cos,
            rope_sin=sin,
        )
        recorder = ProgramRecorder(self.program, config, predictors or [None] * config.n_layers)
        if plan is None or not plan.uses_gpu:
            forward(recorder, model, config)
        else:
            Scheduler(plan, recorder, SILENT).run(model, config)
        self.program.seal()

    @property
    def n_segments(self) -> int:
        """Number of segments, the parts between hand-offs. It is 1 if all is on the CPU."""
        return self.program.n_segments

    def close(self) -> None:
        """Do nothing: open sessions keep the program and the threads alive."""

    def open_session(self, *, is_dense: bool = False, is_timed: bool = False) -> Session:
        """Open a new sequence with its own KV cache. It keeps the program and the threads alive.

        `is_dense` computes all neurons, for comparisons; the results are the same. `is_timed`
        measures where time goes.
        """
        return Session(self.program, self.pool, self.n_context, is_dense, is_timed)
