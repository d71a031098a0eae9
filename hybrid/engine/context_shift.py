"""Context shift: an answer goes on when its context is full, without the oldest part.

The first tokens stay, the oldest half of the others goes, and what is left is prefilled again. So
the session then holds, bit by bit, what a new session would hold after these tokens. Keys that were
only moved to other positions would still depend on the tokens that are gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hybrid.engine.answer import Answer
from hybrid.engine.session import Session, common_length
from hybrid.errors import InvalidOption
from hybrid.kernels import PREFILL_CHUNK
from hybrid.progress import Progress, ignore_progress
from hybrid.text.chat import Chat
from hybrid.text.tokenizer import Tokenizer

PROMPT_PART = 4 * PREFILL_CHUNK  # tokens that are prefilled between two checks for cancellation
TASK = "shifting the context, tokens"


def prefill_parts(
    session: Session, tokens: Sequence[int], answer: Answer, progress: Progress = ignore_progress
) -> bool:
    """Append tokens in parts, so that cancelling and Ctrl-C do not wait for all of them.

    Returns whether all were appended: not if the answer was cancelled.
    """
    size = PREFILL_CHUNK if answer.scores_prompt else PROMPT_PART  # logits of all take memory
    for first in range(0, len(tokens), size):
        if answer.is_cancelled:
            return False
        progress(TASK, first, len(tokens))
        part = np.asarray(tokens[first : first + size], np.int64)
        logits = session.prefill(part, all_logits=answer.scores_prompt)
        if logits is not None:
            answer.note_prompt(logits)
    progress(TASK, len(tokens), len(tokens))
    return True


def n_dropped(n_tokens: int, n_kept: int) -> int:
    """Return how many of so many tokens a shift drops, from the token `n_kept` on."""
    return (n_tokens - n_kept + 1) // 2


def fitted(ids: list[int], n_kept: int, n_context: int) -> tuple[list[int], int]:
    """Return what shifts leave of a prompt that is too long, and their number."""
    n_shifts = 0
    while len(ids) > n_context:
        ids = ids[:n_kept] + ids[n_kept + n_dropped(len(ids), n_kept) :]
        n_shifts += 1
    return ids, n_shifts


def tokens_to_keep(
    tokenizer: Tokenizer, ids: list[int], n_keep: int | None, chat: Chat | None, n_context: int
) -> int:
    """Return how many of a prompt's first ids shifts keep: BOS, and `n_keep` more.

    With None those are what all conversations with this system message and these tools begin with.
    Raises InvalidOption if a context would have no room for anything else.
    """
    n_kept = len(tokenizer.bos) if tuple(ids[: len(tokenizer.bos)]) == tokenizer.bos else 0
    if n_keep is not None:
        n_kept += n_keep
    elif chat is not None:
        n_kept = max(n_kept, _length_of_opening(tokenizer, ids, chat))
    if n_kept > n_context - 2:
        raise InvalidOption(
            f"context_shift: {n_kept} tokens are to be kept, but the context holds {n_context} and "
            "needs room for others; choose a smaller n_keep or a larger context"
        )
    return n_kept


def _length_of_opening(tokenizer: Tokenizer, ids: list[int], chat: Chat) -> int:
    system = [message for message in chat.messages[:1] if message["role"] == "system"]
    try:
        other = replace(chat, messages=[*system, {"role": "user", "content": ""}])
        opening = tokenizer.encode_chat(other)
    except InvalidOption:  # the template refuses an empty message
        return 0
    return common_length(ids, opening)


class Room:
    """Room for the next token in the session of an answer."""

    def __init__(self, session: Session, answer: Answer) -> None:
        self._session, self._answer = session, answer
        self.progress: Progress = ignore_progress
        self.n_prefilled = 0  # tokens that shifts computed again

    def tokens(self, position: int) -> int:
        """Return how many tokens can be appended at this position, perhaps after a shift."""
        room = self._session.n_context - position
        return 1 if room < 1 and self._answer.request.n_kept is not None else room

    def make(self) -> bool:
        """Shift the context if it is full. Returns False if the answer is cancelled meanwhile."""
        session, answer = self._session, self._answer
        started, stats, left = time.perf_counter(), answer.stats, self.drop()
        if not left:
            return True
        n_stayed = session.position
        is_made = prefill_parts(session, left, answer, self.progress)
        n_computed, seconds = session.position - n_stayed, time.perf_counter() - started
        self.n_prefilled += n_computed
        stats.prefilled_tokens += n_computed
        stats.prefill_s += seconds
        stats.decode_s -= seconds  # within a step of decode, but no part of it
        return is_made

    def drop(self) -> list[int]:
        """If the context is full, drop what a shift drops. Return the tokens to compute again."""
        session, n_kept = self._session, self._answer.request.n_kept
        if n_kept is None or session.position < session.n_context:
            return []
        n = n_dropped(session.position, n_kept)
        left = session.tokens[n_kept + n :]
        self._answer.n_dropped += n
        self._answer.stats.n_shifts += 1
        session.truncate(n_kept)
        return list(left)
