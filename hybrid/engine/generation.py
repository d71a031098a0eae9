"""Generation: one answer while it is being generated, as an iterator of pieces of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.options import AnswerLimits
from hybrid.engine.session import Session
from hybrid.kernels import PREFILL_CHUNK
from hybrid.text.chat import Chat
from hybrid.text.sampling import Sampler, log_softmax
from hybrid.text.token_rules import TokenRules
from hybrid.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]

PROMPT_PART = 4 * PREFILL_CHUNK  # prompt tokens that run between two checks for cancellation
_PATIENCE_S = 0.1  # of a wait between two checks for cancellation


@dataclass(slots=True)
class GenerationStats:
    """Counts and times of one generation.

    Times exclude what the consumer of the text does between pieces.
    """

    prompt_tokens: int
    cached_tokens: int = 0  # prompt tokens that the session's KV cache already held
    prefilled_tokens: int = 0  # prompt tokens that were computed
    generated_tokens: int = 0  # without the end-of-sequence token
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0  # forward passes of one token; the first token comes from prefill
    decode_bytes: int = 0  # of weights and KV cache that these passes read
    active_fraction: float | None = None  # of FFN neurons, in decode; before decode, in prefill

    @property
    def prefill_tps(self) -> float:
        """Computed prompt tokens per second."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Forward passes of one token per second."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0

    @property
    def decode_gbs(self) -> float:
        """GB (1e9 bytes) of weights and KV cache read per second of decode."""
        return self.decode_bytes / self.decode_s / 1e9 if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts and times since an engine was loaded. A generation counts once it has ended."""

    load_s: float = 0.0
    weight_bytes: int = 0  # of the packed weights
    is_mapped: bool = False  # some weights are in a mapped file, not yet in memory of our own
    is_copying: bool = False  # mapped weights are being copied into memory in the background
    is_locked: bool = False  # the system cannot move the weights out of memory
    n_generations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that a session's KV cache already held
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def with_generation(self, ended: GenerationStats) -> EngineStats:
        """Return the counts with those of a generation that has ended."""
        return replace(
            self,
            n_generations=self.n_generations + 1,
            prompt_tokens=self.prompt_tokens + ended.prompt_tokens,
            cached_tokens=self.cached_tokens + ended.cached_tokens,
            generated_tokens=self.generated_tokens + ended.generated_tokens,
            prefill_s=self.prefill_s + ended.prefill_s,
            decode_s=self.decode_s + ended.decode_s,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A generated token with its log-probability by the model, before any sampling option."""

    token: int
    text: str
    logprob: float  # natural logarithm
    top: tuple[tuple[int, float], ...]  # the likeliest (token, logprob), best first


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is to be answered, and how."""

    prompt: list[int]  # token ids
    limits: AnswerLimits
    logprobs: int | None  # how many likeliest tokens to report with each token; None: nothing
    owns_session: bool  # close the session when the answer has ended
    chat: Chat | None = None  # the conversation that this answers


class Generation:
    """The text of one answer as an iterator of pieces; a piece never splits a character.

    `text`, `tokens`, `logprobs` and `stats` grow during the iteration. `finish_reason` is None
    until the answer ends. Then it is "stop" (the model ended the answer, or a stop string came),
    "length" (the answer's limit was reached, or the context is full) or "cancelled". One thread may
    iterate; any thread may cancel.
    """

    prompt: list[int]  # token ids
    tokens: list[int]  # generated ids, without the end-of-sequence token
    text: str
    logprobs: list[TokenLogprobs] | None  # None unless requested
    finish_reason: FinishReason | None
    context_is_full: bool  # whether a full context ended the answer
    limit_is_models: bool  # whether generation_config.json limits the answer, not the caller
    stats: GenerationStats
    seed: int  # the same seed repeats this generation

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        request: GenerationRequest,
        on_end: Callable[[GenerationStats], None],
    ) -> None:
        """`on_end` receives the counts once the answer has ended."""
        prompt, limits = request.prompt, request.limits
        self.prompt = prompt
        self.tokens, self.text = [], ""
        self.logprobs = None if request.logprobs is None else []
        self.finish_reason, self.context_is_full = None, False
        self.stats = GenerationStats(len(prompt))
        self.seed = sampler.seed
        self._session = session
        self._sampler = sampler
        self._tokenizer, self._detokenizer = tokenizer, tokenizer.stream(prompt)
        self.limit_is_models = limits.is_models
        self._max_tokens, self._eos_ids = limits.max_tokens, session._config.eos_ids
        if request.chat is not None:
            end = tokenizer.end_of_answer(request.chat)
            self._eos_ids = (*self._eos_ids, *([] if end is None else [end]))
        self._stop, self._n_top = limits.stop, request.logprobs
        self._rules = None if limits.rules == TokenRules() else limits.rules
        self._seen = set(prompt)  # tokens that the repeat penalty applies to
        self._held = ""  # text that may be the beginning of a stop string
        self._n_neurons = session._config.n_layers * session._config.n_neurons
        self._owns_session, self._on_end = request.owns_session, on_end
        self._chat = request.chat
        self._is_prefilled = self._is_cancelled = self._is_over = False
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
        self.text += piece
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
            if self._is_cancelled:
                self.finish_reason = "cancelled"

    def _advance(self) -> str:
        """Return the next piece of text, or "" if the answer has ended."""
        piece = ""
        with self._session.step(self._ticket) as is_mine:
            if not is_mine:  # the session was closed, was reset, or got another prompt
                self._is_cancelled = True
            elif not self._is_prefilled:
                self._prefill()
            while not piece and self.finish_reason is None:
                started = time.perf_counter()
                piece = self._until_stop(self._step())
                self.stats.decode_s += time.perf_counter() - started
            if is_mine and self.stats.decode_steps:
                self.stats.decode_bytes = sum(self._session.decode_bytes.values())
        return piece

    def cancel(self) -> None:
        """End the generation before its next token, or its wait for the check of the weights.

        Any thread may call this.
        """
        self._is_cancelled = True

    def close(self) -> None:
        """End the generation now. If it opened its own session, that session frees its memory."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
        self._end()

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._owns_session:
            self._session.close()
        elif self._chat is not None:
            self._keep_chat()
        self._on_end(self.stats)

    def _keep_chat(self) -> None:
        """Store in the session which ids stand for the conversation, this answer included.

        Encoding the answer's text again might split it differently, and the KV cache from there on
        would be lost. Nothing is stored if a stop string cut the text, because the ids then hold
        more than the text.
        """
        with self._session.step(self._ticket) as is_mine:
            said = self._tokenizer.continue_text(self.prompt, self.tokens)
            if is_mine and said == self.text and self._chat is not None:
                self._session.chat = self._chat.answered(said), [*self.prompt, *self.tokens]

    def _prefill(self) -> None:
        """Run the prompt in parts, so that cancelling and Ctrl-C do not wait for all of it."""
        session, started = self._session, time.perf_counter()
        self.stats.cached_tokens = n_before = session.keep_common_prefix(self.prompt)
        session.reset_counts()
        while session.position < len(self.prompt) and not self._is_cancelled:
            part = self.prompt[session.position : session.position + PROMPT_PART]
            session.prefill(np.asarray(part, np.int64))
        self.stats.prefill_s += time.perf_counter() - started
        self.stats.prefilled_tokens = session.position - n_before
        self._count_active(self.stats.prefilled_tokens)
        session.reset_counts()
        self._is_prefilled = session.position == len(self.prompt)

    def _step(self) -> str:
        """Sample a token and, if another is to follow, decode it. Return the completed text."""
        if self._is_cancelled:
            self.finish_reason = "cancelled"
            return ""
        session, logits = self._session, self._session.logits
        banned: list[int] = []
        if self._rules is not None:
            banned = self._rules.banned(self.prompt, self.tokens, self._eos_ids)
        token = self._sampler.sample(logits, self._seen, banned)
        if token in self._eos_ids:
            self.finish_reason = "stop"
            return ""
        self.tokens.append(token)
        self._seen.add(token)
        self.stats.generated_tokens += 1
        if self.logprobs is not None:
            self.logprobs.append(self._logprobs_of(token, logits))
        self.context_is_full = session.position == session.n_context
        if self.context_is_full or len(self.tokens) == self._max_tokens:
            self.finish_reason = "length"
        else:
            session.decode(token)
            self.stats.decode_steps += 1
            self._count_active(self.stats.decode_steps)
        return self._detokenizer.push(token)

    def _until_stop(self, piece: str) -> str:
        """Return the text so far that cannot be part of a stop string. Hold back the rest."""
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

    def _logprobs_of(self, token: int, logits: NDArray[np.float32]) -> TokenLogprobs:
        values = log_softmax(logits)
        n_top = min(self._n_top or 0, values.size)
        best = np.argpartition(values, -n_top)[-n_top:] if n_top else np.empty(0, np.intp)
        best = best[np.lexsort((best, -values[best]))]
        return TokenLogprobs(
            token,
            self._tokenizer.decode_token(token),
            float(values[token]),
            tuple((int(other), float(values[other])) for other in best),
        )

    def _count_active(self, n_tokens: int) -> None:
        if n_tokens:
            n_active = sum(self._session.active_counts)
            self.stats.active_fraction = n_active / (n_tokens * self._n_neurons)
