"""Answers are read with `async for`, in one event loop or several, and end with their tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_chatml_model, write_endless_model

import hybrid

PROMPTS = ["Once upon a time", "The little robot", "One day, Mia", "A dog", "The sun", "Tom saw"]
OPTIONS = {"temperature": 0.9, "max_tokens": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def engine(model) -> Iterator[hybrid.Engine]:
    with hybrid.load(model, threads=1) as engine:
        yield engine


def expected(engine: hybrid.Engine) -> list[str]:
    return [
        "".join(engine.generate(prompt, seed=seed, **OPTIONS))
        for seed, prompt in enumerate(PROMPTS)
    ]


async def answers(engine: hybrid.Engine) -> list[str]:
    async def answer(seed: int, prompt: str) -> str:
        pieces = engine.agenerate(prompt, seed=seed, **OPTIONS)
        return "".join([piece async for piece in pieces])

    return await asyncio.gather(*(answer(*pair) for pair in enumerate(PROMPTS)))


def test_texts_are_those_of_generate(engine):
    assert asyncio.run(answers(engine)) == expected(engine)


def test_event_loops_of_several_threads_share_an_engine(engine):
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(asyncio.run(answers(engine))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected(engine)] * 3


def test_achat_answers_as_chat_does(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]

    async def chat(engine: hybrid.Engine) -> str:
        return "".join([piece async for piece in engine.achat(messages, **OPTIONS, seed=1)])

    with hybrid.load(write_chatml_model(tmp_path), threads=1) as engine:
        assert asyncio.run(chat(engine)) == "".join(engine.chat(messages, **OPTIONS, seed=1))


def endless(engine: hybrid.Engine) -> hybrid.BatchedGeneration:
    return engine.agenerate(PROMPTS[0], max_tokens=None, context_shift=True, temperature=1)


def test_cancelling_the_task_cancels_the_answer(engine):
    async def cancel() -> hybrid.BatchedGeneration:
        generation = endless(engine)
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in generation:
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while generation.finish_reason is None:  # within this event loop, which goes on
            await asyncio.sleep(0.001)
        return generation

    assert asyncio.run(asyncio.wait_for(cancel(), 20)).finish_reason == "cancelled"


def test_an_answer_that_nothing_refers_to_is_cancelled(engine):
    generation = endless(engine)
    answer = generation._answer
    next(generation)
    del generation
    deadline = time.monotonic() + 20
    while answer.finish_reason is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert answer.finish_reason == "cancelled"


def test_closing_the_engine_ends_its_answers_and_threads(model):
    n_threads = threading.active_count()
    with hybrid.load(model, threads=1) as engine:
        generations = [endless(engine) for _ in range(6)]
        next(generations[0])
    for generation in generations:
        text = "".join(generation)
        assert generation.text.endswith(text)
        assert generation.finish_reason == "cancelled"
    assert threading.active_count() == n_threads
    with pytest.raises(hybrid.EngineClosed):
        engine.agenerate("more")
