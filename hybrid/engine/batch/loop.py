"""BatchLoop: many requests become passes. A thread of its own runs the steps (steps.py)."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hybrid.engine.answer import Answer
from hybrid.engine.answer_view import AnswerView
from hybrid.engine.batch.batched_generation import BatchedGeneration
from hybrid.engine.batch.steps import Steps
from hybrid.engine.batch.stream import Stream
from hybrid.engine.loading.choices import check_sequences_memory, kv_token_bytes
from hybrid.engine.options import (
    GenerationKeywords,
    GenerationOptions,
    checked_count,
    spelling_out,
)
from hybrid.engine.stats import LoopStats
from hybrid.errors import EngineClosed, HybridError, QueueFull
from hybrid.kernels import PREFILL_CHUNK
from hybrid.text.chat import Chat, ChatMessage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hybrid.engine.engine import Engine

DEFAULT_SEQUENCES = 4
MAX_SEQUENCES = PREFILL_CHUNK // 2  # so that prompts always find room in a pass
DEFAULT_QUEUE = 64
DEFAULT_CACHE_BYTES = 512 << 20
_PATIENCE_S = 0.1  # between two looks at the check of the weights
_SPECULATION = "speculate has no effect here: a batching loop computes no drafts"
_GPU = (
    "a plan uses the GPU, which computes one sequence at a time: several at once are no faster, "
    "and there is no prefix cache"
)


class BatchLoop:
    """Answers several requests at once, reading the weights once for all of them.

    Requests join and leave between passes of up to 64 tokens. Each sequence that is being decoded
    gets a token in every pass, and prompts share the rest. Every text is, bit by bit, the one that
    `Engine.generate` writes. Any thread may submit. Close the loop, or use it in a `with`
    statement: until then it keeps the weights in memory, even if the engine is closed.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        n_sequences: int = DEFAULT_SEQUENCES,
        queue_size: int = DEFAULT_QUEUE,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Answer up to `n_sequences` (1 to 32) requests at once, while `queue_size` others wait.

        The prefix cache keeps keys and values of sequences that have ended, up to `cache_bytes`;
        0 keeps nothing. Raises InvalidOption, EngineClosed, and OutOfMemory if full contexts of all
        sequences and the cache do not fit into free memory. If a sequence finds no memory all the
        same, it waits until another one has ended.
        """
        n_sequences = checked_count("n_sequences", n_sequences, MAX_SEQUENCES)
        queue_size = checked_count("queue_size", queue_size)
        cache_bytes = checked_count("cache_bytes", cache_bytes, least=0)
        self.notices: tuple[str, ...] = (_GPU,) if engine.uses_gpu else ()
        cache_bytes = 0 if engine.uses_gpu else cache_bytes
        n_layers = sum(not layer.is_on_gpu for layer in engine._plan.layers)
        token_bytes = kv_token_bytes(engine.config, n_layers)
        check_sequences_memory(token_bytes * engine.n_context, n_sequences, cache_bytes)
        steps = Steps(engine, token_bytes=token_bytes, cache_bytes=cache_bytes)
        self._engine = engine
        self._worker = _Worker(steps, n_sequences, queue_size)
        # Also when nobody refers to the loop any more, and when Python ends.
        weakref.finalize(self, self._worker.stop)

    @spelling_out(GenerationOptions)
    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> BatchedGeneration:
        """Request what `Engine.generate` does, and return at once. `speculate` has no effect.

        Raises the errors of `Engine.generate`, QueueFull, and EngineClosed if the loop is closed.
        The iteration raises what ends this answer, while others go on: NumericOverflow,
        OutOfMemory for its session, or the sampler's HybridError. InvalidArtifact ends all, if the
        weights are damaged.
        """
        options = replace(options or GenerationOptions(), **keywords)
        self._engine._open()
        return self._add(self._engine._requests.continuing(prompt, options, raw=raw))

    @spelling_out(GenerationOptions)
    def submit_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> BatchedGeneration:
        """Request what `Engine.chat` does; otherwise as `submit`."""
        options = replace(options or GenerationOptions(), **keywords)
        self._engine._open()
        chat = Chat(messages, tools, variables=variables or {})
        return self._add(self._engine._requests.answering(chat, options))

    def submit_again(
        self, generation: BatchedGeneration, *, seed: int | None = None
    ) -> BatchedGeneration:
        """Request another answer of this loop's to the same prompt, with another seed.

        The options are the same, and the prompt is not encoded again. Raises QueueFull and
        EngineClosed.
        """
        return self._add(generation._answer.again(seed))

    @property
    def is_closed(self) -> bool:
        """Whether the loop takes no requests any more."""
        return self._worker.is_stopping

    @property
    def stats(self) -> LoopStats:
        """What the loop is doing, and what it has computed. Any thread may read it."""
        return self._worker.stats

    @property
    def running(self) -> tuple[AnswerView, ...]:
        """The answers that are being computed, oldest first. Any thread may read it."""
        return self._worker.running

    def close(self) -> None:
        """End all answers as cancelled, also those that wait, and the loop's threads."""
        self._worker.stop()

    def __enter__(self) -> BatchLoop:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, answer: Answer) -> BatchedGeneration:
        stream = Stream(answer)
        self._worker.add(stream)
        notices = (_SPECULATION,) if answer.request.speculate else ()
        return BatchedGeneration(stream, self, (*self.notices, *notices))


