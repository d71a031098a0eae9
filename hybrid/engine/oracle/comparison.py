"""Compare the native engine with its oracle, teacher-forced on the same tokens.

At model level the two are never equal. A sum in another order sometimes moves an activation across
a rounding step. That step can flip a borderline neuron, and the difference spreads. Its size
depends on the model, its depth and the format. So a fixed bound would be too tight for one model
and too loose for another.

The bound is therefore measured with the model at hand. A second oracle has the same rounded
weights, but does not round activations and KV cache. Engine and oracle are two roundings of what
the second oracle computes. They differ by about as much as rounding changes, or by √2 times that
if their errors are independent. A wrong threshold, scale or kernel differs by far more.

A third oracle rounds nothing. It shows what rounding the weights changes, which the other two
cannot: they have the same rounded weights as the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid.checkpoint import Checkpoint
from hybrid.engine.oracle.executor import ReferenceSession, SideBySide, stream_weights
from hybrid.errors import NumericOverflow
from hybrid.kernels import Format, KvFormat
from hybrid.model.config import ModelConfig
from hybrid.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

Logits = NDArray[np.float32]  # (tokens, vocab)
Counts = NDArray[np.int64]  # (tokens, layers) active neurons

# A bound is a multiple of the measured yardstick plus a floor. The floor is for models on which
# rounding changes almost nothing. The largest multiples measured were 1.23 for rms, 1.59 for the
# largest difference, and 1.1 for flips (docs/log.md). They come from the bundled model and eight
# random models of 2 to 52 layers, in all formats and on all instruction sets. Floors are shares of
# the logits' standard deviation, or of all (neuron, token) pairs.
RMS_FACTOR, RMS_FLOOR = 2.0, 1e-3
MAX_FACTOR, MAX_FLOOR = 4.0, 1e-2
COUNT_FACTOR, COUNT_FLOOR = 3.0, 3e-4


@dataclass(frozen=True, slots=True)
class Run:
    """The logits and active counts that one executor computes for a text."""

    logits: Logits
    active: Counts


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of two runs. Those of logits are in units of the oracle's standard deviation."""

    rms: float
    largest: float
    worst_position: int
    # Differences in the number of active neurons, summed over tokens and layers, as a share of all
    # (neuron, token) pairs. It is a lower bound for the share of flipped mask bits.
    flips: float


def run_native(engine: Engine, ids: list[int]) -> tuple[Run, Logits]:
    """Decode the tokens one by one. Also return the logits of the same tokens in one prefill."""
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


class OracleRuns(NamedTuple):
    """What the oracles compute for the same text."""

    rounded: Run  # everything is rounded as the format says
    rounded_weights: Run  # activations and KV cache are not rounded
    fp32: Run  # nothing is rounded


def run_oracles(
    checkpoint: Checkpoint,
    format: Format,
    ids: list[int],
    *,
    kv: KvFormat = KvFormat.fp16,
    progress: Progress = ignore_progress,
) -> OracleRuns:
    config = checkpoint.config
    with np.errstate(all="ignore"):  # overflow of broken weights is a finding, not an error
        weights = stream_weights(checkpoint, format, progress=progress)
        rounded = ReferenceSession(weights, config, format, kv)
        rounded_weights = ReferenceSession(weights, config)
        logits = SideBySide((rounded, rounded_weights)).prefill(ids, weights, config)
        fp32 = ReferenceSession(stream_weights(checkpoint, None), config)
        logits.append(fp32.prefill(ids))
    sessions = (rounded, rounded_weights, fp32)
    return OracleRuns(
        *(
            Run(own, np.stack([mask.sum(1) for mask in session.active], 1))
            for session, own in zip(sessions, logits, strict=True)
        )
    )


def oracle_bytes(config: ModelConfig) -> int:
    """Estimate the peak memory of `run_oracles` in bytes.

    It holds the embedding, the head and two layers, because a layer is freed only when the next one
    has been read. Half a layer is added for temporary arrays.
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
    """Return the bounds of a correct engine. `yardstick` compares the two oracles."""
    return Comparison(
        rms=RMS_FACTOR * yardstick.rms + RMS_FLOOR,
        largest=MAX_FACTOR * yardstick.largest + MAX_FLOOR,
        worst_position=yardstick.worst_position,
        flips=COUNT_FACTOR * yardstick.flips + COUNT_FLOOR,
    )


def is_within(found: Comparison, bound: Comparison) -> bool:
    return found.rms <= bound.rms and found.largest <= bound.largest and found.flips <= bound.flips


def argmax_agreement(run: Run, oracle: Run, margin: float) -> tuple[int, int, int]:
    """Count tokens whose likeliest successor is the same in both runs.

    Returns the count over all tokens, the count over clear tokens, and the number of clear tokens.
    A token is clear if the oracle's likeliest successor leads by more than `margin`.
    """
    top = np.partition(oracle.logits, -2, -1)[:, -2:]
    is_clear = top[:, 1] - top[:, 0] > margin
    is_equal = run.logits.argmax(-1) == oracle.logits.argmax(-1)
    return int(is_equal.sum()), int((is_equal & is_clear).sum()), int(is_clear.sum())


def token_losses(logits: Logits, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] in nats per row. Broken weights give NaN."""
    with np.errstate(all="ignore"):
        largest = logits.max(1)
        sums = np.exp(logits - largest[:, None]).sum(1, dtype=np.float64)
        return np.log(sums) + largest - logits[np.arange(len(targets)), targets]


def finite_losses(logits: Logits, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `token_losses`. Raises NumericOverflow if the model computes no finite logits."""
    losses = token_losses(logits, targets)
    if not np.isfinite(losses).all():
        raise NumericOverflow(
            "the model computes logits that are not finite; hybrid.selfcheck looks for the reason"
        )
    return losses


def mean_loss(logits: Logits, ids: list[int]) -> float:
    """Return the mean loss of the text's own next tokens, in nats per token."""
    return float(token_losses(logits[:-1], np.asarray(ids[1:])).mean())
