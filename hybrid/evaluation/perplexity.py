"""Perplexity: measures how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hybrid.engine.engine import Engine
from hybrid.errors import InvalidOption
from hybrid.evaluation.fp32 import Fp32Engine
from hybrid.evaluation.likelihood import Scorer
from hybrid.progress import Progress, ignore_progress


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
    ids = engine.tokenizer.encode(text)
    if len(ids) < 2:
        raise InvalidOption("the text has fewer than two tokens, so there is nothing to predict")
    nats = 0.0
    with engine.open_session() as session:
        for first, scored, last in windows(len(ids), window, stride):
            progress("evaluating, tokens", scored, len(ids))
            nats -= Scorer(session).score(ids[first:scored], ids[scored:last]).logprob
    progress("evaluating, tokens", len(ids), len(ids))
    return Perplexity(nats, len(ids) - 1, len(text.encode()), window, stride)


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
