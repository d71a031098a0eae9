"""Selects each layer's predictor for a recall: its rank and margin.

The choice is the cheapest one by measured cost that reaches the recall on held-out tokens. If none
is cheaper than computing all gates, it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.file import EXACT, LOWRANK, Choice
from predictors.predictors import Array, LowRank, margin_for_recall, measure_quality
from predictors.trace import LayerTrace


@dataclass(frozen=True, slots=True)
class CostTable:
    """Measured nanoseconds for one layer and one token, from the trace."""

    exact_ns: float
    named_row_ns: float
    lowrank_ns: Mapping[int, float]
    n_neurons: int

    @classmethod
    def of(cls, costs: Mapping[str, Any], n_neurons: int) -> CostTable:
        return cls(
            exact_ns=float(costs["exact_ns"]),
            named_row_ns=float(costs["named_row_ns"]),
            lowrank_ns={int(rank): float(ns) for rank, ns in costs["lowrank_ns"].items()},
            n_neurons=n_neurons,
        )

    def of_predictor(self, rank: int, predicted: float) -> float:
        """Return the ns to run the predictor and to compute the gates that it names.

        The cost of a rank between two measured ones is interpolated.
        """
        rows = predicted * self.n_neurons * self.named_row_ns
        ranks = sorted(self.lowrank_ns)
        return float(np.interp(rank, ranks, [self.lowrank_ns[r] for r in ranks])) + rows


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Tokens that predictors are measured on, but not made from."""

    inputs: NDArray[np.float16]  # (n, hidden)
    active: NDArray[np.bool_]  # (n, n_neurons)
    magnitude: Array  # (n, n_neurons): the gate's activation

    @classmethod
    def of(cls, trace: LayerTrace, tokens: NDArray[np.intp]) -> HeldOut:
        inputs, active = trace.inputs[tokens], trace.active()[tokens]
        gates = inputs.astype(np.float32) @ trace.gate.T.astype(np.float32)
        return cls(inputs, active, np.where(active, np.maximum(gates, 0), 0).astype(np.float32))


def candidates_for(
    predictor: LowRank, held_out: HeldOut, recalls: Sequence[float], costs: CostTable
) -> dict[float, Choice]:
    """Return a predictor's choice for each recall.

    The first half of the held-out tokens sets the margin, and the second half measures the quality.
    """
    scores = predictor.scores(held_out.inputs)
    half = len(scores) // 2
    choices = {}
    for recall in recalls:
        margin = margin_for_recall(scores[:half], held_out.active[:half], recall)
        quality = measure_quality(
            scores[half:], held_out.active[half:], held_out.magnitude[half:], margin
        )
        choices[recall] = Choice(
            kind=LOWRANK,
            rank=predictor.rank,
            margin=margin,
            recall=quality.recall,
            weighted_recall=quality.weighted_recall,
            precision=quality.precision,
            predicted=quality.predicted,
            cost_ns=costs.of_predictor(predictor.rank, quality.predicted),
            exact_ns=costs.exact_ns,
        )
    return choices


def exact_choice(costs: CostTable) -> Choice:
    return Choice(EXACT, 0, 0.0, 1.0, 1.0, 1.0, 1.0, costs.exact_ns, costs.exact_ns)


def cheapest(choices: Sequence[Choice], costs: CostTable) -> Choice:
    """Return the cheapest choice, or exact if none is cheaper than that."""
    return min((exact_choice(costs), *choices), key=lambda choice: choice.cost_ns)
