"""A context shift leaves exactly what a new session would hold after the tokens that are left."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import write_chatml_model

import hybrid
from hybrid.engine.context_shift import PROMPT_PART, TASK

N_CONTEXT = 40
STORY = "Once upon a time, there was a little girl"


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", context_size=N_CONTEXT, threads=1) as engine:
        yield engine


def expected(
    engine: hybrid.Engine, sequence: list[int], n_kept: int, n: int, params: hybrid.SamplingParams
) -> tuple[list[int], list[int]]:
    """Generate without shifts: each full context is begun anew in another session.

    Returns the answer, and what the context then holds, the last token included.
    """
    sampler, answer, sequence = hybrid.Sampler(params), [], list(sequence)
    session = engine.open_session()
    session.prefill(sequence)
    while True:
        answer.append(sampler.sample(session.logits))
        if len(answer) == n or answer[-1] in engine.config.eos_ids:
            break
        if len(sequence) == N_CONTEXT:
            rest = sequence[n_kept:]
            sequence = sequence[:n_kept] + rest[(len(rest) + 1) // 2 :]
            session = engine.open_session()
            session.prefill(sequence)
        session.decode(answer[-1])
        sequence.append(answer[-1])
    return answer, [*sequence, answer[-1]]


@pytest.mark.parametrize("speculate", [None, "ngram"])
@pytest.mark.parametrize("n_keep", [0, 7, 36])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_goes_on_as_in_a_new_session(engine, temperature, n_keep, speculate):
    options = hybrid.GenerationOptions(
        temperature=temperature,
        seed=4,
        max_tokens=120,
        speculate=speculate,
        context_shift=True,
        n_keep=n_keep,
    )
    params = options.sampling(engine.default_sampling)
    assert params.repeat_penalty == 1
    with engine.open_session() as session:
        generation = engine.generate(STORY, session=session, options=options)
        list(generation)
        answer, sequence = expected(engine, generation.prompt, 1 + n_keep, 120, params)
        said = [*generation.tokens, *([answer[-1]] if answer[-1] in engine.config.eos_ids else [])]
        assert said == answer
        assert list(session.tokens) == sequence[:-1]
        assert generation.sequence[: len(sequence) - 1] == sequence[:-1]
        assert generation.stats.n_shifts >= 1
        assert not generation.context_is_full
        assert 0.02 < generation.stats.active_fraction < 0.3


def test_without_it_a_full_context_ends_the_answer(engine):
    generation = engine.generate(STORY, max_tokens=120, seed=4)
    list(generation)
    assert generation.context_is_full
    assert (generation.stats.n_shifts, generation.notices) == (0, ())


@pytest.mark.parametrize("speculate", [None, "ngram"])
def test_a_stop_string_that_fills_the_context_shifts_nothing(engine, speculate):
    token = engine.tokenizer.encode("x")[-1]
    text = engine.tokenizer.decode_token(token)
    prompt = engine.tokenizer.encode(STORY)[:1] * (N_CONTEXT - 2)
    options = {"logit_bias": {token: 100}, "max_tokens": 9, "context_shift": True}
    answer = engine.generate(prompt, stop=text * 3, speculate=speculate, **options)
    assert list(answer) == []
    assert (answer.finish_reason, len(answer.tokens)) == ("stop", 3)
    assert (answer.stats.n_shifts, answer.stats.decode_steps, answer.notices) == (0, 2, ())


def test_a_shift_is_said_with_its_progress(engine):
    reports: list[tuple[str, int, int]] = []
    generation = engine.generate(
        STORY, max_tokens=60, temperature=0, stop=(), context_shift=True, n_keep=3
    )
    generation.progress = lambda *report: reports.append(report)
    list(generation)
    n = generation.stats.n_shifts
    times = "once" if n == 1 else f"{n} times"
    assert generation.notices == (
        f"the context was full {times}: its first 4 tokens stayed, and the oldest half of the "
        "others was dropped",
    )
    n_left = N_CONTEXT - 4 - 18
    assert reports == [(TASK, 0, n_left), (TASK, n_left, n_left)] * n


def test_a_shift_may_be_cancelled():
    with hybrid.load("stories", threads=1) as engine, engine.open_session() as session:
        ids = engine.tokenizer.encode(STORY)
        prompt = (ids * 60)[: session.n_context]
        generation = engine.generate(prompt, session=session, temperature=0, context_shift=True)
        assert session.n_context // 2 - 1 < PROMPT_PART
        generation.progress = lambda task, done, total: generation.cancel()
        list(generation)
        assert generation.finish_reason == "cancelled"
        n = session.position
        assert 1 < n < session.n_context
        assert list(session.tokens) == generation.sequence[:n]


def test_a_prompt_that_is_too_long_is_cut(engine):
    prompt = engine.tokenizer.encode(STORY * 12)
    with pytest.raises(hybrid.ContextOverflow, match="holds 40"):
        engine.generate(prompt)
    generation = engine.generate(prompt, context_shift=True, n_keep=5, max_tokens=2)
    list(generation)
    n = len(generation.prompt)
    assert n <= N_CONTEXT
    assert generation.prompt == prompt[:6] + prompt[6 - n :]
    assert generation.stats.n_shifts > 1


@pytest.mark.parametrize("n_keep", [38, 10**6])
def test_keeping_all_of_a_context_is_refused(engine, n_keep):
    with pytest.raises(hybrid.InvalidOption, match=f"{n_keep + 1} tokens are to be kept.* 40"):
        engine.generate(STORY, context_shift=True, n_keep=n_keep)


@pytest.mark.parametrize("options", [{"n_keep": -1}, {"n_keep": 1.5}, {"context_shift": "yes"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(hybrid.InvalidOption, match=next(iter(options))):
        hybrid.GenerationOptions(**options)


def test_a_conversation_goes_on_and_keeps_its_system_message(tmp_path):
    folder = write_chatml_model(tmp_path)
    with (
        hybrid.load(folder, quant="bf16", threads=1, context_size=120) as engine,
        engine.open_session() as session,
    ):
        messages: list[Any] = [{"role": "system", "content": "Speak of cats only."}]
        ids = engine.tokenizer.encode_chat([*messages, {"role": "user", "content": "x"}])
        kept = ids[: ids.index(4096, ids.index(4096) + 1)]  # up to the second <|im_start|>
        assert "cats only" in engine.tokenizer.decode(kept)
        n_shifts = 0
        for n in range(6):
            messages.append({"role": "user", "content": f"Tell me about cat {n}"})
            answer = engine.chat(
                messages, session=session, max_tokens=30, temperature=0, context_shift=True
            )
            list(answer)
            n_shifts += answer.stats.n_shifts
            assert answer.sequence[: len(kept)] == kept
            assert list(session.tokens) == answer.sequence[: session.position]
            if n and not answer.stats.n_shifts:
                assert answer.stats.cached_tokens > len(kept)  # what was said, too
            messages.append({"role": "assistant", "content": answer.text})
        assert n_shifts > 1
