"""Answer: what has been said so far, and what is said next. It knows no session.

Whoever computes logits hands them to `choose`, appends the token that it returns to the sequence,
and then takes the text. `Generation` does so on its consumer's thread, and a `Stream` of a batching
loop on the loop's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybrid.engine.options import AnswerLimits
from hybrid.engine.stats import GenerationStats
from hybrid.text.chat import Chat
from hybrid.text.grammar import Grammar
from hybrid.text.sampling import Sampler, log_probabilities
from hybrid.text.token_rules import TokenRules
from hybrid.text.tokenizer import Tokenizer
from hybrid.text.tool_calls import ToolFormat

MAX_FORCED = 48  # tokens of a grammar that are taken at once, so that they fit into a pass
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token of an answer or a prompt with its log-probability by the model.

    That is the model's own, before any sampling option.
    """

    token: int
    text: str
    logprob: float  # natural logarithm
    top: tuple[tuple[int, float], ...]  # the likeliest (token, logprob), best first


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """What is to be answered, and how."""

    prompt: list[int]  # token ids
    limits: AnswerLimits
    logprobs: int | None  # how many likeliest tokens to report with each token; None: nothing
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    layer_activity: bool = False  # report which share of each layer's neurons fires
    speculate: bool = False  # compute drafts along (hybrid/engine/speculation.py)
    chat: Chat | None = None  # the conversation that this answers
    n_kept: int | None = None  # first tokens that context shifts keep; None: a full context ends it
    n_shifts: int = 0  # shifts that the prompt has already undergone
    grammar: Grammar | None = None  # that the answer follows
    tool_format: ToolFormat | None = None  # in which the answer may call tools


