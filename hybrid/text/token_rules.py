"""TokenRules: tokens that may not come next, because the model's authors forbid them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """Rules of generation_config.json, with the names and the meaning that transformers gives them.

    https://huggingface.co/docs/transformers/main_classes/text_generation describes the fields.
    """

    no_repeat_ngram_size: int = 0  # no so many tokens in a row occur twice, prompt included; 0: off
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that must not be completed
    suppress_tokens: tuple[int, ...] = ()  # never
    begin_suppress_tokens: tuple[int, ...] = ()  # not as the first token of an answer
    min_length: int = 0  # tokens, those of the prompt included, before an answer may end
    min_new_tokens: int = 0  # tokens of an answer before it may end; if not 0, min_length is void

    def banned(
        self, prompt: Sequence[int], answer: Sequence[int], eos_ids: Sequence[int]
    ) -> list[int]:
        """Return the ids that may not follow `prompt` and `answer`, possibly with repetitions."""
        tokens = [*prompt, *answer]
        banned = list(self.suppress_tokens)
        if not answer:
            banned += self.begin_suppress_tokens
        least = self.min_new_tokens + len(prompt) if self.min_new_tokens else self.min_length
        if len(tokens) < least:
            banned += eos_ids
        for *before, last in self.bad_words_ids:
            is_end = not before and last in eos_ids  # such a rule would make an answer endless
            if not is_end and tokens[len(tokens) - len(before) :] == before:
                banned.append(last)
        return banned + self._repeated(tokens)

    def _repeated(self, tokens: list[int]) -> list[int]:
        """Return the ids that would make the last tokens occur a second time."""
        n = self.no_repeat_ngram_size
        if not 0 < n <= len(tokens):
            return []
        ids = np.asarray(tokens)
        windows = np.lib.stride_tricks.sliding_window_view(ids, n)
        is_same = (windows[:, : n - 1] == ids[len(tokens) - n + 1 :]).all(1)
        repeated: list[int] = windows[is_same, n - 1].tolist()
        return repeated
