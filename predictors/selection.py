"""Which kind of predictor, of what rank and with what margin, each layer uses for a recall: the
cheapest one by measured cost that reaches it on held-out tokens, else exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.file import Choice
from predictors.predictors import Array, LayerPredictor, margin_for_recall, measure_quality
from predictors.trace import LayerTrace

EXACT = "exact"


@dataclass(frozen=True, slots=True)
class CostTable:
    """Nanoseconds for one layer and token, as the trace holds them."""

    exact_ns: float
    named_row_ns: float
    lowrank_ns: Mapping[int, float]
    sign_ns: float
    n_neurons: int

    @classmethod
    def of(cls, costs: Mapping[str, Any], n_neurons: int) -> CostTable:
        return cls(
            exact_ns=float(costs["exact_ns"]),
            named_row_ns=float(costs["named_row_ns"]),
            lowrank_ns={int(rank): float(ns) for rank, ns in costs["lowrank_ns"].items()},
            sign_ns=float(costs["sign_ns"]),
            n_neurons=n_neurons,
        )

    def of_predictor(self, kind: str, rank: int, predicted: float) -> float:
        """Of asking the predictor and computing the gates that it names; ranks between measured
        ones are interpolated.
        """
        rows = predicted * self.n_neurons * self.named_row_ns
        if kind == "sign":
            return self.sign_ns + rows
        ranks = sorted(self.lowrank_ns)
        return float(np.interp(rank, ranks, [self.lowrank_ns[r] for r in ranks])) + rows


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Tokens that predictors are measured on, and not made from."""

    inputs: NDArray[np.float16]  # (n, hidden)
    active: NDArray[np.bool_]  # (n, n_neurons)
    magnitude: Array  # (n, n_neurons) the gate's activation

    @classmethod
    def of(cls, trace: LayerTrace, tokens: NDArray[np.intp]) -> HeldOut:
        inputs, active = trace.inputs[tokens], trace.active()[tokens]
        gates = inputs.astype(np.float32) @ trace.gate.T.astype(np.float32)
        return cls(inputs, active, np.where(active, np.maximum(gates, 0), 0).astype(np.float32))


def candidates_for(
    predictor: LayerPredictor, held_out: HeldOut, recalls: Sequence[float], costs: CostTable
) -> dict[float, Choice]:
    """What a predictor comes to for each recall: half of the held-out tokens set its margin, the
    other half says how well it does.
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
            kind=predictor.kind,
            rank=predictor.rank,
            margin=margin,
            recall=quality.recall,
            weighted_recall=quality.weighted_recall,
            precision=quality.precision,
            predicted=quality.predicted,
            cost_ns=costs.of_predictor(predictor.kind, predictor.rank, quality.predicted),
            exact_ns=costs.exact_ns,
        )
    return choices


def exact_choice(costs: CostTable) -> Choice:
    return Choice(EXACT, 0, 0.0, 1.0, 1.0, 1.0, 1.0, costs.exact_ns, costs.exact_ns)


def cheapest(choices: Sequence[Choice], costs: CostTable) -> Choice:
    """The cheapest of them, or exact where none is cheaper than that."""
    return min((exact_choice(costs), *choices), key=lambda choice: choice.cost_ns)
