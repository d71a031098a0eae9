"""Requests: what a caller wants said becomes an Answer, before any session is involved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybrid.engine.answer import Answer, AnswerRequest
from hybrid.engine.context_shift import fitted, tokens_to_keep
from hybrid.engine.loading.model_spec import ModelSpec
from hybrid.engine.options import GenerationOptions, check_prompt, checked_ids
from hybrid.errors import ContextOverflow, InvalidOption
from hybrid.text.chat import Chat
from hybrid.text.generation_config import GenerationDefaults
from hybrid.text.grammar import Form, Grammar, Grammars
from hybrid.text.sampling import Sampler
from hybrid.text.tokenizer import Tokenizer
from hybrid.text.tool_calls import ToolFormat, function_of
from hybrid.text.tool_grammar import forced_calls

Conversation = tuple[Chat, list[int]]  # a conversation, and the ids that stand for it


class Requests:
    """Makes the answers of a model."""

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, defaults: GenerationDefaults) -> None:
        self._tokenizer, self._spec, self._defaults = tokenizer, spec, defaults
        eos_ids = [*spec.config.eos_ids]
        if tokenizer.has_chat_template:
            end = tokenizer.end_of_answer(Chat([{"role": "user", "content": "Hello"}]))
            eos_ids += [] if end is None or end in eos_ids else [end]
        self.grammars = Grammars(tokenizer, eos_ids)

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
        if isinstance(prompt, str) and not options.context_shift:
            self._refuse_huge(len(prompt))
        return self._answer(self._prompt_ids(prompt), options)

    def answering(
        self, chat: Chat, options: GenerationOptions, *, known: Conversation | None = None
    ) -> Answer:
        """Return the answer to a conversation. Raises as `Engine.chat` does."""
        if not options.context_shift:
            self._refuse_huge(sum(map(_n_characters, (chat.messages, chat.tools))))
        wish = options.tool_wish
        if chat.tools is not None and not wish.is_allowed:
            chat = replace(chat, tools=None)
        tool_format, grammar = self._tools(chat, options)
        chat = self._tokenizer.with_tools(chat)
        return self._answer(self._chat_ids(chat, known), options, chat, tool_format, grammar)

    def _refuse_huge(self, n_characters: int) -> None:
        """Raise ContextOverflow for texts so long that encoding them would be a waste of seconds.

        Their number of tokens is then a lower bound. The factor leaves room for normalizers.
        """
        n_context, longest = self._spec.n_context, self._tokenizer.longest_piece
        if n_characters > 4 * n_context * longest:
            n_tokens = n_characters // longest
            raise ContextOverflow(
                f"the prompt has more than {n_tokens} tokens, the context holds {n_context}; "
                "shorten the prompt",
                n_tokens=n_tokens,
                n_context=n_context,
            )

    def _tools(
        self, chat: Chat, options: GenerationOptions
    ) -> tuple[ToolFormat | None, Grammar | None]:
        """Return how a chat's tools are called, and the grammar if a call is required."""
        wish = options.tool_wish
        if not chat.tools:
            if wish.is_required:
                raise InvalidOption("tool_choice: a call is required, but there are no tools")
            return None, None
        tool_format = self._tokenizer.tool_format(chat)
        if not wish.is_required:
            return tool_format, None
        tools = [tool for tool in chat.tools if wish.name in (None, function_of(tool)[0])]
        if not tools:
            raise InvalidOption(f"tool_choice: there is no tool {wish.name!r:.80}")
        if options.form is not None:
            raise InvalidOption(
                f"tool_choice: a call is required, which excludes {options.form.option}"
            )
        spell, one = self._tokenizer.spell_marker, not options.parallel_tool_calls
        source = forced_calls(tool_format, tools, spell, one=one or wish.name is not None)
        return tool_format, self.grammars.compile(Form("lark", source, "tools"))

    def _answer(
        self,
        ids: list[int],
        options: GenerationOptions,
        chat: Chat | None = None,
        tool_format: ToolFormat | None = None,
        grammar: Grammar | None = None,
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
        form = options.form
        if form is not None:
            grammar = self.grammars.compile(form)
        request = AnswerRequest(
            ids,
            options.limits(self._defaults, len(ids)),
            options.logprobs,
            options.prompt_logprobs,
            options.layer_activity,
            options.speculate is not None and grammar is None,
            chat,
            n_kept,
            n_shifts,
            grammar,
            tool_format,
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


def _n_characters(value: Any) -> int:
    """Return the characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_n_characters, value.values()))
    return sum(map(_n_characters, value)) if isinstance(value, list) else 0
