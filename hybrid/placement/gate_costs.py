"""Measure what finding a token's active neurons costs on this machine.

The engine computes all gate rows, or runs a predictor and computes the rows that it names. Both are
measured with the real kernels on one thread, so that predictors are chosen by time, not by bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypedDict

import numpy as np

from hybrid.kernels import Activation, Format, Predictor, Rows, _native
from hybrid.placement.hardware import last_level_cache_bytes
from hybrid.weights.formats import row_bytes
from hybrid.weights.packed_predictor import pack_predictor, predictor_bytes
from hybrid.weights.packed_rows import matrix_bytes, pack_bit_reversed, pack_bundles, pack_matrix
from predictors.predictors import WIDE_RANK, LowRank

RANKS = (20, 36, 68, 132, 260, 516)  # ranks that fill whole lines of the kernels' layout
_PREDICTED = 0.25  # share of rows that is named while the cost of a named row is measured
_ROUNDS = 5


class GateCosts(TypedDict):
    """Nanoseconds for one layer of `n_neurons` neurons, for one token on one thread."""

    exact_ns: float  # all gate rows
    named_row_ns: float  # each row that a predictor names
    lowrank_ns: dict[str, float]  # by rank: both matrices, if no neuron is named


def measure_gate_costs(
    format: Format, hidden_size: int, n_neurons: int, n_layers: int
) -> GateCosts:
    """Measure the costs, which takes a few seconds.

    Weights are random. There are as many copies as the model has layers, or as many as exceed the
    cache, and they are used one after the other. So they are read from memory or cache as the
    model's own weights are.
    """
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((n_neurons, hidden_size), np.float32)
    x = _native.quantize(format, rng.standard_normal(hidden_size).astype(np.float32))[None]
    up, down = pack_bundles(format, gate[:1].repeat(n_neurons, 0), gate[:1].repeat(n_neurons, 0))

    def seconds(copies: list[tuple[Rows, Predictor | None]]) -> float:
        """Return the seconds for one layer in which no neuron fires."""

        def run(gate: Rows, predictor: Predictor | None) -> None:
            _native.sparse_ffn(
                gate, up, down, x, 0, n_neurons, Activation.fatrelu, np.inf, False, predictor
            )

        return _best(run, copies)

    def n_copies(n_bytes: int) -> int:
        return min(n_layers, 1 + 2 * (last_level_cache_bytes() or 0) // max(n_bytes, 1))

    def predicting(predictor: LowRank, predicted: float = 0.0) -> float:
        row = sum(row_bytes(format, hidden_size))
        n_bytes = predictor_bytes(format, predictor, hidden_size)
        n = n_copies(n_bytes + int(predicted * n_neurons) * row)
        gates = [pack_bit_reversed(format, gate) for _ in range(n if predicted else 1)]
        return seconds(
            [(gates[i % len(gates)], pack_predictor(format, predictor, 0.0)) for i in range(n)]
        )

    def lowrank(rank: int, predicted: float) -> LowRank:
        bias = np.where(rng.random(n_neurons) < predicted, 1e30, -1e30).astype(np.float32)
        return LowRank(
            np.ones((rank, hidden_size), np.float32),
            rng.integers(-8, 8, (n_neurons, rank)).astype(np.int8),
            np.ones((n_neurons, 2), np.float32),
            bias,
        )

    largest = hidden_size // 2 + WIDE_RANK
    ranks = [rank for rank in RANKS if rank <= largest] or [largest // 4 * 4]
    none = {rank: predicting(lowrank(rank, 0.0)) for rank in ranks}
    some = predicting(lowrank(ranks[0], _PREDICTED), predicted=_PREDICTED)
    n_exact = n_copies(matrix_bytes(format, n_neurons, hidden_size))
    return {
        "exact_ns": 1e9 * seconds([(pack_matrix(format, gate), None) for _ in range(n_exact)]),
        "named_row_ns": 1e9 * max(0.0, some - none[ranks[0]]) / (_PREDICTED * n_neurons),
        "lowrank_ns": {str(rank): 1e9 * cost for rank, cost in none.items()},
    }


def _best(
    run: Callable[[Rows, Predictor | None], None], copies: list[tuple[Rows, Predictor | None]]
) -> float:
    """Return the seconds of one call, from the best of several rounds over all copies."""
    best = np.inf
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for gate, predictor in copies:
            run(gate, predictor)
        best = min(best, (time.perf_counter() - started) / len(copies))
    return float(best)
