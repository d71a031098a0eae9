"""Steps: what the batching loop does again and again, on one thread.

streams     decoding: one token each        being prefilled: the rest of the 64, shared fairly
                      \\                      /
a pass                 Batch.run: the weights are read once
                                |
choosing               each stream whose tokens are all appended chooses the next one
                                |
publishing             pieces go to consumers; what has ended leaves its session to the cache
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybrid.engine.batch.choosing import Chooser
from hybrid.engine.batch.passes import BatchPart
from hybrid.engine.batch.prefix_cache import LEAST_COPY, PrefixCache
from hybrid.engine.batch.shares import shares
from hybrid.engine.batch.stream import Counts, Stream
from hybrid.engine.session import Session, common_length
from hybrid.engine.stats import PassCounts
from hybrid.errors import EngineClosed, HybridError, NumericOverflow, OutOfMemory
from hybrid.kernels import PREFILL_CHUNK

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine


class Steps:
    """The streams that run, oldest first. A step appends up to 64 tokens to their sessions."""

    def __init__(self, engine: Engine, *, token_bytes: int, cache_bytes: int) -> None:
        """`token_bytes` and `cache_bytes` are those of the prefix cache."""
        # The loop's thread must not keep an engine alive that nobody uses.
        self._engine = weakref.ref(engine)
        self._batch = engine.open_batch()
        self._chooser = Chooser(engine.n_threads, engine.config.vocab_size)
        self._cache = PrefixCache(self._open_session, token_bytes, cache_bytes)
        self.streams: list[Stream] = []
        self.unconfirmed: list[Stream] = []  # complete, but the weights are still being checked
        self._n_tokens = 0  # that passes appended
        self.passes = PassCounts()  # replaced after each pass, so that any thread may read it

    def admit(self, stream: Stream) -> bool:
        """Begin a stream. Returns False if it finds no memory before another stream has ended.

        If it cannot begin for another reason, it ends alone. While another stream computes what its
        prompt begins with, it waits for that.
        """
        self._note_alike(stream)
        self.streams.append(stream)
        if self._is_computed_for(stream) or self._begin(stream):
            return True
        self.streams.remove(stream)
        return False

    def _begin(self, stream: Stream) -> bool:
        """Give a stream its session. Returns False if it must wait for memory."""
        running = [other.session for other in self.streams if other.session is not None]
        try:
            session, n_cached = self._cache.take(_reusable(stream), running)
            stream.alike.clear()
            stream.begin(session, n_cached, self._counts())
        except Exception as error:
            if isinstance(error, OutOfMemory) and running:
                return False
            self.end(stream, error)
        return True

    def step(self) -> None:
        """End what is cancelled, run one pass, and publish what it brings."""
        for stream in [stream for stream in self.streams if stream.answer.is_cancelled]:
            self.end(stream)
        self._confirm()
        for stream in [stream for stream in self.streams if stream.session is None]:
            if not self._is_computed_for(stream):
                self._begin(stream)
        if shared := self._shared():
            self._run(shared)
        self._score_prompt()

    def _run(self, shared: list[tuple[Stream, int]]) -> None:
        reporting = [stream for stream, _ in shared if stream.reports_activity]
        counts = self._batch.active_counts if reporting and self._batch.counts else []
        started = time.perf_counter()
        try:
            errors = self._batch.run([_part(stream, n) for stream, n in shared])
        except Exception as error:  # damaged weights, or a GPU that failed: no stream can go on
            self.end_all(error)
            return
        n_tokens = sum(n for _, n in shared)
        self._n_tokens += n_tokens
        self._count_pass(time.perf_counter() - started)
        for stream in reporting if counts else ():
            stream.note_activity(counts, self._batch.active_counts, n_tokens)
        self._advance(shared, errors)

    def _score_prompt(self) -> None:
        """Append a part of the oldest prompt whose tokens get log-probabilities.

        This takes a pass of its own, because passes over several sessions have no logits but those
        of last tokens.
        """
        scored = (each for each in self.streams if each.session and each.answer.scores_prompt)
        stream = next(scored, None)
        if stream is None:
            return
        assert stream.session is not None
        tokens = stream.pending[:PREFILL_CHUNK]
        try:
            logits = stream.session.prefill(tokens, all_logits=True)
            assert logits is not None
            stream.answer.note_prompt(logits)
        except Exception as error:  # the other streams go on
            self.end(stream, error)
            return
        if stream.append(len(tokens), self._counts):
            self._chooser.choose([stream])
            self._publish(stream)

    def end_all(self, error: Exception | None = None) -> None:
        """End all streams: cancelled, or with an error."""
        for stream in [*self.streams]:
            self.end(stream, copy.copy(error))
        for stream in self.unconfirmed:
            stream.answer.finish("cancelled")
            stream.mailbox.end(copy.copy(error))
        self.unconfirmed.clear()

    def close(self, error: Exception | None = None) -> None:
        self.end_all(error)
        self._cache.close()
        self._chooser.close()

    def _note_alike(self, stream: Stream) -> None:
        """Note which streams compute more of what this prompt begins with than there is already."""
        # Scored prompts take passes of their own, one after the other: they are no help.
        filling = [
            other
            for other in self.streams
            if other.session and not other.is_decoding and not other.answer.scores_prompt
        ]
        if not (filling and self._cache.is_on) or stream.answer.scores_prompt:
            return
        prompt = stream.answer.prompt
        running = [other.session for other in self.streams if other.session is not None]
        n_known = self._cache.longest(prompt, running)
        lengths = [(other, common_length(other.answer.prompt, prompt[:-1])) for other in filling]
        stream.alike = [(other, n) for other, n in lengths if n - n_known >= LEAST_COPY]

    def _is_computed_for(self, stream: Stream) -> bool:
        """Return whether another stream is still computing what this prompt begins with."""
        return any(
            other.session is not None
            and not other.is_decoding
            and not other.answer.stats.n_shifts
            and other in self.streams
            and n - other.session.position >= LEAST_COPY
            for other, n in stream.alike
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values in the prefix cache."""
        return self._cache.n_bytes

    def _shared(self) -> list[tuple[Stream, int]]:
        """Return how many tokens of each stream the next pass appends."""
        decoding = [each for each in self.streams if each.is_decoding and len(each.pending) == 1]
        filling = [
            stream
            for stream in self.streams
            if stream.session and stream not in decoding and not stream.answer.scores_prompt
        ]
        room = PREFILL_CHUNK - len(decoding)
        sizes = shares([len(stream.pending) for stream in filling], room)
        return [(stream, 1) for stream in decoding] + list(zip(filling, sizes, strict=True))

    def _advance(
        self, shared: list[tuple[Stream, int]], errors: Mapping[int, NumericOverflow]
    ) -> None:
        """Choose the next tokens after a pass, and publish their text."""
        complete = []
        for i, (stream, n) in enumerate(shared):
            if i in errors:
                self.end(stream, errors[i])
            elif stream.append(n, self._counts):
                complete.append(stream)
        self._chooser.choose(complete)
        for stream in complete:
            self._publish(stream)

    def _publish(self, stream: Stream) -> None:
        if stream.error is not None:
            self.end(stream, stream.error)
            return
        if stream.piece and not stream.mailbox.put(stream.piece):
            stream.answer.cancel()  # the consumer's event loop is closed
        if stream.answer.finish_reason is not None:
            self.end(stream)

    def end(self, stream: Stream, error: Exception | None = None) -> None:
        """End a stream, also one that has not begun: cancelled, if it is not complete."""
        answer, session = stream.answer, stream.session
        if answer.finish_reason is None:
            answer.finish("cancelled")
            if error is None and (piece := answer.take()):
                stream.mailbox.put(piece)
        if stream in self.streams:
            self.streams.remove(stream)
        if session is not None:
            stream.end(self._counts())
            if error is None and session.position and not answer.stats.n_shifts:
                self._cache.leave(session)
            else:  # a shift also leaves more memory in use than there are tokens
                session.close()
        if (engine := self._engine()) is not None:
            engine._count(answer.stats)
        if error is not None or answer.finish_reason == "cancelled":
            stream.mailbox.end(error)
        else:
            self.unconfirmed.append(stream)
            self._confirm()

    def _confirm(self) -> None:
        """End answers that are complete, as soon as the weights have been checked."""
        for stream in [*self.unconfirmed]:
            assert stream.session is not None
            error = None
            try:
                if not stream.session.confirm_weights(0):
                    if not stream.answer.is_cancelled:
                        continue
                    stream.answer.finish("cancelled")
            except HybridError as damage:
                error = damage
            self.unconfirmed.remove(stream)
            stream.mailbox.end(error)

    def _counts(self) -> Counts:
        if not self._batch.counts:
            return Counts(self._n_tokens, 0, 0)
        n_bytes = sum(self._batch.decode_bytes.values())
        return Counts(self._n_tokens, sum(self._batch.active_counts), n_bytes)

    def _count_pass(self, seconds: float) -> None:
        n_tokens, n_active, n_bytes = self._counts()
        before = self.passes
        self.passes = PassCounts(
            before.n_passes + 1, n_tokens, before.seconds + seconds, n_active, n_bytes
        )

    def _open_session(self) -> Session:
        engine = self._engine()
        if engine is None:
            raise EngineClosed("the engine is gone; load the model again")
        return engine.open_session()


def _reusable(stream: Stream) -> list[int]:
    """Return the prompt whose keys and values may come from other sequences."""
    return [] if stream.answer.scores_prompt else stream.answer.prompt


def _part(stream: Stream, n: int) -> BatchPart:
    assert stream.session is not None
    return BatchPart(stream.session, stream.pending[:n], n == len(stream.pending))
