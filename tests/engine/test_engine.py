"""The library's surface: load, generate, stop, close, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from tiny_models import write_model

import hybrid


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=2) as engine:
        yield engine


def test_a_story_comes_in_pieces_that_make_up_its_text(engine):
    generation = engine.generate("Once upon a time", max_tokens=40, seed=1)
    pieces = list(generation)
    assert len(pieces) > 20
    assert "".join(pieces) == generation.text
    assert len(generation.tokens) == generation.stats.generated_tokens <= 40
    everything = engine.tokenizer.decode(generation.prompt + generation.tokens)
    assert everything == "Once upon a time" + generation.text


def test_a_seed_repeats_a_run_and_is_told(engine):
    first = engine.generate("The cat", max_tokens=30)
    text = "".join(first)
    again = engine.generate("The cat", max_tokens=30, seed=first.seed)
    assert "".join(again) == text
    assert "".join(engine.generate("The cat", max_tokens=30, seed=first.seed + 1)) != text


def test_greedy_needs_no_seed(engine):
    texts = {"".join(engine.generate("The cat", max_tokens=20, temperature=0)) for _ in range(2)}
    assert len(texts) == 1


def test_token_ids_are_taken_as_they_stand(engine):
    ids = engine.tokenizer.encode("The cat")
    assert list(engine.generate(ids, max_tokens=9, temperature=0)) == list(
        engine.generate("The cat", max_tokens=9, temperature=0)
    )


def test_finish_reasons(engine):
    stopped = engine.generate("Once upon a time", max_tokens=500, seed=3)
    assert stopped.finish_reason is None
    "".join(stopped)
    assert stopped.finish_reason == "stop"
    limited = engine.generate("Once upon a time", max_tokens=3)
    "".join(limited)
    assert limited.finish_reason == "length"
    assert len(limited.tokens) == 3


def test_a_full_context_ends_the_text():
    with hybrid.load("stories", context_size=12) as engine:
        generation = engine.generate("Once upon a time", max_tokens=500, seed=3)
        "".join(generation)
        assert generation.finish_reason == "length"
        assert len(generation.prompt) + len(generation.tokens) == 12 + 1  # the last is never run


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers():
    with hybrid.load("stories", context_size=8) as engine:
        exact = engine.tokenizer.encode("a a a a a a a")
        assert len(exact) == 8
        assert "".join(engine.generate(exact, max_tokens=5)) is not None
        with pytest.raises(hybrid.ContextOverflow, match=r"9 tokens.* holds 8.*up to 512"):
            engine.generate("a a a a a a a a")


def test_cancel_from_another_thread(engine):
    generation = engine.generate("Once upon a time", max_tokens=400, temperature=2.0, seed=5)
    next(generation)
    thread = threading.Thread(target=generation.cancel)
    thread.start()
    thread.join()
    list(generation)
    assert generation.finish_reason == "cancelled"
    assert len(generation.tokens) <= 2


def test_generations_on_several_threads_equal_those_on_one(engine):
    prompts = ["The dog", "A girl", "Tom said", "One day"]
    options = {"max_tokens": 40, "seed": 7}
    expected = ["".join(engine.generate(prompt, **options)) for prompt in prompts]
    texts: dict[int, str] = {}

    def work(index: int) -> None:
        texts[index] = "".join(engine.generate(prompts[index], **options))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[index] for index in range(4)] == expected


def test_stats_count_what_happened(engine):
    generation = engine.generate("Once upon a time", max_tokens=10, seed=1)
    list(generation)
    stats = generation.stats
    assert stats.prompt_tokens == 5
    assert (stats.generated_tokens, stats.decode_steps) == (10, 9)
    assert stats.prefill_tps > 0
    assert stats.decode_tps > 0
    assert 0.02 < stats.active_fraction < 0.3


def test_an_empty_prompt_begins_a_text(engine):
    assert "".join(engine.generate("", max_tokens=5, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(engine, options, message):
    with pytest.raises(hybrid.InvalidOption, match=message):
        engine.generate("x", **options)


@pytest.mark.parametrize("ids", [[-1], [4096], [1.5], ["a"], []])
def test_token_ids_out_of_range_are_refused(engine, ids):
    with pytest.raises(hybrid.InvalidOption, match="prompt"):
        engine.generate(ids)


def test_unknown_options_are_type_errors(engine):
    with pytest.raises(TypeError):
        engine.generate("x", temprature=1.0)
    with pytest.raises(TypeError):
        hybrid.load("stories", thread=1)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": 5000},
        {"quant": "q3"},
        {"context_size": 0},
        {"context_size": 513},
    ],
)
def test_load_options_out_of_range_are_refused(options):
    with pytest.raises(hybrid.InvalidOption, match=next(iter(options))):
        hybrid.load("stories", **options)


def test_a_closed_engine_refuses_work_but_ends_what_runs():
    with hybrid.load("stories") as engine:
        generation = engine.generate("The cat", max_tokens=10, temperature=0)
        next(generation)
    with pytest.raises(hybrid.EngineClosed):
        engine.generate("The cat")
    list(generation)
    assert len(generation.tokens) == 10
    engine.close()


def test_two_engines_in_one_process(tmp_path):
    other = write_model(tmp_path, vocab_size=4096, hidden_act="silu", hidden_act_param=None)
    with hybrid.load("stories", quant="bf16") as stories, hybrid.load(other) as tiny:
        first = "".join(stories.generate("The cat", max_tokens=10, temperature=0))
        assert "".join(tiny.generate("The cat", max_tokens=10, temperature=0)) != first
        assert "".join(stories.generate("The cat", max_tokens=10, temperature=0)) == first


def test_broken_weights_are_an_error_and_not_a_text(tmp_path):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = write_model(tmp_path, vocab_size=4096)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] = np.full((200, 96), np.nan, np.float32)
    save_file(tensors, folder / "model.safetensors")
    for quant in ("bf16", "q8"):
        with (
            hybrid.load(folder, quant=quant) as engine,
            pytest.raises(hybrid.HybridError, match="finite"),
        ):
            list(engine.generate("The cat"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_can_generate_and_exit():
    """Worker threads do not exist in a child; its calls must not wait for them."""
    code = (
        "import hybrid, os, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "engine = hybrid.load('stories', threads=3)\n"
        "def text(): return ''.join(engine.generate('The cat', max_tokens=20, temperature=0))\n"
        "expected = text()\n"
        "child = os.fork()\n"
        "same = text() == expected\n"
        "if child == 0: sys.exit(0 if same else 1)\n"
        "assert same and os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
