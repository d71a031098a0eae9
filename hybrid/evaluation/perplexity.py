"""Perplexity: measures how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.engine import Engine
from hybrid.engine.oracle.comparison import finite_losses
from hybrid.errors import InvalidOption
from hybrid.evaluation.fp32 import EvaluatedSession, Fp32Engine
from hybrid.progress import Progress, ignore_progress

CHUNK = 256  # tokens whose logits are in memory at once


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The loss of predicting a text."""

    nats: float  # loss of all tokens together
    n_tokens: int  # number of predicted tokens
    n_bytes: int  # bytes of the text in UTF-8
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """e to the power of the mean loss per token. It depends on the tokenizer."""
        return math.exp(min(self.nats / self.n_tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of text, to compare models with different tokenizers."""
        return self.nats / math.log(2) / self.n_bytes


def measure_perplexity(
    engine: Engine | Fp32Engine,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Progress = ignore_progress,
) -> Perplexity:
    """Measure how well the model predicts `text`, window by window.

    A window has at most `window` tokens (default: the context). It begins `stride` tokens after the
    one before (default: half a window). The text begins with the model's beginning-of-text token,
    if it has one.

    Raises InvalidOption for sizes that do not fit, and for a text of fewer than two tokens, and
    NumericOverflow if logits are not finite.
    """
    window = engine.n_context if window is None else window
    if not 2 <= window <= engine.n_context:
        raise InvalidOption(
            f"window: expected 2 to {engine.n_context}, the context size, found {window}"
        )
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise InvalidOption(
            f"stride: expected 1 to {window - 1}, less than the window, found {stride}"
        )
    ids = np.asarray(engine.tokenizer.encode(text), np.int64)
    if ids.size < 2:
        raise InvalidOption("the text has fewer than two tokens, so there is nothing to predict")
    nats = 0.0
    with engine.open_session() as session:
        for first, scored, last in windows(ids.size, window, stride):
            progress("evaluating, tokens", scored, ids.size)
            nats += _losses(session, ids[first:last], scored - first)
    progress("evaluating, tokens", ids.size, ids.size)
    return Perplexity(nats, ids.size - 1, len(text.encode()), window, stride)


def _losses(session: EvaluatedSession, ids: NDArray[np.int64], scored: int) -> float:
    """Return the loss in nats of a window's tokens from `scored` on."""
    session.reset()
    if scored > 1:
        session.prefill(ids[: scored - 1])
    nats = 0.0
    for start in range(scored - 1, ids.size - 1, CHUNK):
        end = min(start + CHUNK, ids.size - 1)
        logits = session.prefill(ids[start:end], all_logits=True)
        assert logits is not None
        nats += float(finite_losses(logits, ids[start + 1 : end + 1]).sum())
    return nats


def windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, first predicted token, end) of each window.

    The predicted tokens of a window follow directly after those of the window before.
    """
    scored = 1
    for first in range(0, n_tokens, stride):
        last = min(first + window, n_tokens)
        if last > scored:
            yield first, scored, last
            scored = last
