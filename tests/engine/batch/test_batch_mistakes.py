"""What is wrong with a request or a loop is a typed error, and nobody waits forever."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings

import pytest
from tiny_models import write_endless_model

import hybrid
from hybrid.engine.batch.steps import Steps
from hybrid.engine.loading import choices


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_endless_model(tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def engine(model):
    with hybrid.load(model, threads=1) as engine:
        yield engine


def endless(loop: hybrid.BatchLoop) -> hybrid.BatchedGeneration:
    return loop.submit("Once", max_tokens=None, context_shift=True, temperature=1)


def test_options_of_a_loop_are_checked(engine):
    for options, problem in [
        ({"n_sequences": 0}, "n_sequences: expected an integer from 1 to 32, found 0"),
        ({"n_sequences": 33}, "found 33"),
        ({"queue_size": 0}, "queue_size: expected an integer, 1 or more"),
        ({"cache_bytes": -1}, "cache_bytes: expected an integer, 0 or more"),
    ]:
        with pytest.raises(hybrid.InvalidOption, match=problem):
            hybrid.BatchLoop(engine, **options)


def test_mistakes_of_a_request_are_those_of_generate(engine):
    with hybrid.BatchLoop(engine) as loop:
        for prompt, options, error in [
            ("a", {"temperature": -1}, hybrid.InvalidOption),
            ([99999], {}, hybrid.InvalidOption),
            ([], {}, hybrid.InvalidOption),
            ([5] * 700, {}, hybrid.ContextOverflow),
        ]:
            with pytest.raises(error) as alone:
                engine.generate(prompt, **options)
            with pytest.raises(error) as batched:
                loop.submit(prompt, **options)
            assert str(batched.value) == str(alone.value)
        with pytest.raises(hybrid.InvalidOption, match="chat template"):
            loop.submit_chat([{"role": "user", "content": "Hello"}])


def test_speculation_has_no_effect_and_says_so(engine):
    with hybrid.BatchLoop(engine) as loop:
        generation = loop.submit("Once", speculate="ngram", max_tokens=3)
        list(generation)
        assert generation.stats.drafted_tokens == 0
        assert any("speculate has no effect" in line for line in generation.notices)
        assert loop.submit("Once", max_tokens=3).notices == ()


def test_the_queue_is_bounded_and_cancelled_requests_leave_it(engine):
    with hybrid.BatchLoop(engine, n_sequences=1, queue_size=2) as loop:
        running = endless(loop)
        next(running)
        waiting = [endless(loop) for _ in range(2)]
        with pytest.raises(hybrid.QueueFull, match="2 requests wait already"):
            endless(loop)
        with hybrid.BatchLoop(engine, n_sequences=5, queue_size=1) as free:
            burst = [endless(free) for _ in range(5)]  # however far the loop's thread is
            assert all(next(generation) for generation in burst)
        n_before = engine.stats.n_generations
        waiting[0].close()
        assert engine.stats.n_generations == n_before + 1
        assert waiting[0].finish_reason == "cancelled"
        assert waiting[0].text == ""
        last = loop.submit("Once", max_tokens=2)
        running.close()
        waiting[1].close()
        assert len(last.tokens) + len(list(last)) > 0
        assert last.finish_reason == "length"


def test_an_answer_that_is_closed_while_it_runs_leaves_the_others_alone(engine):
    alone = "".join(engine.generate("Tom", temperature=0, max_tokens=40))
    with hybrid.BatchLoop(engine) as loop:
        closed, other = endless(loop), loop.submit("Tom", temperature=0, max_tokens=40)
        next(closed)
        closed.close()
        assert closed.finish_reason == "cancelled"
        assert list(closed) == []
        closed.close()
        assert "".join(other) == alone


def test_a_closed_loop_ends_its_answers_and_refuses_others(engine):
    n_threads = threading.active_count()
    loop = hybrid.BatchLoop(engine, n_sequences=2)
    generations = [endless(loop) for _ in range(4)]
    next(generations[1])
    loop.close()
    loop.close()
    for generation in generations:
        list(generation)
        assert generation.finish_reason == "cancelled"
    with pytest.raises(hybrid.EngineClosed, match="loop is closed"):
        loop.submit("more")
    assert threading.active_count() == n_threads


def test_answers_go_on_when_their_engine_is_closed_and_no_other_begins():
    with hybrid.load("stories", threads=1) as engine:
        alone = "".join(engine.generate("Tom", temperature=0, max_tokens=40))
        loop = hybrid.BatchLoop(engine, n_sequences=1)
        running, waiting = (loop.submit("Tom", temperature=0, max_tokens=40) for _ in range(2))
        begun = next(running)
    with loop:
        assert begun + "".join(running) == alone
        try:  # the session of the first answer may be taken over, and needs no engine
            assert "".join(waiting) == alone
        except hybrid.EngineClosed:
            assert waiting.finish_reason == "cancelled"
        with pytest.raises(hybrid.EngineClosed):
            loop.submit("more")
    with pytest.raises(hybrid.EngineClosed):
        hybrid.BatchLoop(engine)


def test_a_loop_that_nothing_refers_to_ends():
    n_threads = threading.active_count()
    engine = hybrid.load("stories", threads=1)
    list(engine.agenerate("Once", max_tokens=2))
    assert threading.active_count() == n_threads + 1
    del engine
    gc.collect()
    deadline = time.monotonic() + 20
    while threading.active_count() > n_threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == n_threads


def test_a_mistake_of_our_own_reaches_every_consumer(engine, monkeypatch):
    def fail(self: Steps) -> None:
        raise AssertionError("a mistake")

    with hybrid.BatchLoop(engine, n_sequences=1) as loop:
        generations = [endless(loop) for _ in range(3)]
        next(generations[0])
        monkeypatch.setattr(Steps, "step", fail)
        for generation in generations:
            with pytest.raises(AssertionError, match="a mistake"):
                list(generation)
        with pytest.raises(hybrid.EngineClosed):
            loop.submit("more")


def test_contexts_that_do_not_fit_are_refused_with_both_numbers(engine, monkeypatch):
    config = engine.config
    context = 4 * config.n_layers * config.n_kv_heads * config.head_dim * engine.n_context
    free = 3 * context + 50_000_000
    monkeypatch.setattr(choices, "available_memory_bytes", lambda: free)
    hybrid.BatchLoop(engine, n_sequences=3, cache_bytes=50_000_000).close()
    with pytest.raises(hybrid.OutOfMemory) as refused:
        hybrid.BatchLoop(engine, n_sequences=3, cache_bytes=60_000_000)
    assert f"3 sequences ({context / 1e6:.1f} MB each) and 60.0 MB" in str(refused.value)
    assert f"need {free / 1e6 + 10:.1f} MB, and {free / 1e6:.1f} MB" in str(refused.value)


def test_a_loop_without_a_thread_is_refused(engine, no_threads):
    with pytest.raises(hybrid.HybridError, match="limit of processes"):
        hybrid.BatchLoop(engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_has_no_loop(model):
    with hybrid.load(model, threads=1) as engine, hybrid.BatchLoop(engine) as loop:
        generation = endless(loop)
        next(generation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
            child = os.fork()
        if child == 0:
            n_errors = 0
            for use in (lambda: loop.submit("a"), lambda: next(generation), engine.open_batch):
                try:
                    use()
                except hybrid.EngineClosed:
                    n_errors += 1
            loop.close()
            os._exit(n_errors)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert next(generation)
