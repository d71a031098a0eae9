"""POST /v1/completions: the continuation of a text.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hybrid import BatchedGeneration, GenerationOptions
from hybrid.server.answers import Answers, submit_answers
from hybrid.server.api_error import wrong
from hybrid.server.events import data_events
from hybrid.server.fields import Fields
from hybrid.server.openai.head import activity_of, head, usage_object
from hybrid.server.openai.logprobs import TextLogprobs
from hybrid.server.openai.options import (
    MAX_CHOICES,
    form_options,
    max_tokens,
    sampling_options,
    seeds,
    wants_usage,
)
from hybrid.server.service import Model

MAX_PROMPTS = 64
MAX_LOGPROBS = 20
Prompt = str | list[int]


class TextCompletion:
    """A text completion while it is generated."""

    def __init__(self, model: Model, fields: Fields) -> None:
        """Submit what a request wants. Raises ApiError or HybridError."""
        self._model = model
        self._prompts = read_prompts(fields)
        self._n = n = fields.integer("n", 1, MAX_CHOICES, 1)
        stats = model.loop.stats
        most = stats.n_sequences + stats.queue_size
        if len(self._prompts) * n > most:
            raise wrong("prompt", f"at most {most} prompts times n", len(self._prompts) * n)
        self._echoes = fields.boolean("echo")
        n_top = fields.integer("logprobs", 0, MAX_LOGPROBS)
        n_tokens = max_tokens(fields, least=0 if self._echoes else 1)
        self._drops_answer = n_tokens == 0  # an echo of the prompt alone
        each_seed = seeds(fields, n)
        options = GenerationOptions(
            **sampling_options(fields, model.engine.config.eos_ids),
            **form_options(fields),
            max_tokens="auto" if n_tokens is None else max(n_tokens, 1),
            logprobs=n_top,
            prompt_logprobs=n_top if self._echoes else None,
            seed=each_seed[0],
        )
        self.is_stream, self._wants_usage = fields.boolean("stream"), wants_usage(fields)
        firsts = (model.loop.submit(each, raw=True, options=options) for each in self._prompts)
        self.answers = Answers("cmpl-", submit_answers(model.loop, firsts, each_seed), n)
        self._logprobs: list[TextLogprobs] = []
        if n_top is not None:
            self._logprobs = [self._begin_logprobs(each) for each in self.answers.generations]

    async def result(self) -> dict[str, Any]:
        """Return the whole response."""
        await self.answers.wait()
        choices = []
        for index, generation in enumerate(self.answers.generations):
            echo = self._echo(index)
            text = "" if self._drops_answer else generation.text
            reason = "length" if self._drops_answer else generation.finish_reason
            logprobs = self._following_logprobs(index)
            choices.append(_choice(index, echo + text, logprobs, reason))
        return {
            **self._head(),
            "choices": choices,
            "usage": self._usage(),
            "timings": self.answers.timings(),
        }

    def close(self) -> None:
        self.answers.close()

    def events(self, ping_s: float) -> AsyncIterator[bytes]:
        """Return the events of a stream."""
        return data_events(self._chunks(ping_s))

    async def _chunks(self, ping_s: float) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the chunks of a stream; None if nothing has happened for some time."""
        generations = self.answers.generations
        n_open, to_echo = len(generations), {*range(len(generations))}
        async for event in self.answers.events(ping_s):
            if event is None:
                yield None
                continue
            index, generation = event.index, generations[event.index]
            piece = "" if self._drops_answer else event.piece
            if index in to_echo:
                to_echo.remove(index)
                piece = self._echo(index) + piece
            logprobs = self._following_logprobs(index)
            if piece or logprobs is not None:
                yield self._chunk(index, piece, logprobs) | activity_of(generation)
            if event.is_last:
                n_open -= 1
                reason = "length" if self._drops_answer else generation.finish_reason
                chunk = self._chunk(index, "", None, reason)
                yield chunk if n_open else {**chunk, "timings": self.answers.timings()}
        if self._wants_usage:
            usage, timings = self._usage(), self.answers.timings()
            yield {**self._head(), "choices": [], "usage": usage, "timings": timings}

    def _echo(self, index: int) -> str:
        """Return the text of an answer's prompt, if the client wants it."""
        if not self._echoes:
            return ""
        prompt = self._prompts[index // self._n]
        return prompt if isinstance(prompt, str) else self._model.engine.tokenizer.decode(prompt)

    def _begin_logprobs(self, generation: BatchedGeneration) -> TextLogprobs:
        before = [] if self._echoes else generation.prompt
        return TextLogprobs(self._model.engine.tokenizer, before, generation.prompt[0])

    def _following_logprobs(self, index: int) -> dict[str, Any] | None:
        """Return the entries of an answer that were not sent yet; None if there are none."""
        if not self._logprobs:
            return None
        generation = self.answers.generations[index]
        # Those of the prompt are computed with the first of its answers.
        first = self.answers.generations[index - index % self._n]
        entries = [*(first.prompt_logprobs or ()), *(generation.logprobs or ())]
        if self._drops_answer:
            entries = entries[: len(generation.prompt)]
        return self._logprobs[index].following(entries)

    def _usage(self) -> dict[str, Any]:
        return usage_object(self.answers, counts_answers=not self._drops_answer)

    def _head(self) -> dict[str, Any]:
        return head("text_completion", self.answers, self._model.engine)

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return {**self._head(), "choices": [_choice(index, text, logprobs, reason)]}


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def read_prompts(fields: Fields) -> list[Prompt]:
    """Return the prompts of a request: a text, token ids, or a list of either. Raises ApiError."""
    given = fields.get("prompt")
    if given is None:
        raise fields.needs("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and _is_id(given[0])):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong("prompt", "a text, token ids, or a list of either", given)
    if len(given) > MAX_PROMPTS:
        raise wrong("prompt", f"at most {MAX_PROMPTS} prompts", len(given))
    for prompt in given:
        is_ids = isinstance(prompt, list) and prompt and all(map(_is_id, prompt))
        if not isinstance(prompt, str) and not is_ids:
            raise wrong("prompt", "a text, token ids, or a list of either", prompt)
    return given


def _is_id(value: object) -> bool:
    return type(value) is int
