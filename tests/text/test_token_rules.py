"""TokenRules ban what transformers' logits processors ban."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.text.token_rules import TokenRules

VOCAB, EOS = 12, (2, 5)
IDS = st.integers(0, VOCAB - 1)
PROMPTS = st.lists(IDS, min_size=1, max_size=12)
ANSWERS = st.lists(IDS, max_size=12)


def banned(rules: TokenRules, prompt: Sequence[int], answer: Sequence[int]) -> set[int]:
    return set(rules.banned(prompt, answer, EOS))


def reference(processor: Any, prompt: list[int], answer: list[int]) -> set[int]:
    import torch

    scores = processor(torch.tensor([prompt + answer]), torch.zeros(1, VOCAB))
    return set(torch.nonzero(scores[0] == -torch.inf).flatten().tolist())


@pytest.fixture(scope="module")
def processors() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.generation.logits_process


@given(prompt=PROMPTS, answer=ANSWERS, n=st.integers(1, 5))
def test_repeated_ngrams(processors: Any, prompt: list[int], answer: list[int], n: int) -> None:
    expected = reference(processors.NoRepeatNGramLogitsProcessor(n), prompt, answer)
    assert banned(TokenRules(no_repeat_ngram_size=n), prompt, answer) == expected


@given(
    prompt=PROMPTS,
    answer=ANSWERS,
    words=st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=6),
)
def test_bad_words(
    processors: Any, prompt: list[int], answer: list[int], words: list[list[int]]
) -> None:
    words = [*words, [1]]  # transformers wants at least one word that is not the end of a text
    expected = reference(processors.NoBadWordsLogitsProcessor(words, list(EOS)), prompt, answer)
    rules = TokenRules(bad_words_ids=tuple(map(tuple, words)))
    assert banned(rules, prompt, answer) == expected


@given(prompt=PROMPTS, answer=ANSWERS, tokens=st.lists(IDS, min_size=1))
def test_suppressed_tokens(
    processors: Any, prompt: list[int], answer: list[int], tokens: list[int]
) -> None:
    always = reference(processors.SuppressTokensLogitsProcessor(tokens), prompt, answer)
    assert banned(TokenRules(suppress_tokens=tuple(tokens)), prompt, answer) == always
    processor = processors.SuppressTokensAtBeginLogitsProcessor(tokens, len(prompt))
    first = reference(processor, prompt, answer)
    assert banned(TokenRules(begin_suppress_tokens=tuple(tokens)), prompt, answer) == first


@given(prompt=PROMPTS, answer=ANSWERS, least=st.integers(1, 14))
def test_least_lengths(processors: Any, prompt: list[int], answer: list[int], least: int) -> None:
    new = processors.MinNewTokensLengthLogitsProcessor(len(prompt), least, list(EOS))
    expected = reference(new, prompt, answer)
    assert banned(TokenRules(min_new_tokens=least), prompt, answer) == expected
    # min_new_tokens makes min_length void.
    rules = TokenRules(min_new_tokens=least, min_length=100)
    assert banned(rules, prompt, answer) == expected
    total = processors.MinLengthLogitsProcessor(least, list(EOS))
    expected = reference(total, prompt, answer)
    assert banned(TokenRules(min_length=least), prompt, answer) == expected


def test_without_rules_nothing_is_banned() -> None:
    assert TokenRules().banned([1, 1, 1], [1], EOS) == []
    assert TokenRules(no_repeat_ngram_size=3).banned([1], [], EOS) == []
