"""Predictors that a model's own file brings, as those of PowerInfer and Kairox do."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.kernels import PredictorInput


@dataclass(frozen=True, slots=True)
class StoredPredictors:
    """A neuron is named if b z + its bias >= threshold, where z = relu(a x + biases).

    In each layer a is (rank, hidden_size) and b (n_neurons, rank). A checkpoint has them under the
    roles of ROLES; biases are zero where it has none.
    """

    maker: str  # "PowerInfer" or "Kairox"
    ranks: tuple[int, ...]  # of each layer
    input: PredictorInput  # what x is
    threshold: float
    has_biases: bool = False


FIRST, SECOND = "predictor_first", "predictor_second"
FIRST_BIAS, SECOND_BIAS = "predictor_first_bias", "predictor_second_bias"
ROLES = (FIRST, SECOND, FIRST_BIAS, SECOND_BIAS)
