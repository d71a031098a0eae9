"""Requests: what a caller wants said becomes an Answer, before any session is involved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hybrid.engine.answer import Answer, AnswerRequest
from hybrid.engine.context_shift import fitted, tokens_to_keep
from hybrid.engine.loading.model_spec import ModelSpec
from hybrid.engine.options import GenerationOptions, check_prompt, checked_ids
from hybrid.errors import InvalidOption
from hybrid.text.chat import Chat
from hybrid.text.generation_config import GenerationDefaults
from hybrid.text.sampling import Sampler
from hybrid.text.tokenizer import Tokenizer

Conversation = tuple[Chat, list[int]]  # a conversation, and the ids that stand for it


class Requests:
    """Makes the answers of a model."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, defaults: GenerationDefaults) -> None:
        self._tokenizer, self._spec, self._defaults = tokenizer, spec, defaults

    def continuing(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions,
        *,
        raw: bool = False,
        known: Conversation | None = None,
    ) -> Answer:
        """Return the answer to a prompt. Raises as `Engine.generate` does.

        `known` is the conversation whose ids a session holds.
        """
        if isinstance(prompt, str) and not raw and self._tokenizer.has_chat_template:
            return self.answering(Chat([{"role": "user", "content": prompt}]), options, known=known)
        return self._answer(self._prompt_ids(prompt), options)

    def answering(
        self, chat: Chat, options: GenerationOptions, *, known: Conversation | None = None
    ) -> Answer:
        """Return the answer to a conversation. Raises as `Engine.chat` does."""
        return self._answer(self._chat_ids(chat, known), options, chat)

    def _answer(
        self, ids: list[int], options: GenerationOptions, chat: Chat | None = None
    ) -> Answer:
        tokenizer, spec = self._tokenizer, self._spec
        n_kept, n_shifts = None, 0
        if options.context_shift:
            n_kept = tokens_to_keep(tokenizer, ids, options.n_keep, chat, spec.n_context)
            ids, n_shifts = fitted(ids, n_kept, spec.n_context)
        check_prompt(ids, spec.n_context, spec.config.max_context)
        for token in options.logit_bias or ():
            if token >= spec.config.vocab_size:
                raise InvalidOption(
                    f"logit_bias: expected token ids below {spec.config.vocab_size}, found {token}"
                )
        request = AnswerRequest(
            ids,
            options.limits(self._defaults, len(ids)),
            options.logprobs,
            options.prompt_logprobs,
            options.speculate is not None,
            chat,
            n_kept,
            n_shifts,
        )
        sampler = Sampler(options.sampling(self._defaults.sampling))
        return Answer(tokenizer, sampler, request, spec.config.eos_ids)

    def _chat_ids(self, chat: Chat, known: Conversation | None) -> list[int]:
        """Return the conversation's ids.

        If it continues the known conversation, only the new messages are encoded and appended to
        the known ids.
        """
        if known is not None:
            earlier, ids = known
            n = len(earlier.messages)
            if replace(chat, messages=chat.messages[:n]) == earlier and len(chat.messages) > n:
                following = self._tokenizer.encode_after_answer(chat, n - 1)
                if following is not None:
                    return ids + following
        return self._tokenizer.encode_chat(chat)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt) or list(self._tokenizer.empty_text)
        return checked_ids(prompt, self._spec.config.vocab_size)
