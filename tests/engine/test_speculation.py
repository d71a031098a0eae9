"""Speculation changes how many passes a text takes, never the text: `==` throughout."""

from __future__ import annotations

import itertools
import random
import shutil

import numpy as np
import pytest
from tiny_models import STORIES

import hybrid
from hybrid.engine.speculation import (
    LENGTHS,
    SIZES,
    DraftLength,
    Lookup,
    PassTimes,
    Rates,
)

REPEATS = "Once upon a time, there was a little girl. Once upon a time, there was a little"


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=1) as engine:
        yield engine


@pytest.fixture
def guesses(monkeypatch) -> list[int]:
    """Draft what this list of ids says, but one guess in eight is wrong.

    There are 1, 3, 7, 15 and 31 guesses in rotation, however long that takes.
    """
    text: list[int] = []
    draw, sizes = random.Random(5), itertools.cycle(SIZES)

    def choose(self: DraftLength, length: int, room: int) -> int:
        return max(min(next(sizes), room), 0)

    def draft(self: Lookup, n: int) -> list[int]:
        following = text[len(self.tokens) : len(self.tokens) + n]
        return [token if draw.random() < 7 / 8 else 9 for token in following]

    monkeypatch.setattr(DraftLength, "choose", choose)
    monkeypatch.setattr(Lookup, "draft", draft)
    return text


def check(
    engine: hybrid.Engine, prompt: str | list[int], guesses: list[int], **options: object
) -> hybrid.Generation:
    """Compare a text with and without drafts, and what the sessions then hold."""
    found = []
    options = {"seed": 1, "raw": True} | options
    for speculate in (None, "ngram"):
        with engine.open_session() as session:
            generation = engine.generate(prompt, session=session, speculate=speculate, **options)
            list(generation)
            tokens = session.tokens
            if len(tokens) < session.n_context:
                session.decode(5)  # its logits depend on the whole KV cache
            found.append((generation, tokens, session.logits.tobytes()))
        guesses[:] = [*generation.prompt, *generation.tokens, *engine.config.eos_ids, *range(40)]
    (plain, *state), (speculated, *other) = found
    for name in ("text", "tokens", "logprobs", "finish_reason", "context_is_full", "seed"):
        assert getattr(speculated, name) == getattr(plain, name), name
    assert other == state
    stats = speculated.stats
    assert stats.generated_tokens == plain.stats.generated_tokens
    assert stats.decode_steps + stats.accepted_tokens == plain.stats.decode_steps
    assert plain.stats.drafted_tokens == 0
    return speculated


def texts(n: int) -> list[str]:
    """Return prompts of which half repeat themselves."""
    draw = random.Random(3)
    names, verbs = ("Tom", "The dog", "A girl", "Mia", "The sun"), ("saw", "ran to", "had", "ate")
    things = ("a ball", "the tree", "a big cake", "the park")

    def sentence() -> str:
        return f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}. "

    few = [sentence() for _ in range(n)]
    return [text * (1 + i % 2) + draw.choice(names) for i, text in enumerate(few)]


