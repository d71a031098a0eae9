"""Generation: one answer while it is being written, an iterator of pieces of text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybrid.kernels import PREFILL_CHUNK, Session
from hybrid.sampling import Sampler
from hybrid.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]

RECENT = 64  # tokens that the repeat penalty looks back
PROMPT_PART = 4 * PREFILL_CHUNK  # prompt tokens that are run between two looks at cancellation


@dataclass(slots=True)
class GenerationStats:
    """Counts and times of one generation; times exclude what the consumer of the text does between
    pieces.
    """

    prompt_tokens: int
    generated_tokens: int = 0  # without the end-of-sequence token
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0  # forward passes of one token; the first token comes from prefill
    active_fraction: float | None = None  # of FFN neurons, over decode; over prefill before that

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


class Generation:
    """The text of one answer as an iterator of pieces; a piece never splits a character.

    `text`, `tokens` and `stats` grow with it. `finish_reason` is None while it is being written,
    then "stop" (the model ended it, or a stop string came), "length" (max_tokens, or the context is
    full) or "cancelled". Its KV cache is given back at the end, or with `close`. One thread may
    iterate; any may cancel.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        prompt: list[int],
        *,
        max_tokens: int,
        stop: tuple[str, ...],
        eos_ids: tuple[int, ...],
        n_neurons: int,
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stats = GenerationStats(len(prompt))
        self.seed = sampler.seed
        self._session: Session | None = session
        self._sampler = sampler
        self._detokenizer = tokenizer.stream(prompt)
        self._max_tokens, self._eos_ids = max_tokens, eos_ids
        self._stop = stop
        self._held = ""  # text that may turn out to begin a stop string
        self._n_neurons = n_neurons  # of all layers
        self._is_cancelled = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        session = self._session
        if session is None:
            raise StopIteration
        if session.position < len(self.prompt):
            self._prefill(session)
        piece = ""
        while not piece and self.finish_reason is None:
            started = time.perf_counter()
            piece = self._until_stop(self._step(session))
            self.stats.decode_s += time.perf_counter() - started
        if self.finish_reason is not None:
            self._session = None
        if not piece:
            raise StopIteration
        self.text += piece
        return piece

    def cancel(self) -> None:
        """End the generation before its next token; may be called from another thread."""
        self._is_cancelled = True

    def close(self) -> None:
        """End the generation here and give its memory back."""
        self._session = None
        if self.finish_reason is None:
            self.finish_reason = "cancelled"

    def _prefill(self, session: Session) -> None:
        """Run the prompt, in parts, so that cancelling and Ctrl-C need not wait for all of it."""
        started = time.perf_counter()
        while session.position < len(self.prompt) and not self._is_cancelled:
            part = self.prompt[session.position : session.position + PROMPT_PART]
            session.prefill(np.asarray(part, np.int64))
        self.stats.prefill_s += time.perf_counter() - started
        self._count_active(session, session.position)
        session.reset_active_counts()

    def _step(self, session: Session) -> str:
        """Sample a token and, where another shall follow, run it; returns what became certain."""
        if self._is_cancelled:
            self.finish_reason = "cancelled"
            return ""
        recent = [*self.prompt[-RECENT:], *self.tokens[-RECENT:]][-RECENT:]
        token = self._sampler.sample(session.logits, recent)
        if token in self._eos_ids:
            self.finish_reason = "stop"
            return ""
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        is_full = session.position == session.n_context
        if is_full or len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        else:
            session.decode(token)
            self.stats.decode_steps += 1
            self._count_active(session, self.stats.decode_steps)
        return self._detokenizer.push(token)

    def _until_stop(self, piece: str) -> str:
        """The part of the text so far that is certain to stand before any stop string."""
        is_last = self.finish_reason is not None
        text = self._held + piece + (self._detokenizer.finish() if is_last else "")
        self._held = ""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            return text[: min(found)]
        if not is_last:
            for n in range(min(max(map(len, self._stop), default=1) - 1, len(text)), 0, -1):
                if any(stop.startswith(text[-n:]) for stop in self._stop):
                    text, self._held = text[:-n], text[-n:]
                    break
        return text

    def _count_active(self, session: Session, n_tokens: int) -> None:
        if n_tokens:
            n_active = sum(session.active_counts)
            self.stats.active_fraction = n_active / (n_tokens * self._n_neurons)
