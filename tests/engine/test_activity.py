"""Which share of each layer fires, reported with an answer if it is requested."""

from __future__ import annotations

import pytest

import hybrid


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=1) as engine:
        yield engine


def test_each_pass_of_decode_has_the_shares_of_a_session(engine):
    generation = engine.generate("Once upon", max_tokens=6, seed=2, layer_activity=True)
    "".join(generation)
    with engine.open_session() as session:
        session.prefill(generation.prompt)
        expected = []
        for token in generation.tokens[:-1]:
            session.reset_counts()
            session.decode(token)
            shares = (count / engine.config.n_neurons for count in session.active_counts)
            expected.append(tuple(shares))
    assert generation.layer_activity == expected
    with hybrid.BatchLoop(engine) as loop:
        batched = loop.submit("Once upon", max_tokens=6, seed=2, layer_activity=True)
        "".join(batched)
        assert batched.layer_activity == expected
        several = [loop.submit("Once", max_tokens=9, seed=i, layer_activity=True) for i in range(3)]
        for answer in several:
            "".join(answer)
            assert all(0 < share < 1 for shares in answer.layer_activity for share in shares)
            assert all(len(shares) == engine.config.n_layers for shares in answer.layer_activity)
            assert len(answer.layer_activity) == answer.stats.decode_steps


def test_drafts_and_forced_tokens_count_as_tokens_of_a_pass(engine):
    for options in ({"speculate": "ngram"}, {"regex": "(the little robot [ab] ){6}"}):
        text = "the little robot " * 4
        generation = engine.generate(text, max_tokens=30, layer_activity=True, **options)
        "".join(generation)
        stats = generation.stats
        if "regex" in options:  # how long drafts are depends on times
            assert stats.forced_tokens > 10
        assert len(generation.layer_activity) == stats.decode_steps
        mean = sum(sum(shares) for shares in generation.layer_activity)
        assert 0 < mean / (engine.config.n_layers * stats.decode_steps) < 0.5


def test_nothing_is_reported_by_default(engine):
    generation = engine.generate("Once", max_tokens=3)
    "".join(generation)
    assert generation.layer_activity is None
