"""A Batch gives sessions the tokens and bits that they get alone, and mistakes are typed."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import write_overflowing_model

import hybrid
from hybrid.engine.session import Session


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=2, context_size=64) as engine:
        yield engine


def opened(engine: hybrid.Engine, *prompts: list[int]) -> list[Session]:
    sessions = [engine.open_session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    return sessions


PROMPTS = [1, 5, 6], [1, 9], [1, 7, 8, 20]


def test_one_call_decodes_one_token_of_each(engine):
    together, alone = opened(engine, *PROMPTS), opened(engine, *PROMPTS)
    batch = engine.open_batch()
    for step in range(5):
        batch.decode(together, [10 + step, 20 + step, 30 + step])
        for i, session in enumerate(alone):
            session.decode(10 * (i + 1) + step)
            assert together[i].tokens == session.tokens
            np.testing.assert_array_equal(together[i].logits, session.logits)
    assert sum(batch.active_counts) == sum(sum(s.active_counts) for s in together + alone) - sum(
        sum(s.active_counts) for s in opened(engine, *PROMPTS) * 2
    )
    assert batch.decode_bytes["gate"] == 5 * _gate_bytes(engine)
    batch.reset_counts()
    assert sum(batch.decode_bytes.values()) == sum(batch.active_counts) == 0


def _gate_bytes(engine: hybrid.Engine) -> int:
    with engine.open_session() as session:
        session.decode(5)
        return session.decode_bytes["gate"]


def test_a_pass_mixes_prompts_and_single_tokens(engine):
    one, two = opened(engine, [1, 5], [1])
    batch = engine.open_batch()
    batch.append([hybrid.BatchPart(one, [7]), hybrid.BatchPart(two, list(range(10, 40)), False)])
    batch.append([hybrid.BatchPart(two, np.array([3])), hybrid.BatchPart(one, [8, 9])])
    alone = opened(engine, [1, 5, 7, 8, 9], [1, *range(10, 40), 3])
    for together, session in zip((one, two), alone, strict=True):
        assert together.tokens == session.tokens
        assert together.logits.tobytes() == session.logits.tobytes()


def test_mistakes_are_refused_before_anything_runs(engine):
    one, two, closed = opened(engine, [1, 5], [1, 6], [1])
    closed.close()
    (full,) = opened(engine, [1] * 64)
    batch, dense = engine.open_batch(), engine.open_session(dense=True)
    with hybrid.load("stories", threads=1, context_size=64) as other:
        foreign = other.open_session()
        for parts, error, problem in [
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(closed, [2])],
                hybrid.EngineClosed,
                "session is closed",
            ),
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(full, [2])],
                hybrid.ContextOverflow,
                "holds 64 tokens",
            ),
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(foreign, [2])],
                hybrid.InvalidOption,
                "session 2 of 2",
            ),
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(dense, [2])],
                hybrid.InvalidOption,
                "without dense",
            ),
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(one, [2])],
                hybrid.InvalidOption,
                "twice",
            ),
            (
                [hybrid.BatchPart(one, [1] * 33), hybrid.BatchPart(two, [2] * 32)],
                hybrid.InvalidOption,
                "found 65",
            ),
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(two, [])],
                hybrid.InvalidOption,
                "found 1 of 2",
            ),
            ([], hybrid.InvalidOption, "found 0 of 0"),
            (
                [hybrid.BatchPart(one, [1]), hybrid.BatchPart(two, [engine.config.vocab_size])],
                ValueError,
                "vocabulary",
            ),
        ]:
            with pytest.raises(error, match=problem):
                batch.append(parts)
            assert one.tokens == (1, 5)
            assert two.tokens == (1, 6)
    with pytest.raises(hybrid.InvalidOption, match="one for each of 2 sessions, found 1"):
        batch.decode([one, two], [1])
    batch.decode([one, two], [1, 2])
    assert one.tokens == (1, 5, 1)


def test_an_overflow_names_its_session_and_leaves_the_others_alone(tmp_path):
    with hybrid.load(write_overflowing_model(tmp_path), threads=1) as engine:
        one, two, three = opened(engine, [1], [1, 6, 8], [7])
        batch = engine.open_batch()
        with pytest.raises(
            hybrid.NumericOverflow, match=r"session 2 of 3: .* load it with kv bf16"
        ):
            batch.append(
                [
                    hybrid.BatchPart(one, [5]),
                    hybrid.BatchPart(two, [4, 9]),
                    hybrid.BatchPart(three, [5]),
                ]
            )
        assert [session.tokens for session in (one, two, three)] == [(1, 5), (1, 6, 8), (7, 5)]
        batch.decode([one, two, three], [6, 6, 6])  # nothing of the overflow is left
        alone = opened(engine, [1, 5, 6], [1, 6, 8, 6], [7, 5, 6])
        for together, session in zip((one, two, three), alone, strict=True):
            assert together.logits.tobytes() == session.logits.tobytes()


def test_a_closed_engine_opens_no_batch():
    with hybrid.load("stories", threads=1) as engine:
        pass
    with pytest.raises(hybrid.EngineClosed):
        engine.open_batch()