class _Worker:
    """The loop's thread, and the queue before it. It does not refer to the BatchLoop."""

    def __init__(self, steps: Steps, n_sequences: int, queue_size: int) -> None:
        self._steps, self._n_sequences, self._queue_size = steps, n_sequences, queue_size
        self._process_id = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[Stream] = deque()
        self._most_sequences = n_sequences
        self._n_running = 0  # streams that have left the queue, when the loop last looked
        self.is_stopping = False
        self._thread = threading.Thread(target=self._work, name="hybrid-batch", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise HybridError(
                f"the batching loop needs a thread, and the system starts none ({error}); raise "
                "its limit of processes"
            ) from error

    def add(self, stream: Stream) -> None:
        with self._changed:
            if self.is_stopping:
                raise EngineClosed("the batching loop is closed; open another one")
            # Requests for which a sequence is free do not wait, nor do those that were cancelled.
            n_free = self._n_sequences - self._n_running
            n_waiting = sum(not waiting.answer.is_cancelled for waiting in self._queue)
            if n_waiting >= self._queue_size + max(n_free, 0):
                raise QueueFull(
                    f"{self._queue_size} requests wait already, as many as the queue takes; try "
                    "again later, or open the loop with a larger queue_size"
                )
            self._queue.append(stream)
            self._changed.notify_all()

    @property
    def stats(self) -> LoopStats:
        steps = self._steps
        return LoopStats(
            self._n_sequences,
            self._queue_size,
            len(self._queue),
            steps.cache_bytes,
            steps.passes,
        )

    @property
    def running(self) -> tuple[AnswerView, ...]:
        return tuple(AnswerView(stream.answer) for stream in [*self._steps.streams])

    def stop(self) -> None:
        if os.getpid() != self._process_id:
            return  # a child of a fork has neither the thread nor, perhaps, the lock
        with self._changed:
            self.is_stopping = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        error: Exception | None = None
        try:
            while self._admit():
                self._steps.step()
        except Exception as mistake:  # of our own: nobody may wait forever
            error = mistake
        with self._changed:
            self.is_stopping = True
        self._steps.close(error)
        for stream in self._queue:
            self._steps.end(stream, copy.copy(error))

    def _admit(self) -> bool:
        """Wait for work, and begin streams that were waiting. Returns False if the loop closes."""
        with self._changed:
            if len(self._steps.streams) < self._n_running:  # some have ended: there is memory again
                self._n_sequences = self._most_sequences
            self._n_running = len(self._steps.streams)
            while not (self.is_stopping or self._queue or self._steps.streams):
                self._changed.wait(_PATIENCE_S if self._steps.unconfirmed else None)
                if self._steps.unconfirmed:
                    break
            if self.is_stopping:
                return False
            cancelled = [stream for stream in self._queue if stream.answer.is_cancelled]
            for stream in cancelled:
                self._queue.remove(stream)
            n_free = self._n_sequences - self._n_running
            begun = [self._queue.popleft() for _ in range(min(n_free, len(self._queue)))]
            self._n_running += len(begun)
        for stream in cancelled:
            self._steps.end(stream)
        for i, stream in enumerate(begun):
            if not self._steps.admit(stream):
                self._n_sequences = len(self._steps.streams)  # there is memory for no more
                with self._changed:
                    self._queue.extendleft(reversed(begun[i:]))
                break
        return True
