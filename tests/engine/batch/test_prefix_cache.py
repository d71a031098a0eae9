"""The prefix cache changes what is computed, and no text."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

import hybrid
from hybrid.engine.batch.prefix_cache import LEAST_COPY, MAX_IDLE, PrefixCache
from hybrid.engine.session import Session

SYSTEM = list(range(100, 140))
OPTIONS = {"temperature": 0.8, "seed": 5, "max_tokens": 12}


@pytest.fixture(scope="module")
def engine() -> Iterator[hybrid.Engine]:
    with hybrid.load("stories", threads=1) as engine:
        yield engine


@pytest.fixture
def cache(engine) -> Iterator[PrefixCache]:
    cache = PrefixCache(engine.open_session, 10, 1000)
    yield cache
    cache.close()


def left(cache: PrefixCache, engine: hybrid.Engine, tokens: list[int]) -> Session:
    session = engine.open_session()
    session.prefill(tokens)
    cache.leave(session)
    return session


def bits_after(session: Session, tokens: list[int]) -> bytes:
    session.prefill(tokens)
    return session.logits.tobytes()


def test_a_session_whose_tokens_begin_the_prompt_is_taken_over(cache, engine):
    session = left(cache, engine, SYSTEM[:5])
    assert cache.take(SYSTEM, []) == (session, 5)
    assert cache.n_bytes == 0
    assert bits_after(session, SYSTEM[5:]) == bits_after(engine.open_session(), SYSTEM)


def test_the_last_token_of_the_prompt_is_computed_again(cache, engine):
    session = left(cache, engine, SYSTEM)
    assert cache.take(SYSTEM, []) == (session, 39)
    assert session.tokens == tuple(SYSTEM[:39])


def test_a_session_that_goes_on_otherwise_is_copied_and_stays(cache, engine):
    other = left(cache, engine, [*SYSTEM, 7, 8])
    session, n = cache.take([*SYSTEM, 9], [])
    assert (n, session.tokens) == (40, tuple(SYSTEM))
    assert session is not other
    assert cache.n_bytes == 10 * 42
    assert bits_after(session, [9]) == bits_after(engine.open_session(), [*SYSTEM, 9])


def test_a_running_session_is_copied_even_if_it_begins_the_prompt(cache, engine):
    with engine.open_session() as running:
        running.prefill(SYSTEM)
        session, n = cache.take([*SYSTEM, 9], [running])
        assert (n, session.tokens) == (40, tuple(SYSTEM))
        assert session is not running


@pytest.mark.parametrize("n", [LEAST_COPY - 1, LEAST_COPY])
def test_short_beginnings_are_not_copied(cache, engine, n):
    left(cache, engine, [*SYSTEM[:n], 7])
    session, n_taken = cache.take([*SYSTEM[:n], 8, 9], [])
    assert n_taken == session.position == (n if n == LEAST_COPY else 0)


def test_the_longest_beginning_counts(cache, engine):
    short = left(cache, engine, SYSTEM[:20])
    left(cache, engine, [*SYSTEM, 7])
    session, n = cache.take([*SYSTEM, 8], [])
    assert n == 40
    assert session is not short


def test_the_session_used_longest_ago_is_evicted(cache, engine):
    first, second = (left(cache, engine, [*SYSTEM, n]) for n in (1, 2))
    cache.take([*SYSTEM, 1, 3], [])  # taken over: neither in the cache nor evicted
    third = left(cache, engine, [*SYSTEM, 3])
    cache.take([*SYSTEM, 2], [])[0].close()
    assert cache.n_bytes == 10 * 41  # the second one was taken over, too
    fourth = left(cache, engine, [*SYSTEM, 4])
    cache.take([*SYSTEM, 3][:40] + [5], [])[0].close()  # copied from the third one
    left(cache, engine, [7] * 30)
    with pytest.raises(hybrid.EngineClosed):
        _ = fourth.logits
    assert third.position == 41
    assert third.logits.size
    assert first.logits.size
    assert second.position == 40


@pytest.mark.parametrize("budget", [0, 399])
def test_what_exceeds_the_budget_is_not_kept(engine, budget):
    cache = PrefixCache(engine.open_session, 10, budget)
    session = left(cache, engine, SYSTEM)
    assert cache.n_bytes == 0
    with pytest.raises(hybrid.EngineClosed):
        _ = session.logits
    assert cache.take(SYSTEM, [])[1] == 0


def texts(engine: hybrid.Engine, cache_bytes: int) -> tuple[list[str], list[int]]:
    """Answer a conversation that goes on, its last message again, and others that begin alike."""
    found, n_cached, history = [], [], SYSTEM
    with hybrid.BatchLoop(engine, n_sequences=3, cache_bytes=cache_bytes) as loop:
        for step in range(3):
            generation = loop.submit(history, **OPTIONS)
            found.append("".join(generation))
            n_cached.append(generation.stats.cached_tokens)
            history = [*history, *generation.tokens, 50 + step, 60]
        again = [loop.submit(history, **OPTIONS | {"seed": seed}) for seed in range(4)]
        found += ["".join(generation) for generation in again]
        n_cached += [generation.stats.cached_tokens for generation in again]
    return found, n_cached


def test_texts_are_the_same_with_and_without_it(engine):
    cached, n_cached = texts(engine, 1 << 20)
    plain, none = texts(engine, 0)
    assert cached == plain
    assert none == [0] * 7
    assert n_cached[:3] == [0, 40 + 11, 40 + 11 + 3 + 11]
    n_prompt = 40 + 3 * (12 + 2)
    assert n_cached[3] == n_prompt - 3
    assert n_cached[-1] == n_prompt - 1  # the whole prompt, which an earlier one has left
    assert engine.stats.cached_tokens >= sum(n_cached)


def test_prompts_that_begin_alike_are_computed_once(engine):
    """They come at the same time, before any of them is computed."""
    prompts = [[*SYSTEM * 3, 60 + i, 70] for i in range(3)] + [[5, 6, 7]]
    alone = [engine.generate(prompt, **OPTIONS) for prompt in prompts]
    expected = ["".join(generation) for generation in alone]
    gate = threading.Event()
    with hybrid.BatchLoop(engine, n_sequences=5) as loop:
        holding = loop.submit([9] * 20, max_tokens=1)
        step, loop._worker._steps.step = loop._worker._steps.step, gate.wait
        found = [loop.submit(prompt, **OPTIONS) for prompt in prompts]
        again = loop.submit_again(found[0], seed=99)
        loop._worker._steps.step = step
        gate.set()
        assert ["".join(generation) for generation in found] == expected
        list(again)
        list(holding)
        other = "".join(engine.generate(prompts[0], **OPTIONS | {"seed": 99}))
        assert again.text == other
        n_cached = [generation.stats.cached_tokens for generation in (*found, again)]
        assert n_cached == [0, len(SYSTEM) * 3, len(SYSTEM) * 3, 0, len(SYSTEM) * 3 + 1]


def test_scored_prompts_make_nobody_wait(engine):
    prompt = [*SYSTEM * 8, 5]
    with hybrid.BatchLoop(engine, n_sequences=4) as loop:
        list(loop.submit(prompt, **OPTIONS))  # leaves its keys and values
        step, gate = loop._worker._steps.step, threading.Event()
        loop._worker._steps.step = lambda: gate.wait() and step()
        scored = [loop.submit(prompt, prompt_logprobs=0, max_tokens=1) for _ in range(2)]
        plain = loop.submit(prompt, **OPTIONS)
        gate.set()
        list(plain)
        assert plain.stats.cached_tokens == len(prompt) - 1
        for each in scored:
            list(each)


def test_idle_sessions_have_a_number(engine):
    cache = PrefixCache(engine.open_session, 1, 1 << 30)
    for n in range(MAX_IDLE + 5):
        left(cache, engine, [n, 7, 9])
    assert len(cache._idle) == MAX_IDLE
    cache.close()


def test_idle_sessions_make_room_for_a_new_one(engine):
    sessions = []

    def open_session() -> Session:
        if sum(session._native is not None for session in sessions) >= 3:
            raise hybrid.OutOfMemory("no memory")
        sessions.append(engine.open_session())
        return sessions[-1]

    cache = PrefixCache(open_session, 1, 1 << 20)
    for n in range(3):
        session, _ = cache.take([n, 9], [])
        session.prefill([n, *SYSTEM])
        cache.leave(session)
    session, n_cached = cache.take([0, *SYSTEM, 5, 6], [])
    assert n_cached == 0 or session.position == n_cached
    assert len(cache._idle) == 2
    cache.take([77, 9], [])
    cache.take([78, 9], [])
    with pytest.raises(hybrid.OutOfMemory):
        cache.take([79, 9], [])
    cache.close()


def test_who_waits_for_a_prompt_goes_on_when_that_is_cancelled(engine):
    prompt = [*SYSTEM * 8, 5]
    with hybrid.BatchLoop(engine, n_sequences=3) as loop:
        gate, step = threading.Event(), loop._worker._steps.step
        loop._worker._steps.step = lambda: gate.wait() and step()
        found = [loop.submit(prompt, **OPTIONS) for _ in range(2)]
        found[0].cancel()
        gate.set()
        assert "".join(found[1]) == "".join(engine.generate(prompt, **OPTIONS))


def test_a_context_shift_leaves_nothing(engine):
    with hybrid.load("stories", threads=1, context_size=64) as engine:
        prompt = [*SYSTEM, *SYSTEM[:15]]
        with hybrid.BatchLoop(engine) as loop:
            shifted = loop.submit(prompt, context_shift=True, **OPTIONS | {"temperature": 0})
            list(shifted)
            assert shifted.stats.n_shifts == 1
            again = loop.submit([*shifted.sequence, 5], **OPTIONS)
            list(again)
            assert again.stats.cached_tokens == 0