class Answer:
    """The tokens and the text of one answer while they are being chosen.

    `finish_reason` is None until the answer ends. One thread chooses; any thread may cancel.
    """

    text: str  # what `take` has returned so far
    tokens: list[int]  # without the end-of-sequence token
    logprobs: list[TokenLogprobs] | None  # None unless requested
    # None unless requested. Nothing predicts the first token, so its entry is None.
    prompt_logprobs: list[TokenLogprobs | None] | None
    # None unless requested. For each pass of decode the share of the neurons that fired, by layer.
    layer_activity: list[tuple[float, ...]] | None
    finish_reason: FinishReason | None
    stop_string: str | None  # that ended the answer
    context_is_full: bool  # whether a full context ended the answer
    is_cancelled: bool

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampler: Sampler,
        request: AnswerRequest,
        eos_ids: Sequence[int],
    ) -> None:
        """`eos_ids` end any text of the model; a chat template may name one more."""
        prompt, limits = request.prompt, request.limits
        self.request, self.prompt = request, prompt
        self.tokens, self.text = [], ""
        self.logprobs = None if request.logprobs is None else []
        self.prompt_logprobs = None if request.prompt_logprobs is None else [None]
        self.layer_activity = [] if request.layer_activity else None
        self.finish_reason, self.context_is_full, self.is_cancelled = None, False, False
        self.stop_string = None
        self.stats = GenerationStats(len(prompt), n_shifts=request.n_shifts)
        self._constraint = None if request.grammar is None else request.grammar.begin()
        self.n_dropped = 0  # tokens behind the first `request.n_kept` that context shifts dropped
        self.seed = sampler.seed
        self._sampler, self._tokenizer = sampler, tokenizer
        self._detokenizer = tokenizer.stream(prompt, request.tool_format)
        self._eos_ids = tuple(eos_ids)
        if request.chat is not None:
            end = tokenizer.end_of_answer(request.chat)
            self._eos_ids += () if end is None or end in self._eos_ids else (end,)
        self._rules = None if limits.rules == TokenRules() else limits.rules
        self._seen = set(prompt)  # tokens that the repeat penalty applies to
        self._counts: Counter[int] = Counter()  # of the answer's tokens
        self._held = ""  # text that was not taken: it may be the beginning of a stop string

    def again(self, seed: int | None) -> Answer:
        """Return another answer to the same request, which has not begun.

        It does not report the log-probabilities of the prompt again.
        """
        sampler = Sampler(replace(self._sampler.params, seed=seed))
        request = replace(self.request, prompt_logprobs=None)
        return Answer(self._tokenizer, sampler, request, self._eos_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of further prompt tokens are to be noted."""
        entries = self.prompt_logprobs
        return entries is not None and len(entries) < len(self.prompt)

    def note_prompt(self, logits: NDArray[np.float32]) -> None:
        """Note the logits (n, vocab) of the next n tokens of the prompt, from the first one on.

        Raises NumericOverflow if they are not finite.
        """
        entries = self.prompt_logprobs
        assert entries is not None
        for row, token in zip(logits, self.prompt[len(entries) :], strict=False):
            entries.append(self._logprobs_of(token, row, self.request.prompt_logprobs or 0))

    def note_activity(
        self, before: Sequence[int], after: Sequence[int], n_tokens: int, n_neurons: int
    ) -> None:
        """Note a pass of decode by the counts of each layer's neurons that fired, if requested."""
        if self.layer_activity is not None and n_tokens:
            n_pairs = n_tokens * n_neurons
            shares = ((last - first) / n_pairs for first, last in zip(before, after, strict=True))
            self.layer_activity.append(tuple(shares))

    def choose(self, logits: NDArray[np.float32], room: int) -> list[int]:
        """Choose the next token by its `logits` (vocab,), and note it.

        Returns what is to be appended to the sequence so that another token can follow: this token,
        and those that a grammar then forces. Returns none if the answer ends here. `room` is the
        number of tokens that the context can still hold. Raises the sampler's HybridError, and the
        grammar's.
        """
        if self.is_cancelled:
            self.finish("cancelled")
            return []
        tokens, scored = self._forced(max(room, 1)), None
        if not tokens:
            tokens, scored = self._sampled(logits, room), logits
        for i, token in enumerate(tokens):
            self._note(token, scored if i == 0 else None)
            self.context_is_full = i >= room
            if self.context_is_full or len(self.tokens) == self.request.limits.max_tokens:
                self.finish("length")
                break
            if len(tokens) > 1 and any(stop in self._held for stop in self.request.limits.stop):
                break  # `take` ends the answer here, so what is forced behind it does not count
        if self._constraint is not None and self._constraint.is_over and not self.finish_reason:
            self.finish("stop")
        return tokens if self.finish_reason is None else []

    def take(self) -> str:
        """Return the text completed since the last call that cannot be part of a stop string.

        Call it after each chosen token: a stop string ends the answer here.
        """
        stops, is_last = self.request.limits.stop, self.finish_reason is not None
        text = self._held + (self._detokenizer.finish() if is_last else "")
        self._held = ""
        found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            self.finish("stop")
            at, self.stop_string = min(found)
            text = text[:at]
        elif not is_last:
            n_held = _begun(stops, text)
            text, self._held = text[: len(text) - n_held], text[len(text) - n_held :]
        self.text += text
        return text

    def cancel(self) -> None:
        """End the answer before its next token. Any thread may call this."""
        self.is_cancelled = True

    def finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason

    @property
    def sequence(self) -> list[int]:
        """Prompt and answer as the model sees them: without what context shifts dropped."""
        ids, n_kept = [*self.prompt, *self.tokens], self.request.n_kept or 0
        return ids[:n_kept] + ids[n_kept + self.n_dropped :]

    def conversation(self) -> tuple[Chat, list[int]] | None:
        """Return the conversation, this answer included, and the ids that stand for it.

        Encoding the answer's text again might split it differently, and the KV cache from there on
        would be lost. Returns None if there is no conversation, or if a stop string cut the text,
        because the ids then hold more than the text.
        """
        chat = self.request.chat
        if chat is None:
            return None
        said = self._tokenizer.continue_text(self.prompt, self.tokens, self.request.tool_format)
        return (chat.answered(said), self.sequence) if said == self.text else None

    def _sampled(self, logits: NDArray[np.float32], room: int) -> list[int]:
        """Sample a token. Return it with those that it forces; none if it ends the answer."""
        allowed = None if self._constraint is None else self._constraint.allowed()
        banned = self._banned()
        token = self._sampler.sample(logits, self._seen, banned, self._counts, allowed)
        if token in self._eos_ids:
            self.finish("stop")
            return []
        if self._constraint is None:
            return [token]
        self._constraint.consume([token])
        return [token, *self._forced(room - 1)]

    def _forced(self, room: int) -> list[int]:
        """Return up to `room` tokens that the grammar forces next."""
        if self._constraint is None or self._constraint.is_over:
            return []
        tokens = self._constraint.forced()[: max(min(room, MAX_FORCED), 0)]
        self._constraint.consume(tokens)
        self.stats.forced_tokens += len(tokens)
        return tokens

    def _banned(self) -> list[int]:
        if self._rules is None:
            return []
        return self._rules.banned(self.prompt, self.tokens, self._eos_ids)

    def _note(self, token: int, logits: NDArray[np.float32] | None) -> None:
        """Note a token. Without logits it was forced, so its probability is 1."""
        self.tokens.append(token)
        self._seen.add(token)
        self._counts[token] += 1
        self.stats.generated_tokens += 1
        if self.logprobs is not None:
            if logits is None:
                entry = TokenLogprobs(token, self._tokenizer.decode_token(token), 0.0, ())
            else:
                entry = self._logprobs_of(token, logits, self.request.logprobs or 0)
            self.logprobs.append(entry)
        self._held += self._detokenizer.push(token)

    def _logprobs_of(self, token: int, logits: NDArray[np.float32], n_top: int) -> TokenLogprobs:
        logprob, likeliest = log_probabilities(logits, token, n_top)
        return TokenLogprobs(token, self._tokenizer.decode_token(token), logprob, likeliest)


def _begun(stops: Sequence[str], text: str) -> int:
    """Return the length of the longest end of `text` with which a stop string begins."""
    for n in range(min(max(map(len, stops), default=1) - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0