def test_two_hundred_texts_are_equal_greedy_and_sampled(engine, guesses):
    n_drafted = n_accepted = 0
    for seed, prompt in enumerate(texts(200)):
        options = {"temperature": (0, 0.8, 1.3)[seed % 3], "repeat_penalty": (1, 1.1)[seed % 2]}
        options |= {"frequency_penalty": (0, 0.3)[seed // 2 % 2], "logit_bias": {7 + seed: 1.5}}
        found = check(engine, prompt, guesses, seed=seed, max_tokens=8 + seed % 12, **options)
        n_drafted += found.stats.drafted_tokens
        n_accepted += found.stats.accepted_tokens
    assert n_drafted > n_accepted > 600


def test_texts_are_equal_with_the_lookups_own_drafts(engine, monkeypatch):
    """Here the prompt repeats itself, and drafts are as long as this machine's speed suggests."""
    monkeypatch.setattr(PassTimes, "of", lambda self, n: 1 + n / 100)
    for temperature in (0, 0.5):
        found = check(engine, REPEATS * 3, [], max_tokens=50, temperature=temperature)
        assert found.stats.drafted_tokens > 0


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_log_probabilities_are_equal(engine, guesses, temperature):
    found = check(engine, REPEATS, guesses, max_tokens=40, logprobs=3, temperature=temperature)
    assert found.stats.accepted_tokens > 0
    assert len(found.logprobs) == len(found.tokens)


def test_an_answer_ends_at_its_limit_within_a_draft(engine, guesses):
    for max_tokens in range(1, 20):
        found = check(engine, REPEATS, guesses, max_tokens=max_tokens)
        assert found.finish_reason == "length"


def test_a_context_fills_up_within_a_draft(guesses):
    for n_context in range(30, 42, 4):
        with hybrid.load("stories", context_size=n_context, threads=1) as engine:
            found = check(engine, REPEATS, guesses, max_tokens=None)
            assert found.context_is_full
            assert found.stats.accepted_tokens > 0


def test_an_answer_ends_before_a_stop_string_within_a_draft(engine, guesses):
    text = "".join(engine.generate(REPEATS, max_tokens=50, temperature=0))
    for start in range(0, len(text) - 6, 5):
        stop = text[start : start + 4]
        found = check(engine, REPEATS, guesses, max_tokens=50, temperature=0, stop=stop)
        assert found.finish_reason == "stop"


def test_the_model_ends_its_answer_within_a_draft(engine, guesses):
    for seed in (3, 4):
        found = check(engine, "Once upon a time", guesses, max_tokens=500, seed=seed)
        assert found.finish_reason == "stop"
        assert found.stats.accepted_tokens > 50


def test_cancelling_ends_the_answer_with_the_tokens_so_far(engine, guesses):
    check(engine, REPEATS, guesses, max_tokens=200)  # it sets the guesses
    with engine.open_session() as session:
        generation = engine.generate(
            REPEATS, session=session, max_tokens=200, seed=1, speculate="ngram"
        )
        for _ in range(4):
            next(generation)
        said = generation.text
        generation.cancel()
        assert said + "".join(generation) == generation.text
        assert generation.finish_reason == "cancelled"
        assert session.tokens == (*generation.prompt, *generation.tokens)
        assert generation.stats.accepted_tokens > 0


def test_between_pieces_the_session_holds_tokens_of_the_text_only(engine, guesses):
    check(engine, REPEATS, guesses, max_tokens=60)
    with engine.open_session() as session:
        generation = engine.generate(
            REPEATS, session=session, max_tokens=60, seed=1, speculate="ngram"
        )
        for _ in generation:
            so_far = (*generation.prompt, *generation.tokens)
            assert session.tokens in (so_far, so_far[:-1])
            assert engine.tokenizer.decode(list(so_far)) == REPEATS + generation.text


def test_rules_ban_tokens_within_a_draft(tmp_path, guesses):
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    rules = '{"no_repeat_ngram_size": 3}'
    (folder / "generation_config.json").write_text(rules, encoding="utf-8")
    with hybrid.load(folder, threads=1) as engine:
        found = check(engine, REPEATS, guesses, max_tokens=60, temperature=0)
        assert found.stats.accepted_tokens > 0


@pytest.mark.parametrize("options", [{"preview_head": True}, {"predictor": "auto"}])
def test_a_preview_and_a_predictor_give_equal_texts(guesses, options):
    with hybrid.load("stories", threads=1, **options) as engine:
        found = check(engine, REPEATS, guesses, max_tokens=40, temperature=0)
        assert found.stats.accepted_tokens > 0


def test_a_guess_that_overflows_the_cache_is_dropped(engine, guesses, monkeypatch):
    def refuse(self, *args, **options):
        if options.get("all_logits"):
            raise hybrid.NumericOverflow("too large")
        return prefill(self, *args, **options)

    prefill = hybrid.Session.prefill
    monkeypatch.setattr(hybrid.Session, "prefill", refuse)
    assert check(engine, REPEATS, guesses, max_tokens=20).stats.drafted_tokens == 0


def test_a_dense_session_speculates_too(engine, guesses):
    plain = check(engine, REPEATS, guesses, max_tokens=40)
    with engine.open_session(dense=True) as session:
        options = {"max_tokens": 40, "seed": 1, "speculate": "ngram"}
        dense = engine.generate(REPEATS, session=session, **options)
        assert "".join(dense) == plain.text
        assert dense.stats.accepted_tokens > 0


def test_other_names_of_speculation_are_refused():
    with pytest.raises(hybrid.InvalidOption, match="speculate: expected one of ngram"):
        hybrid.GenerationOptions(speculate="magic")


# The lookup, by a plain search.


def longest(tokens: list[int]) -> tuple[int, int]:
    """Return the longest length of LENGTHS whose end occurred before, and the latest place."""
    for n in reversed(LENGTHS):
        for at in range(len(tokens) - 1, n - 1, -1):
            if tokens[at - n : at] == tokens[-n:]:
                return n, at
    return 0, 0


def test_the_draft_follows_the_longest_and_latest_match():
    draw = random.Random(1)
    for n_kinds in (2, 3, 8):
        lookup = Lookup()
        for _ in range(400):
            lookup.append(draw.randrange(n_kinds))
            n, at = longest(lookup.tokens)
            assert lookup.length >= n
            if n:
                end, follows = lookup.tokens[-n:], lookup.draft(1)
                runs = np.lib.stride_tricks.sliding_window_view(lookup.tokens, n + 1)
                assert [*end, *follows] in runs.tolist()
            if lookup.length == n > 0:
                assert lookup.draft(1) == [lookup.tokens[at]]


def test_a_draft_goes_on_with_a_loop():
    assert Lookup([1, 2, 3, 1, 2, 3, 1, 2]).draft(7) == [3, 1, 2, 3, 1, 2, 3]
    assert Lookup([9, 9, 9]).draft(3) == [9, 9, 9]
    assert Lookup([1, 2, 3, 4]).draft(3) == []


# The policy, with times that are said and not measured.


def policy(seconds: dict[int, float], rate: float) -> DraftLength:
    made = DraftLength()
    for n_tokens, s in seconds.items():
        made.times.note(n_tokens, s)
    for _ in range(200):
        for length in (2, 3, 4, 6, 8, 16):
            made.rates.note(length, random.Random(length).random() < rate)
    return made


def test_times_lie_on_lines_between_what_was_measured():
    times = PassTimes()
    times.note(1, 1.0)
    assert times.of(8) == 1.0
    times.note(64, 64.0)
    assert times.of(8) == pytest.approx(8.0)
    times.note(4, 1.6)
    assert times.of(2) == pytest.approx(1.2)
    times.note(16, 1.0)  # so the four tokens were measured in a bad moment
    assert times.of(4) == 1.0
    assert times.of(128) > times.of(64)


def simulate(came, seconds_of, n_tokens: int = 2000) -> tuple[float, float]:
    """Return the seconds of a text with and without drafts. `came()` says if a guess is right."""
    made, total, n = DraftLength(), 0.0, 0
    made.times.note(64, seconds_of(64))
    made.note_pass(0, 0, seconds_of(1))
    while n < n_tokens:
        size = made.choose(8, 1000)
        right = list(itertools.takewhile(bool, (came() for _ in range(size))))
        made.rates.note(8, len(right) == size and came())
        for _ in right:
            made.rates.note(8, True)
        seconds = seconds_of(1 + size)
        made.note_pass(size, len(right), seconds)
        total, n = total + seconds, n + 1 + len(right)
    return total, n * seconds_of(1)


def test_wrong_guesses_cost_at_most_three_percent():
    for slope in (0.05, 0.3, 1.0):
        spent, plain = simulate(lambda: False, lambda n, slope=slope: 1 + slope * (n - 1))
        assert spent <= 1.03 * plain


def test_even_if_times_are_wrong_at_first():
    draw = random.Random(2)
    spent, plain = simulate(lambda: draw.random() < 0.5, lambda n: 1.0 if n in (1, 64) else n)
    assert spent <= 1.03 * plain


def test_right_guesses_make_drafts_longer():
    spent, plain = simulate(lambda: True, lambda n: 1 + 0.1 * (n - 1))
    assert plain / spent > 5


def test_a_draft_fits_its_room():
    made = policy({1: 1.0, 32: 1.2}, rate=1.0)
    made.note_pass(31, 31, 1.2)
    assert made.choose(8, 31) == 31
    assert made.choose(8, 8) == 7
    assert made.choose(8, 0) == 0


def test_rates_follow_the_text():
    rates = Rates()
    before = rates.of(3)
    for _ in range(50):
        rates.note(3, True)
    assert rates.of(3) > 0.9 > before
    assert rates.of(5) != rates.of(3)
    assert rates.of(1000) == rates.of(16)
