"""POST /v1/chat/completions: the answer to a conversation.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hybrid import BatchedGeneration, GenerationOptions
from hybrid.server.answers import Answers, submit_answers
from hybrid.server.api_error import ApiError
from hybrid.server.events import data_events
from hybrid.server.fields import Fields
from hybrid.server.openai.head import activity_of, head, usage_object
from hybrid.server.openai.logprobs import chat_logprobs
from hybrid.server.openai.options import (
    MAX_CHOICES,
    form_options,
    limit_of_chat,
    max_tokens,
    sampling_options,
    seeds,
    wants_usage,
)
from hybrid.server.openai.tools import (
    delta_of,
    end_of_calls,
    message_of,
    read_conversation,
    tool_options,
)
from hybrid.server.service import Model

MAX_TOP_LOGPROBS = 20


def submit_chat(model: Model, fields: Fields, options: GenerationOptions) -> BatchedGeneration:
    """Submit the conversation of a request. Raises ApiError or HybridError."""
    if fields.boolean("continue_final_message") and fields.boolean("add_generation_prompt"):
        raise ApiError(400, "add_generation_prompt and continue_final_message exclude each other")
    return model.loop.submit_chat(**read_conversation(fields), options=options)


class ChatCompletion:
    """A chat completion while it is generated."""

    def __init__(self, model: Model, fields: Fields) -> None:
        """Submit what a request wants. Raises ApiError or HybridError."""
        self._model = model
        n = fields.integer("n", 1, MAX_CHOICES, 1)
        n_top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
        has_logprobs = fields.boolean("logprobs")
        if n_top and not has_logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        each_seed = seeds(fields, n)
        options = GenerationOptions(
            **sampling_options(fields, model.engine.config.eos_ids),
            **form_options(fields),
            **tool_options(fields),
            max_tokens=limit_of_chat(model, max_tokens(fields)),
            logprobs=n_top or 0 if has_logprobs else None,
            seed=each_seed[0],
        )
        self.is_stream, self._wants_usage = fields.boolean("stream"), wants_usage(fields)
        first = submit_chat(model, fields, options)
        self.answers = Answers("chatcmpl-", submit_answers(model.loop, [first], each_seed), n)

    async def result(self) -> dict[str, Any]:
        """Return the whole response."""
        await self.answers.wait()
        return {
            **self._head("chat.completion"),
            "choices": [
                self._choice(index, generation)
                for index, generation in enumerate(self.answers.generations)
            ],
            "usage": usage_object(self.answers),
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
        for index in range(len(generations)):
            yield self._chunk(index, {"role": "assistant", "content": None})
        n_sent = [0] * len(generations)  # entries of logprobs
        n_open = len(generations)
        parsers = [generation.tool_parser() for generation in generations]
        async for event in self.answers.events(ping_s):
            if event is None:
                yield None
                continue
            generation, parser = generations[event.index], parsers[event.index]
            delta = delta_of(parser, event)
            logprobs = self._logprobs(generation, n_sent[event.index])
            n_sent[event.index] += 0 if logprobs is None else len(logprobs["content"])
            if any(delta.values()) or (logprobs and logprobs["content"]):
                chunk = self._chunk(event.index, delta, logprobs)
                yield chunk | activity_of(generation)
            if event.is_last:
                n_open -= 1
                has_calls = parser is not None and parser.n_calls > 0
                reason = end_of_calls(generation) if has_calls else generation.finish_reason
                chunk = self._chunk(event.index, {}, reason=reason)
                yield chunk if n_open else {**chunk, "timings": self.answers.timings()}
        if self._wants_usage:
            usage = usage_object(self.answers)
            head = self._head("chat.completion.chunk")
            yield {**head, "choices": [], "usage": usage, "timings": self.answers.timings()}

    def _head(self, kind: str) -> dict[str, Any]:
        return head(kind, self.answers, self._model.engine)

    def _choice(self, index: int, generation: BatchedGeneration) -> dict[str, Any]:
        message, reason = message_of(generation)
        logprobs = self._logprobs(generation, 0)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, generation: BatchedGeneration, first: int) -> dict[str, Any] | None:
        if generation.logprobs is None:
            return None
        return chat_logprobs(generation.logprobs[first:], self._model.engine.tokenizer)
