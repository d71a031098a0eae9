"""The CPU's form of the transformer: operations that record `forward` into a native program."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from hybrid.kernels import Activation, Format, Predictor, Program, Rows
from hybrid.kernels.reference import rope_tables
from hybrid.model.config import ModelConfig
from hybrid.model.weights import LayerWeights, ModelWeights

_ROPE_STEP = 4096  # positions that are filled at once: some milliseconds


class _RopeTables:
    """Rope tables of a whole context, filled only as far as the sessions have come.

    The system provides memory as it is written, so that positions that are never used cost nothing.
    """

    def __init__(self, config: ModelConfig, n_context: int) -> None:
        self._config = config
        shape = n_context, config.head_dim // 2
        self.cos, self.sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.n_filled = 0
        self._lock = threading.Lock()  # sessions of several threads share the tables

    def fill(self, n_positions: int) -> int:
        """Fill the first `n_positions`, or a few more. Return how many are filled.

        Positions that are already filled may be read meanwhile. They are not written again.
        """
        config = self._config
        with self._lock:
            while self.n_filled < n_positions:
                first = self.n_filled
                last = min(first + _ROPE_STEP, len(self.cos))
                self.cos[first:last], self.sin[first:last] = rope_tables(
                    config.head_dim, config.rope_theta, last - first, first
                )
                self.n_filled = last
            return self.n_filled


def new_program(config: ModelConfig, format: Format, n_context: int) -> Program:
    """Return a program of the model's shape without operations, for up to `n_context` positions.

    Its sessions fill the rope tables as they need them.
    """
    tables = _RopeTables(config, n_context)
    tables.fill(1)
    return Program(
        format=format,
        hidden_size=config.hidden_size,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_cos=tables.cos,
        rope_sin=tables.sin,
        n_filled=tables.n_filled,
        fill_rope=tables.fill,
    )


class ProgramRecorder:
    """`forward.Operations` that compute nothing. Each one records a native operation."""

    def __init__(
        self,
        program: Program,
        config: ModelConfig,
        predictors: Sequence[Predictor | None] | None = None,
    ) -> None:
        """`predictors` has one entry per layer; an entry of None computes all gates."""
        self.program, self.config = program, config
        self.predictors = predictors or [None] * config.n_layers

    def embed(self, weights: ModelWeights[Rows], scale: float) -> None:
        self.program.embed(weights.embedding, scale)

    def qkv(self, x: None, weights: LayerWeights[Rows], layer: int) -> None:
        self.program.qkv(weights.attention_norm, weights.qkv, layer, weights.qkv_scales)

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

    def cold_ffn(self, weights: LayerWeights[Rows], layer: int, n_hot: int, n_gate: int) -> None:
        """Record the partial sum over the cold neurons, which the GPU then adds.

        Cold neurons are those from `n_hot` on. The GPU computes the gates before `n_gate`.
        """
        has_gates = n_gate < self.config.n_neurons
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
            first_neuron=n_hot,
            n_given=n_gate,
        )

    def end_segment(self, *, sends_x: bool) -> None:
        self.program.end_segment(sends_x=sends_x)

    def receive_x(self) -> None:
        self.program.receive_x()

    def head(self, x: None, weights: ModelWeights[Rows], scale: float) -> None:
        self.program.head(weights.norm, weights.head, scale, weights.preview)
