"""Log-likelihoods: how likely a model finds tokens that follow other tokens.

Texts are split into context and continuation as lm-evaluation-harness 0.4.13 splits them
(https://github.com/EleutherAI/lm-evaluation-harness, `TemplateLM` in lm_eval/api/model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hybrid.engine.engine import Engine
from hybrid.engine.oracle.comparison import finite_losses
from hybrid.errors import InvalidOption
from hybrid.evaluation.fp32 import EvaluatedSession, Fp32Engine

CHUNK = 256  # tokens whose logits are in memory at once


class Likelihood(NamedTuple):
    """How likely a model finds a continuation."""

    logprob: float  # natural logarithm, the sum over all tokens
    is_greedy: bool  # whether each token is the likeliest one, given those before it


class Scorer:
    """Scores continuations, one after the other, in a session of its own.

    Tokens that a context shares with the one before are not computed again.
    """

    def __init__(self, session: EvaluatedSession) -> None:
        """Empty the session."""
        session.reset()
        self._session, self._read = session, list[int]()

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """Score the tokens of `continuation` after those of `context`, at least one each.

        Raises ContextOverflow if all of them but the last do not fit into the context, and
        InvalidOption if there is nothing to score.
        """
        if not continuation:
            raise InvalidOption("a continuation has no token of its own, so it has no likelihood")
        ids = [*context, *continuation]
        scored = len(context)  # index of the first token that is predicted
        n_common = 0
        for read, token in zip(self._read, ids[: scored - 1], strict=False):
            if read != token:
                break
            n_common += 1
        self._session.truncate(n_common)
        if n_common < scored - 1:
            self._session.prefill(ids[n_common : scored - 1])
        nats, is_greedy = 0.0, True
        for start in range(scored - 1, len(ids) - 1, CHUNK):
            end = min(start + CHUNK, len(ids) - 1)
            logits = self._session.prefill(ids[start:end], all_logits=True)
            assert logits is not None
            targets = np.array(ids[start + 1 : end + 1])
            nats += float(finite_losses(logits, targets).sum())
            is_greedy = is_greedy and bool((logits.argmax(-1) == targets).all())
        self._read = ids[:-1]
        return Likelihood(-nats, is_greedy)


def encode_pair(
    engine: Engine | Fp32Engine, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and those of its continuation.

    White space at the context's end counts as the continuation's. Both are encoded together; the
    tokens that follow as many as the context alone has are the continuation. An empty context
    becomes the one token of `prefix_token`.
    """
    encode = engine.tokenizer.encode
    before = encode(context.rstrip())
    after = encode(context + continuation)[len(before) :]
    return before or [prefix_token(engine)], after


def prefix_token(engine: Engine | Fp32Engine) -> int:
    """Return the token that comes before a text without context.

    It is the tokenizer's BOS, as for an empty prompt. Without one, as with add_bos=False, it is
    the BOS of the config, or else EOS. Raises InvalidOption if the model has none of them.
    """
    if engine.tokenizer.empty_text:
        return engine.tokenizer.empty_text[-1]
    config = engine.config
    if config.bos_id is not None:
        return config.bos_id
    if not config.eos_ids:
        raise InvalidOption(
            "the model has no token that begins or ends a text, so the likelihood of a text "
            "without context is not defined"
        )
    return config.eos_ids[0]
