"""The native engine beside its oracle, teacher-forced on the same tokens: figures, and bounds.

At model level the two are never equal: a sum in another order moves an activation across a
rounding step now and then, the step flips a borderline neuron, and both spread. How far depends on
the model, its depth and the format, so a fixed bound would be too tight for one and blind for
another. The yardstick is measured with the model at hand: a second oracle has the same rounded
weights but does not round activations and KV cache. Engine and oracle are two roundings of what
it computes, and differ by about what rounding moves (√2 times where their errors have nothing in
common any more); a wrong threshold, scale or kernel differs by far more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, SideBySide, stream_weights
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

Logits = NDArray[np.float32]  # (tokens, vocab)
Counts = NDArray[np.int64]  # (tokens, layers) active neurons

# Multiples of the yardstick, and a floor for models on which rounding does almost nothing. Measured
# on the bundled model and eight random ones of 2 to 52 layers, in all formats, on all instruction
# sets: at most 1.23, 1.59 and 1.1 (docs/log.md). The floors are shares of the logits' standard
# deviation and of all (neuron, token) pairs.
RMS_FACTOR, RMS_FLOOR = 2.0, 1e-3
MAX_FACTOR, MAX_FLOOR = 4.0, 1e-2
COUNT_FACTOR, COUNT_FLOOR = 3.0, 3e-4


@dataclass(frozen=True, slots=True)
class Run:
    """What one executor makes of a text."""

    logits: Logits
    active: Counts


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of two runs; the logits' in standard deviations of the oracle's logits."""

    rms: float
    largest: float
    worst_position: int
    # Share of (neuron, token) pairs by which the numbers of active neurons differ, token by token
    # and layer by layer: at least so many masks are flipped.
    flips: float


def run_native(engine: Engine, ids: list[int]) -> tuple[Run, Logits]:
    """The tokens one by one, and the logits of the same tokens at once."""
    at_once = engine.open_session().prefill(np.asarray(ids, np.int64), all_logits=True)
    assert at_once is not None
    session = engine.open_session()
    logits = np.empty_like(at_once)
    counts = np.zeros((len(ids) + 1, engine.config.n_layers), np.int64)
    for position, token in enumerate(ids):
        session.decode(token)
        logits[position] = session.logits
        counts[position + 1] = session.active_counts
    return Run(logits, np.diff(counts, axis=0)), at_once


def run_oracles(
    checkpoint: Checkpoint, format: Format, ids: list[int], *, progress: Progress = ignore_progress
) -> tuple[Run, Run]:
    """(the oracle of the format, the same weights without rounding activations)."""
    config = checkpoint.config
    with np.errstate(all="ignore"):  # broken weights may overflow: that is a finding, not a fault
        weights = stream_weights(checkpoint, format, progress=progress)
        sessions = ReferenceSession(weights, config, format), ReferenceSession(weights, config)
        logits = SideBySide(sessions).prefill(ids, weights, config)
    runs = [
        Run(own, np.stack([mask.sum(1) for mask in session.active], 1))
        for session, own in zip(sessions, logits, strict=True)
    ]
    return runs[0], runs[1]


def oracle_bytes(config: ModelConfig) -> int:
    """Memory that `run_oracles` takes at its peak, about: embedding and head, and two layers, since
    one is let go when the next has been read; and half a layer on the way.
    """
    attention = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer = config.hidden_size * (attention + 3 * config.n_neurons)
    ends = config.vocab_size * config.hidden_size * (1 if config.has_tied_head else 2)
    return int(4 * (ends + 2.5 * layer))


def compare(run: Run, oracle: Run, n_neurons: int) -> Comparison:
    with np.errstate(all="ignore"):
        difference = np.abs(run.logits - oracle.logits)
        deviation = float(oracle.logits.std(dtype=np.float64))
        by_position = np.sqrt(np.mean(np.square(difference, dtype=np.float64), -1))
    return Comparison(
        rms=float(np.sqrt(np.mean(by_position**2))) / deviation,
        largest=float(difference.max()) / deviation,
        worst_position=int(by_position.argmax()),
        flips=float(np.abs(run.active - oracle.active).sum() / (run.active.size * n_neurons)),
    )


def bounds(yardstick: Comparison) -> Comparison:
    """What an engine without faults stays below, from the oracle against its unrounded twin."""
    return Comparison(
        rms=RMS_FACTOR * yardstick.rms + RMS_FLOOR,
        largest=MAX_FACTOR * yardstick.largest + MAX_FLOOR,
        worst_position=yardstick.worst_position,
        flips=COUNT_FACTOR * yardstick.flips + COUNT_FLOOR,
    )


def is_within(found: Comparison, bound: Comparison) -> bool:
    return found.rms <= bound.rms and found.largest <= bound.largest and found.flips <= bound.flips


def argmax_agreement(run: Run, oracle: Run, margin: float) -> tuple[int, int, int]:
    """(tokens whose likeliest successor is the oracle's; of them those where the oracle's likeliest
    leads by more than `margin`; how many of those there are).
    """
    top = np.partition(oracle.logits, -2, -1)[:, -2:]
    is_clear = top[:, 1] - top[:, 0] > margin
    is_equal = run.logits.argmax(-1) == oracle.logits.argmax(-1)
    return int(is_equal.sum()), int((is_equal & is_clear).sum()), int(is_clear.sum())


def token_losses(logits: Logits, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] in nats, row by row; NaN where weights are broken."""
    with np.errstate(all="ignore"):
        largest = logits.max(1)
        sums = np.exp(logits - largest[:, None]).sum(1, dtype=np.float64)
        return np.log(sums) + largest - logits[np.arange(len(targets)), targets]


def mean_loss(logits: Logits, ids: list[int]) -> float:
    """Nats per token of the text's own next tokens."""
    return float(token_losses(logits[:-1], np.asarray(ids[1:])).mean())
