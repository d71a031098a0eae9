"""What a step of the batching loop does, counted in passes: fairness, cancellation, failures."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from tiny_models import write_overflowing_model

import hybrid
from hybrid.engine.batch.batched_generation import BatchedGeneration
from hybrid.engine.batch.shares import shares
from hybrid.engine.batch.steps import Steps
from hybrid.engine.batch.stream import Stream
from hybrid.errors import HybridError
from hybrid.text.sampling import Sampler

PROMPT = list(range(20, 40))


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=1) as engine:
        yield engine


@pytest.fixture
def steps(engine):
    steps = Steps(engine, token_bytes=1, cache_bytes=0)
    yield steps
    steps.close()


def admitted(steps: Steps, engine: hybrid.Engine, prompt: list[int], **options: Any) -> Stream:
    options = {"temperature": 0, "max_tokens": 300} | options
    answer = engine._requests.continuing(prompt, hybrid.GenerationOptions(**options))
    stream = Stream(answer)
    steps.admit(stream)
    return stream


def text_of(stream: Stream) -> str:
    return "".join(iter(stream.mailbox.get, None))


def test_a_running_stream_gets_a_token_in_every_pass_while_a_long_prompt_is_prefilled(
    engine, steps
):
    running = admitted(steps, engine, PROMPT)
    steps.step()
    long = admitted(steps, engine, [(7 * i) % 4000 + 20 for i in range(500)])
    n_passes = 0
    while not long.answer.tokens:
        n_passes += 1
        steps.step()
        assert len(running.answer.tokens) == 1 + n_passes
    assert n_passes == -(-500 // 63)


def test_prompts_share_passes_and_the_oldest_gets_most(engine, steps):
    first = admitted(steps, engine, [30 + i for i in range(400)])
    second = admitted(steps, engine, [40 + i for i in range(400)])
    short = admitted(steps, engine, PROMPT[:10])
    for _ in range(3):
        steps.step()
    assert 400 - len(first.pending) == 2 * (64 - 8) + 64 - 4 - 2
    assert 400 - len(second.pending) == 3 * 4
    assert len(short.answer.tokens) == 1


@pytest.mark.parametrize(
    ("waiting", "room", "expected"),
    [
        ([500], 64, [64]),
        ([10], 63, [10]),
        ([500, 500], 60, [56, 4]),
        ([2, 500, 3], 60, [2, 55, 3]),
        ([500, 1, 500], 10, [6, 1, 3]),
        ([9] * 32, 64, [2] * 32),
        ([9, 9, 9], 64, [9, 9, 9]),
        ([], 64, []),
    ],
)
def test_shares(waiting, room, expected):
    assert shares(waiting, room) == expected


def test_a_cancelled_stream_takes_part_in_no_further_pass(engine, steps, monkeypatch):
    one, two = admitted(steps, engine, PROMPT), admitted(steps, engine, PROMPT[::-1])
    steps.step()
    steps.step()
    sizes = []
    run = steps._batch.run
    monkeypatch.setattr(steps._batch, "run", lambda parts: sizes.append(len(parts)) or run(parts))
    one.answer.cancel()
    steps.step()
    assert sizes == [1]
    assert one.answer.finish_reason == "cancelled"
    assert one not in steps.streams
    assert len(one.answer.tokens) == 2
    assert len(two.answer.tokens) == 3
    assert text_of(one) == one.answer.text


def test_an_answer_whose_event_loop_is_closed_is_cancelled(engine, steps):
    """Its reader waits for a piece when the event loop is closed, and is never resumed."""
    stream, other = admitted(steps, engine, PROMPT), admitted(steps, engine, PROMPT)
    generation, loop = BatchedGeneration(stream, None, ()), asyncio.new_event_loop()
    waiting = loop.create_task(anext(generation))
    loop.run_until_complete(asyncio.sleep(0, loop))
    assert not waiting.done()
    loop.close()
    steps.step()
    steps.step()
    assert stream.answer.finish_reason == "cancelled"
    assert steps.streams == [other]
    assert list(generation) == [generation.text]


def test_what_fails_ends_alone(tmp_path, monkeypatch):
    """Keys overflow, the context is full, all logits are banned, the prompt finds no memory."""
    model = write_overflowing_model(tmp_path)
    sample = Sampler.sample

    def banning(self: Sampler, logits: Any, *others: Any) -> int:
        return sample(self, np.full_like(logits, -np.inf) if self.seed == 13 else logits, *others)

    monkeypatch.setattr(Sampler, "sample", banning)
    with hybrid.load(model, threads=1, context_size=40) as engine:
        alone = engine.generate(PROMPT, temperature=0, max_tokens=12)
        list(alone)
        steps = Steps(engine, token_bytes=1, cache_bytes=0)
        good = admitted(steps, engine, PROMPT, max_tokens=12)
        overflowing = admitted(steps, engine, [*PROMPT, 9])
        full = admitted(steps, engine, [*PROMPT, *PROMPT[:19]])
        banned = admitted(steps, engine, PROMPT, seed=13)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "open_session", _no_memory)
            waiting = Stream(good.answer)
            assert not steps.admit(waiting)  # another one has to end first
            assert waiting not in steps.streams
            lonely = Steps(engine, token_bytes=1, cache_bytes=0)
            without = admitted(lonely, engine, PROMPT)
            lonely.close()
        while steps.streams:
            steps.step()
        assert good.answer.tokens == alone.tokens
        assert text_of(good) == alone.text
        assert full.answer.context_is_full
        assert full.answer.finish_reason == "length"
        assert text_of(full) == full.answer.text
        for stream, error, problem in [
            (overflowing, hybrid.NumericOverflow, "KV cache overflows"),
            (banned, HybridError, "every token is banned"),
            (without, hybrid.OutOfMemory, "no memory"),
        ]:
            with pytest.raises(error, match=problem):
                text_of(stream)
            assert stream.answer.finish_reason == "cancelled"
            assert text_of(stream) == ""
        steps.close()


def _no_memory() -> None:
    raise hybrid.OutOfMemory("no memory")


def test_damaged_weights_end_all(engine, steps, monkeypatch):
    streams = [admitted(steps, engine, PROMPT, max_tokens=n) for n in (1, 5)]

    def refuse(seconds: float | None) -> bool:
        raise hybrid.InvalidArtifact("the file is damaged")

    for stream in streams:
        monkeypatch.setattr(stream.session, "confirm_weights", refuse)
    steps.step()  # the first answer is complete, and waits for the check

    def damaged() -> None:
        raise hybrid.InvalidArtifact("the file is damaged")

    monkeypatch.setattr(streams[1].session, "_in_step", damaged)
    steps.step()
    assert not steps.streams
    for stream in streams:
        with pytest.raises(hybrid.InvalidArtifact, match="damaged"):
            text_of(stream)


def test_a_complete_answer_waits_for_the_check_of_the_weights(engine, steps, monkeypatch):
    is_checked = False
    done, cancelled = (admitted(steps, engine, PROMPT, max_tokens=1) for _ in range(2))
    for stream in (done, cancelled):
        monkeypatch.setattr(stream.session, "confirm_weights", lambda seconds: is_checked)
    steps.step()
    steps.step()
    assert steps.unconfirmed == [done, cancelled]
    cancelled.answer.cancel()
    steps.step()
    assert steps.unconfirmed == [done]
    assert cancelled.answer.finish_reason == "cancelled"
    is_checked = True
    steps.step()
    assert text_of(done) == done.answer.text
    assert done.answer.finish_reason == "length"


def test_counts_and_times_of_one_stream_are_those_of_a_generation(engine, steps):
    generation = engine.generate(PROMPT, temperature=0, max_tokens=30)
    list(generation)
    stream = admitted(steps, engine, PROMPT, max_tokens=30)
    while steps.streams:
        steps.step()
    expected, stats = generation.stats, stream.answer.stats
    for name in ("prompt_tokens", "prefilled_tokens", "generated_tokens", "decode_steps"):
        assert getattr(stats, name) == getattr(expected, name), name
    assert stats.decode_bytes == expected.decode_bytes
    assert stats.active_fraction == pytest.approx(expected.active_fraction)
    assert stats.prefill_s > 0
    assert stats.decode_s > 0
