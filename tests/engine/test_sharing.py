"""Sessions share weights, run at the same time, keep prefixes and chats, and count their work."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from placement.test_profile import random_profile
from predictor_files import decode_counted
from safetensors.numpy import load_file
from tiny_models import ODD_SHAPES, write_chat_model, write_model

import hybrid
from hybrid.engine.loading import choices, pipeline
from hybrid.errors import ContextOverflow, EngineClosed, InvalidOption
from hybrid.notices import Notices
from hybrid.placement.profile import FILE_NAME
from hybrid.text.chat import ChatMessage


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def chat_engine(tmp_path_factory: pytest.TempPathFactory):
    with hybrid.load(write_chat_model(tmp_path_factory.mktemp("chat")), quant="bf16") as engine:
        yield engine


def user(content: str) -> ChatMessage:
    return {"role": "user", "content": content}


def text_of(generation: hybrid.Generation) -> str:
    return "".join(generation)


# Prefixes


def test_tokens_that_a_session_holds_are_not_computed_again(engine):
    ids = engine.tokenizer.encode("Once upon a time there was a little dog")
    fresh = engine.generate(ids, max_tokens=12, temperature=0)
    expected = text_of(fresh)
    with engine.open_session() as session:
        text_of(engine.generate(ids[:6], session=session, max_tokens=1, temperature=0))
        generation = engine.generate(ids, session=session, max_tokens=12, temperature=0)
        assert text_of(generation) == expected
        assert generation.stats.prompt_tokens == len(ids)
        assert generation.stats.cached_tokens == 6
        # For the same prompt again, only the last token runs, because its logits are needed.
        again = engine.generate(ids, session=session, max_tokens=12, temperature=0)
        assert text_of(again) == expected
        assert again.stats.cached_tokens == len(ids) - 1


def test_another_prompt_shares_only_its_beginning(engine):
    with engine.open_session() as session:
        text_of(engine.generate("A cat sat", session=session, max_tokens=5, seed=1))
        other = engine.generate("The sun is", session=session, max_tokens=8, temperature=0)
        assert text_of(other) == text_of(engine.generate("The sun is", max_tokens=8, temperature=0))
        assert other.stats.cached_tokens == 1  # BOS


def test_reset_forgets_all_tokens(engine):
    with engine.open_session() as session:
        text_of(engine.generate("A cat", session=session, max_tokens=3, seed=1))
        session.reset()
        assert session.tokens == ()
        again = engine.generate("A cat", session=session, max_tokens=3, seed=1)
        text_of(again)
        assert again.stats.cached_tokens == 0


def test_a_new_generation_on_a_session_ends_the_one_before(engine):
    with engine.open_session() as session:
        first = engine.generate("A cat", session=session, max_tokens=50, seed=1)
        next(first)
        second = engine.generate("A dog", session=session, max_tokens=5, seed=1)
        assert list(first) == []
        assert first.finish_reason == "cancelled"
        assert text_of(second) == text_of(engine.generate("A dog", max_tokens=5, seed=1))


def test_closing_a_session_ends_its_generation(engine):
    session = engine.open_session()
    generation = engine.generate("A cat", session=session, max_tokens=50, seed=1)
    next(generation)
    session.close()
    assert list(generation) == []
    assert generation.finish_reason == "cancelled"
    with pytest.raises(EngineClosed, match="session is closed"):
        engine.generate("A cat", session=session)
    with pytest.raises(EngineClosed, match="session is closed"):
        session.prefill([1])


# Threads


def test_sessions_on_several_threads_write_what_each_would_alone(engine):
    prompts = ["Once upon a time", "The dog", "Tom and Lily", "One day, a bird"]
    expected = [text_of(engine.generate(p, max_tokens=25, seed=3)) for p in prompts]
    results: list[list[str]] = [[] for _ in prompts]

    def work(index: int) -> None:
        with engine.open_session() as session:
            for _ in range(3):
                options = {"session": session, "max_tokens": 25, "seed": 3}
                results[index].append(text_of(engine.generate(prompts[index], **options)))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[text] * 3 for text in expected]


def test_one_session_used_from_two_threads_ends_one_generation_cleanly(engine):
    with engine.open_session() as session:
        first = engine.generate("A cat", session=session, max_tokens=400, temperature=2.0, seed=1)
        next(first)
        second: list[str] = []

        def work() -> None:
            generation = engine.generate("A dog", session=session, max_tokens=5, seed=1)
            second.append(text_of(generation))

        thread = threading.Thread(target=work)
        thread.start()
        list(first)
        thread.join()
    assert first.finish_reason == "cancelled"
    assert second == [text_of(engine.generate("A dog", max_tokens=5, seed=1))]


# Chat


def test_a_chat_computes_each_message_once(chat_engine):
    """A message prefills its own tokens, and the last token of the answer before it.

    That token was sampled, but has never been run.
    """
    options = {"max_tokens": 7, "temperature": 0}
    tokenizer = chat_engine.tokenizer
    with chat_engine.open_session() as session:
        messages = [{"role": "system", "content": "Be kind."}, user("Hello there")]
        first = chat_engine.chat(messages, session=session, **options)
        messages.append({"role": "assistant", "content": text_of(first)})
        assert first.stats.cached_tokens == 0
        assert first.prompt == tokenizer.encode_chat(messages[:2])
        for question in ("And you?", "<AI> is no marker <用户>"):
            before = len(session.tokens)
            messages.append(user(question))
            message = tokenizer.encode_after_answer(messages, len(messages) - 2)
            answer = chat_engine.chat(messages, session=session, **options)
            messages.append({"role": "assistant", "content": text_of(answer)})
            n_prefilled = answer.stats.prompt_tokens - answer.stats.cached_tokens
            assert n_prefilled == len(message) + 1
            assert answer.stats.cached_tokens == before
            # The same ids in a fresh session give the same answer.
            fresh = chat_engine.generate(answer.prompt, **options)
            assert text_of(fresh) == answer.text


def test_a_chat_that_was_changed_is_encoded_anew(chat_engine):
    with chat_engine.open_session() as session:
        text_of(chat_engine.chat([user("Hello")], session=session, max_tokens=4, temperature=0))
        changed = [user("Hello"), {"role": "assistant", "content": "Hi."}, user("Well?")]
        generation = chat_engine.chat(changed, session=session, max_tokens=4, temperature=0)
        assert generation.prompt == chat_engine.tokenizer.encode_chat(changed)
        answer = text_of(generation)
    assert answer == text_of(chat_engine.chat(changed, max_tokens=4, temperature=0))


def test_a_chat_cut_by_a_stop_string_is_encoded_from_its_text(chat_engine):
    whole = text_of(chat_engine.chat([user("Hello")], max_tokens=12, temperature=0))
    stop = whole[4:7]
    with chat_engine.open_session() as session:
        options = {"session": session, "max_tokens": 12, "temperature": 0}
        answer = text_of(chat_engine.chat([user("Hello")], stop=stop, **options))
        assert stop not in answer
        messages = [user("Hello"), {"role": "assistant", "content": answer}, user("More")]
        generation = chat_engine.chat(messages, **options)
        assert generation.prompt == chat_engine.tokenizer.encode_chat(messages)


def test_chat_without_a_template_is_refused(engine):
    with pytest.raises(InvalidOption, match="no chat template"):
        engine.chat([user("Hello")])


# Contexts


def test_a_session_never_takes_more_than_its_context(tmp_path):
    with hybrid.load(write_model(tmp_path, vocab_size=4096), context_size=8) as engine:
        session = engine.open_session()
        session.prefill(list(range(10, 16)))
        with pytest.raises(ContextOverflow, match="holds 8 tokens; 6 are there and 3 more"):
            session.prefill([1, 2, 3])
        session.decode(1)
        session.decode(2)
        with pytest.raises(ContextOverflow):
            session.decode(3)
        assert session.tokens == (10, 11, 12, 13, 14, 15, 1, 2)


def test_a_session_of_another_engine_is_refused(engine):
    with (
        hybrid.load("stories") as other,
        other.open_session() as session,
        pytest.raises(InvalidOption, match="another engine"),
    ):
        engine.generate("A", session=session)


def test_an_interrupted_call_leaves_tokens_and_cache_in_step(engine, monkeypatch):
    """KeyboardInterrupt comes after the native call and before the session records its tokens."""
    session, other = engine.open_session(), engine.open_session()
    ids = engine.tokenizer.encode("Once upon a time there was")
    session.prefill(ids[:4])
    session._native.prefill(np.asarray(ids[4:6]))  # what an interrupted prefill leaves
    assert session.position == 4
    session.prefill(ids[4:])
    other.prefill(ids)
    np.testing.assert_array_equal(session.logits, other.logits)
    session._native.decode(5)
    session.decode(7)
    other.decode(7)
    np.testing.assert_array_equal(session.logits, other.logits)


def test_an_interrupted_generation_has_ended(engine, monkeypatch):
    with engine.open_session() as session:
        generation = engine.generate("A cat", session=session, max_tokens=50, seed=1)
        next(generation)
        with monkeypatch.context() as patch:
            patch.setattr(session, "decode", lambda token: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                list(generation)
        assert generation.finish_reason == "cancelled"
        assert list(generation) == []
        again = text_of(engine.generate("A cat", session=session, max_tokens=8, seed=1))
        assert again == text_of(engine.generate("A cat", max_tokens=8, seed=1))


def test_a_conversation_edited_in_place_is_another_one(chat_engine):
    options = {"max_tokens": 4, "temperature": 0}
    with chat_engine.open_session() as session:
        messages = [user("Hello there")]
        answer = text_of(chat_engine.chat(messages, session=session, **options))
        messages += [{"role": "assistant", "content": answer}, user("And?")]
        messages[0]["content"] = "Something else"
        generation = chat_engine.chat(messages, session=session, **options)
        assert generation.prompt == chat_engine.tokenizer.encode_chat(messages)


def test_ids_that_are_not_integers_are_refused(engine):
    with engine.open_session() as session, pytest.raises(ValueError, match="integers"):
        session.prefill([1.7])


# Counts


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize("has_tied_head", [False, True])
def test_counted_bytes_equal_the_formula(tmp_path, quant, dense, has_tied_head):
    changes = {"vocab_size": 4096, "tie_word_embeddings": has_tied_head}
    with hybrid.load(write_model(tmp_path, **changes), quant=quant, threads=3) as engine:
        session = engine.open_session(dense=dense)
        session.prefill(np.arange(300))  # more than one span of attention
        assert sum(session.decode_bytes.values()) == 0  # not counted: it reads rows for many tokens
        session.reset_counts()
        for token in (5, 6, 7):
            session.decode(token)
        n_active = sum(session.active_counts)
        config = engine.config
        n_all = 3 * config.n_layers * config.n_neurons
        assert 0 < n_active < n_all
        expected = engine.expected_decode_bytes(
            n_tokens=3, first_position=300, n_active=n_all if dense else n_active
        )
        assert sum(session.decode_bytes.values()) == expected
        parts = session.decode_bytes
        assert parts.pop("predict") == 0
        assert all(parts.values())


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_counted_bytes_equal_the_formula_for_any_hidden_size(tmp_path, quant, shape):
    with hybrid.load(write_model(tmp_path, vocab_size=4096, **shape), quant=quant) as engine:
        decode_counted(engine, np.arange(40))


def test_a_dense_session_gives_the_same_bits_with_more_work(engine):
    ids = engine.tokenizer.encode("Once upon a time there was a dog")
    sparse, dense = engine.open_session(), engine.open_session(dense=True)
    np.testing.assert_array_equal(
        sparse.prefill(ids, all_logits=True), dense.prefill(ids, all_logits=True)
    )
    sparse.decode(300)
    dense.decode(300)
    np.testing.assert_array_equal(sparse.logits, dense.logits)
    assert sparse.active_counts == dense.active_counts
    assert sum(sparse.decode_bytes.values()) < sum(dense.decode_bytes.values())


def test_engine_stats_add_up():
    with hybrid.load("stories") as engine:
        assert engine.stats.n_generations == 0
        assert engine.stats.weight_bytes > 7e6
        first = engine.generate("A cat", max_tokens=5, seed=1)
        text_of(first)
        second = engine.generate("A dog", max_tokens=50, seed=1)
        next(second)
        second.close()
        second.close()
        stats = engine.stats
        assert stats.n_generations == 2
        assert stats.prompt_tokens == len(first.prompt) + len(second.prompt)
        assert stats.generated_tokens == len(first.tokens) + len(second.tokens)
        assert stats.load_s > 0


# Logprobs


def test_logprobs_are_those_of_the_models_distribution(engine):
    generation = engine.generate(
        "Once upon", max_tokens=6, temperature=2.0, top_k=5, seed=3, logprobs=4
    )
    text_of(generation)
    entries = generation.logprobs
    assert [entry.token for entry in entries] == generation.tokens
    assert "".join(entry.text for entry in entries) == generation.text
    session = engine.open_session()
    session.prefill(generation.prompt)
    for entry in entries:
        logits = session.logits.astype(np.float64)
        expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert entry.logprob == pytest.approx(expected[entry.token], abs=1e-9)
        best = np.argsort(-expected, kind="stable")[:4]
        assert [token for token, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-9)
        session.decode(entry.token)


@pytest.mark.parametrize("logprobs", [-1, 101, 1.5, "2", True])
def test_logprobs_out_of_range_are_refused(engine, logprobs):
    with pytest.raises(InvalidOption, match="logprobs"):
        engine.generate("A", logprobs=logprobs)


@pytest.mark.parametrize("as_batch", [False, True])
def test_logprobs_of_a_prompt_are_those_of_the_models_distribution(engine, as_batch):
    ids = engine.tokenizer.encode("Once upon a time there was a red ball. " * 12)
    assert len(ids) > 64  # several passes
    with engine.open_session() as session:
        logits = session.prefill(ids, all_logits=True).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    with hybrid.BatchLoop(engine) as loop, engine.open_session() as session:
        list(engine.generate(ids, session=session, max_tokens=1))  # leaves keys and values
        list(loop.submit(ids, max_tokens=1))
        options = {"max_tokens": 3, "prompt_logprobs": 2, "temperature": 0}
        if as_batch:
            generation = loop.submit(ids, **options)
        else:
            generation = engine.generate(ids, session=session, **options)
        text = "".join(generation)
    assert text == "".join(engine.generate(ids, max_tokens=3, temperature=0))
    first, *entries = generation.prompt_logprobs
    assert first is None
    assert [entry.token for entry in entries] == ids[1:]
    assert generation.stats.cached_tokens == 0
    for row, entry in zip(logprobs, entries, strict=False):
        assert entry.text == engine.tokenizer.decode_token(entry.token)
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-9)
        best = np.argsort(-row, kind="stable")[:2]
        assert [token for token, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(row[best].tolist(), abs=1e-9)


def test_one_prompt_token_has_no_logprobs(engine):
    generation = engine.generate([5], max_tokens=1, prompt_logprobs=0)
    assert len("".join(generation)) >= 0
    assert generation.prompt_logprobs == [None]


def test_no_logprobs_by_default(engine):
    assert engine.generate("A", max_tokens=1).logprobs is None
    with_none = engine.generate("A", max_tokens=2, logprobs=0)
    text_of(with_none)
    assert [entry.top for entry in with_none.logprobs] == [(), ()]


# Memory


def test_weights_beyond_free_memory_are_mapped_or_refused(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", vocab_size=4096)
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "home"))
    available = choices.WORKING_BYTES + 1000
    monkeypatch.setattr(choices, "available_memory_bytes", lambda: available)
    with pytest.raises(hybrid.OutOfMemory, match="mmap"):
        hybrid.load(folder, mmap=False)
    with hybrid.load(folder) as engine:
        assert engine.stats.is_mapped
        assert any("mapped from disk" in notice for notice in engine.notices)
        assert text_of(engine.generate("A", max_tokens=3, seed=1))
    assert list(Path(tmp_path / "home" / "packed").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("left", "n_threads"),
    [(0, 1), (choices.THREAD_BYTES - 1, 1), (choices.THREAD_BYTES, 2), (10**9, 8)],
)
def test_with_little_memory_fewer_threads_pack(monkeypatch, left, n_threads):
    for mmap, weight_bytes in ((True, 10**10), (None, 10**7)):
        available = choices.WORKING_BYTES + left + (0 if mmap else weight_bytes)
        monkeypatch.setattr(choices, "available_memory_bytes", lambda n=available: n)
        options = hybrid.LoadOptions(mmap=mmap)
        needs = choices.PackingNeeds(weight_bytes, 8)
        residence = choices.choose_residence(options, needs, Notices())
        assert residence.n_threads == n_threads
        assert residence.use_mmap == bool(mmap)


def test_without_mmap_each_thread_that_packs_holds_a_matrix(tmp_path, monkeypatch):
    held, weight_bytes = 100 << 20, 10**8
    needs = choices.PackingNeeds(weight_bytes, 8, held)
    for n_threads in (1, 2, 5):
        extra = (n_threads - 1) * (choices.THREAD_BYTES + held)
        available = choices.WORKING_BYTES + weight_bytes + held + extra
        monkeypatch.setattr(choices, "available_memory_bytes", lambda n=available: n)
        residence = choices.choose_residence(hybrid.LoadOptions(mmap=False), needs, Notices())
        assert residence.n_threads == n_threads
    monkeypatch.setattr(
        choices, "available_memory_bytes", lambda: choices.WORKING_BYTES + weight_bytes + held - 1
    )
    with pytest.raises(hybrid.OutOfMemory, match="mmap"):
        choices.choose_residence(hybrid.LoadOptions(mmap=False), needs, Notices())


@pytest.mark.parametrize("has_profile", [False, True])
def test_the_matrices_that_are_held_are_counted_as_stored(tmp_path, monkeypatch, has_profile):
    folder = write_model(tmp_path / "model", vocab_size=4096)
    if has_profile:
        with hybrid.load(folder) as engine:
            random_profile(engine).save(folder / FILE_NAME)
    needed: list[choices.PackingNeeds] = []
    choose = choices.choose_residence

    def record(options, needs, notices):
        needed.append(needs)
        return choose(options, needs, notices)

    monkeypatch.setattr(pipeline, "choose_residence", record)
    for mmap in (None, True, False):
        hybrid.load(folder, mmap=mmap).close()
    sizes = {name: t.nbytes for name, t in load_file(folder / "model.safetensors").items()}
    largest = max(size for name, size in sizes.items() if ".mlp." in name)
    assert [needs.held_bytes for needs in needed] == [0, 0, largest * (1 + has_profile)]


def test_memory_that_holds_nothing_but_weights_is_too_little(monkeypatch):
    monkeypatch.setattr(choices, "available_memory_bytes", lambda: choices.WORKING_BYTES - 1)
    for mmap in (None, True, False):
        with pytest.raises(hybrid.OutOfMemory, match="limit of this container"):
            hybrid.load("stories", mmap=mmap)


@pytest.mark.parametrize("timed", [False, True])
def test_a_timed_session_says_where_time_went(engine, timed):
    session = engine.open_session(timed=timed)

    def prefill():
        session.prefill(np.arange(20))

    def decode():
        for token in (5, 6, 7):
            session.decode(token)

    for work in (prefill, decode):
        work()
        seconds = session.stage_seconds
        assert list(seconds) == [*session.decode_bytes, "waiting"]
        stages = session.decode_bytes.keys() - {"predict"}
        assert all((seconds[stage] > 0) == timed for stage in stages)
        session.reset_counts()
        assert not any(session.stage_seconds.values())
