"""Stream: one answer in the batching loop, with its session and the tokens to append next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from hybrid.engine.answer import Answer
from hybrid.engine.batch.mailbox import Mailbox
from hybrid.engine.context_shift import Room
from hybrid.engine.session import Session


class Counts(NamedTuple):
    """What all passes of a batch have computed and read so far."""

    n_tokens: int
    n_active: int  # (neuron, token) pairs that fired
    n_bytes: int  # of weights and KV cache


class Stream:
    """An answer from its prompt to its end. The loop's thread owns it, except while `choose` runs.

    `pending` are the tokens to append: the prompt, or what a context shift left, and then the token
    that was chosen last. When none is left, the next one is chosen.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.mailbox = answer, Mailbox()
        self.session: Session | None = None  # None while the answer waits in the queue
        self.pending: list[int] = []
        self.is_decoding = False  # whether only what was chosen last is pending
        self.alike: list[tuple[Stream, int]] = []  # that compute so many of this prompt's tokens
        self.piece = ""  # text that the last token completed
        self.error: Exception | None = None  # that ends the stream

    def begin(self, session: Session, n_cached: int, counts: Counts) -> None:
        """Use a session that holds the first `n_cached` tokens of the prompt."""
        self.session, self._room = session, Room(session, self.answer)
        self.answer.stats.cached_tokens = n_cached
        self.pending = self.answer.prompt[n_cached:]
        self._counts, self._since = counts, time.perf_counter()

    def append(self, n: int, counts: Callable[[], Counts]) -> bool:
        """Note that a pass appended `n` tokens. Returns whether a token is to be chosen."""
        stats, is_complete = self.answer.stats, n == len(self.pending)
        has_decoded = is_complete and bool(self.answer.tokens)
        stats.decode_steps += has_decoded
        if not self.is_decoding:
            stats.prefilled_tokens += n - has_decoded
        del self.pending[:n]
        self._spend()
        if is_complete and not has_decoded:  # the prompt is done, and counts of decode begin
            now = counts()
            self._measure(now)
            self._counts = now
        return is_complete

    @property
    def reports_activity(self) -> bool:
        """Whether the next pass decodes for an answer that reports which neurons fire."""
        return self.is_decoding and self.answer.layer_activity is not None

    def note_activity(self, before: list[int], after: list[int], n_tokens: int) -> None:
        """Note how many neurons fired in each layer during a pass over so many tokens."""
        assert self.session is not None
        self.answer.note_activity(before, after, n_tokens, self.session._config.n_neurons)

    def choose(self) -> None:
        """Choose the next token, and note the text that this completes, or the error."""
        assert self.session is not None
        answer, session = self.answer, self.session
        try:
            tokens = answer.choose(session.logits, self._room.tokens(session.position))
            self.piece = answer.take()
            if tokens and answer.finish_reason is None:
                left = self._room.drop()
                self.pending, self.is_decoding = [*left, *tokens], not left
        except Exception as error:  # whatever it is, the other streams go on
            self.error = error

    def end(self, counts: Counts) -> None:
        """Complete the statistics, after the last pass."""
        self._spend()
        if self.answer.stats.decode_steps:
            self._measure(counts)
            self.answer.stats.decode_bytes = counts.n_bytes - self._counts.n_bytes

    def _measure(self, counts: Counts) -> None:
        """Take the active fraction from what all passes have computed meanwhile."""
        assert self.session is not None
        n_tokens = counts.n_tokens - self._counts.n_tokens
        if n_tokens:
            config, n_active = self.session._config, counts.n_active - self._counts.n_active
            n_pairs = n_tokens * config.n_layers * config.n_neurons
            self.answer.stats.active_fraction = n_active / n_pairs

    def _spend(self) -> None:
        """Add the time since the last call to prefill or decode."""
        stats, now = self.answer.stats, time.perf_counter()
        if self.is_decoding:
            stats.decode_s += now - self._since
        else:
            stats.prefill_s += now - self._since
        self._since = now
