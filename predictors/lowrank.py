"""Trains low-rank predictors.

They are initialised by a truncated SVD of the gate in the metric of its inputs. Then they are
trained on their rounded values, with a loss that punishes misses more than false alarms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from predictors.predictors import (
    WIDE_RANK,
    Array,
    LowRank,
    column_scales,
    column_units,
    quantize_lowrank,
    round_blocks,
)
from predictors.trace import LayerTrace

MISS_WEIGHT = 40.0  # a miss costs as much as this many false alarms
BATCH = 256  # tokens
LEARNING_RATE = 2e-2  # relative to the size of each matrix's elements


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    recall: float = 0.99  # that training aims at
    epochs: int = 10
    patience: int = 3  # epochs without progress on held-out tokens
    seed: int = 0


class TokenSplit(NamedTuple):
    """Which tokens of a trace are trained on, and which measure the progress."""

    train: NDArray[np.intp]
    held_out: NDArray[np.intp]


class SvdBasis:
    """The gate's best approximations of every rank on some inputs.

    C is the second moment of the inputs, and W C^1/2 = U S V'. The approximations are b = U S and
    a = V' C^-1/2.
    """

    def __init__(self, trace: LayerTrace, tokens: NDArray[np.intp], threshold: float) -> None:
        x = torch.from_numpy(trace.inputs[tokens].astype(np.float32))
        gate = torch.from_numpy(trace.gate.astype(np.float32))
        moment = (x.T @ x / len(x)).double()
        values, vectors = torch.linalg.eigh(moment)
        # Directions without inputs are useless, and their inverse is noise.
        roots = values.clamp_min(values[-1] * 1e-8).sqrt()
        product = gate.double() @ (vectors * roots)
        # Compute U and S from the smaller product, which is (hidden, hidden).
        squares, right = torch.linalg.eigh(product.T @ product)
        order = squares.argsort(descending=True)
        right = right[:, order]
        self._b = (product @ right).float()  # (n_neurons, hidden): U S
        self._a = ((right.T / roots) @ vectors.T).float()  # (hidden, hidden): V' C^-1/2
        self._threshold = threshold
        self._residual = squares[order].flip(0).cumsum(0).flip(0)

    def matrices(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a (rank, hidden), b (n_neurons, rank) and bias (n_neurons,)."""
        b = self._b[:, :rank].clone()
        return self._a[:rank].clone(), b, torch.full((len(b),), -self._threshold)

    def predictor(self, rank: int, x: NDArray[np.float16]) -> LowRank:
        """Return the untrained, rounded predictor of a rank; `x` are some inputs."""
        a, b, bias = self.matrices(rank)
        return quantize_lowrank(a.numpy(), b.numpy(), bias.numpy(), x)


def train_lowrank(
    basis: SvdBasis,
    rank: int,
    trace: LayerTrace,
    tokens: TokenSplit,
    options: TrainingOptions,
) -> LowRank:
    """Train one predictor with weighted BCE and AdamW.

    The measure of progress is the share of neurons that must be predicted on held-out tokens for
    the recall aimed at. Training stops early if it no longer falls, and keeps the best epoch.
    """
    generator = torch.Generator().manual_seed(options.seed)
    a, b, bias = basis.matrices(rank)
    x = torch.from_numpy(trace.inputs.astype(np.float32))
    active = torch.from_numpy(trace.active())
    train_tokens, held_out_tokens = map(torch.from_numpy, tokens)
    with torch.no_grad():  # scale scores to deviation 3, the range in which the loss bends
        some = x[train_tokens[:BATCH]]
        z = some @ a.T
        size = z.square().mean(0).sqrt() + 1e-12
        a, b = a / size[:, None], b * size
        spread = 3.0 / (some @ a.T @ b.T + bias).std()
        b, bias = b * spread, bias * spread
    parameters = [a, b, bias]
    groups = []
    for parameter in parameters:
        parameter.requires_grad_()
        groups.append({"params": [parameter], "lr": LEARNING_RATE * _size(parameter)})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = options.epochs * -(-len(train_tokens) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (steps + 1))
    weight = torch.tensor(MISS_WEIGHT)

    def scores_of(tokens: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Return scores of the rounded matrices. Gradients ignore rounding (straight-through)."""
        with torch.no_grad():
            integers = (b / units).round()
            integers[:, WIDE_RANK:].clamp_(-8, 7)
            lost_b = integers * units - b
            lost_a = torch.from_numpy(round_blocks(a.detach().numpy())) - a
        return torch.addmm(bias, x[tokens] @ (a + lost_a).T, (b + lost_b).T)

    def predicted_share() -> float:
        with torch.no_grad():
            scores = scores_of(held_out_tokens, _units(b))
            hits = scores[active[held_out_tokens]]
            if not len(hits):
                return 0.0
            k = max(1, int((1.0 - options.recall) * len(hits)))
            return float((scores >= hits.kthvalue(k).values).float().mean())

    def snapshot() -> tuple[Array, Array, Array]:
        with torch.no_grad():
            return a.numpy().copy(), b.numpy().copy(), bias.numpy().copy()

    best, best_share, waited = snapshot(), predicted_share(), 0
    for _ in range(options.epochs):
        shuffled = train_tokens[torch.randperm(len(train_tokens), generator=generator)]
        units = _units(b)
        for batch in torch.split(shuffled, BATCH):
            optimizer.zero_grad(set_to_none=True)
            scores = scores_of(batch, units)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                scores, active[batch].float(), pos_weight=weight
            )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        share = predicted_share()
        if share < best_share:
            best, best_share, waited = snapshot(), share, 0
        else:
            waited += 1
            if waited >= options.patience:
                break
    return quantize_lowrank(*best, trace.inputs[tokens.train[:2048]])


def _units(b: torch.Tensor) -> torch.Tensor:
    """Return (n_neurons, rank): the value of one integer step of each element."""
    array = b.detach().numpy()
    return torch.from_numpy(column_units(column_scales(array), array.shape[1]))


def _size(parameter: torch.Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt()) + 1e-6
