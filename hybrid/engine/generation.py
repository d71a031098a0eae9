"""Generation: one answer while it is being generated, as an iterator of pieces of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from hybrid.engine.answer import Answer
from hybrid.engine.answer_view import AnswerView
from hybrid.engine.context_shift import Room, prefill_parts
from hybrid.engine.session import Session
from hybrid.engine.speculation import Speculation
from hybrid.engine.stats import GenerationStats
from hybrid.progress import Progress, ignore_progress

_PATIENCE_S = 0.1  # of a wait between two checks for cancellation


class Generation(AnswerView):
    """The text of one answer as an iterator of pieces; a piece never splits a character.

    `text`, `tokens`, `logprobs` and `stats` grow during the iteration. `finish_reason` is None
    until the answer ends. Then it is "stop" (the model ended the answer, or a stop string came),
    "length" (the answer's limit was reached, or the context is full) or "cancelled". One thread may
    iterate; any thread may cancel.
    """

    progress: Progress  # set it to see how far a context shift is

    def __init__(
        self,
        session: Session,
        answer: Answer,
        on_end: Callable[[GenerationStats], None],
        *,
        owns_session: bool,
    ) -> None:
        """`on_end` receives the counts once the answer has ended.

        With `owns_session`, the session is then closed.
        """
        super().__init__(answer)
        self.progress = ignore_progress
        self._session = session
        self._room = Room(session, answer)
        self._n_neurons = session._config.n_layers * session._config.n_neurons
        self._owns_session, self._on_end = owns_session, on_end
        self._speculation: Speculation | None = None
        self._n_forced = 0  # forced tokens that were appended along with chosen ones
        self._is_prefilled = self._is_over = False
        self._ticket = object()
        session.hand_to(self._ticket)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._is_over:
            self._confirm()
            raise StopIteration
        try:
            piece = self._advance()
        except BaseException:  # after a KeyboardInterrupt, tokens and text may disagree
            self.close()
            raise
        if self.finish_reason is not None:
            self._end()
        if not piece:
            self._confirm()
            raise StopIteration
        return piece

    def _confirm(self) -> None:
        """Wait for the check of the weights. A short answer may be complete before it is.

        If it is cancelled meanwhile, it counts as cancelled: nothing confirms its text.
        """
        while self.finish_reason != "cancelled" and not self._session.confirm_weights(_PATIENCE_S):
            if self._answer.is_cancelled:
                self._answer.finish("cancelled")

    def _advance(self) -> str:
        """Return the next piece of text, or "" if the answer has ended."""
        answer, piece = self._answer, ""
        with self._session.step(self._ticket) as is_mine:
            if not is_mine:  # the session was closed, was reset, or got another prompt
                answer.finish("cancelled")
                return answer.take()
            self._room.progress = self.progress
            if not self._is_prefilled:
                self._prefill()
            while not piece and answer.finish_reason is None:
                started = time.perf_counter()
                piece = self._step()
                self.stats.decode_s += time.perf_counter() - started
            if self.stats.decode_steps:
                self.stats.decode_bytes = sum(self._session.decode_bytes.values())
        return piece

    def close(self) -> None:
        """End the generation now. If it opened its own session, that session frees its memory."""
        if self.finish_reason is None:
            self._answer.finish("cancelled")
        self._end()

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._owns_session:
            self._session.close()
        else:
            with self._session.step(self._ticket) as is_mine:
                if is_mine and (conversation := self._answer.conversation()) is not None:
                    self._session.chat = conversation
        self._on_end(self.stats)

    def _prefill(self) -> None:
        """Run the prompt in parts, so that cancelling and Ctrl-C do not wait for all of it."""
        session, started = self._session, time.perf_counter()
        if self._answer.scores_prompt:  # the logits of all its tokens must be computed
            session.truncate(0)
        self.stats.cached_tokens = n_before = session.keep_common_prefix(self.prompt)
        session.reset_counts()
        self._is_prefilled = prefill_parts(session, self.prompt[n_before:], self._answer)
        self.stats.prefill_s += time.perf_counter() - started
        self.stats.prefilled_tokens = session.position - n_before
        self._count_active(self.stats.prefilled_tokens)
        session.reset_counts()

    def _step(self) -> str:
        """Choose tokens and, if another is to follow, append them. Return the text completed."""
        answer, session, stats = self._answer, self._session, self.stats
        counts = session.active_counts if answer.layer_activity is not None else []
        n_counted = self._n_counted
        if not answer.request.speculate:
            tokens = answer.choose(session.logits, self._room.tokens(session.position))
            piece = answer.take()
            if tokens and answer.finish_reason is None and self._room.make():
                if len(tokens) == 1:
                    session.decode(tokens[0])
                else:
                    session.prefill(tokens)
                    self._n_forced += len(tokens) - 1
                stats.decode_steps += 1
        else:
            if self._speculation is None:
                self._speculation = Speculation(session, answer, self._room)
            piece = self._speculation.step()
        if stats.decode_steps:
            self._count_active(self._n_counted)
            if answer.layer_activity is not None:
                n, n_neurons = self._n_counted - n_counted, session._config.n_neurons
                answer.note_activity(counts, session.active_counts, n, n_neurons)
        return piece

    @property
    def _n_counted(self) -> int:
        """The number of tokens that the session has computed since the prompt."""
        stats = self.stats
        n_along = stats.drafted_tokens + self._n_forced + self._room.n_prefilled
        return stats.decode_steps + n_along

    def _count_active(self, n_tokens: int) -> None:
        if n_tokens:
            n_active = sum(self._session.active_counts)
            self.stats.active_fraction = n_active / (n_tokens * self._n_neurons)
