"""The library loads, generates, stops and closes as documented, and refuses bad arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
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


def test_a_seed_repeats_a_run_and_can_be_read(engine):
    first = engine.generate("The cat", max_tokens=30)
    text = "".join(first)
    again = engine.generate("The cat", max_tokens=30, seed=first.seed)
    assert "".join(again) == text
    assert "".join(engine.generate("The cat", max_tokens=30, seed=first.seed + 1)) != text


def test_greedy_needs_no_seed(engine):
    texts = {"".join(engine.generate("The cat", max_tokens=20, temperature=0)) for _ in range(2)}
    assert len(texts) == 1


def test_a_prompt_of_token_ids_is_used_unchanged(engine):
    ids = engine.tokenizer.encode("The cat")
    assert list(engine.generate(ids, max_tokens=9, temperature=0)) == list(
        engine.generate("The cat", max_tokens=9, temperature=0)
    )


def test_the_finish_reason_says_why_a_text_ended(engine):
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
        # The last token is generated, but not run, so it takes no place in the context.
        assert len(generation.prompt) + len(generation.tokens) == 12 + 1


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers():
    with hybrid.load("stories", context_size=8) as engine:
        exact = engine.tokenizer.encode("a a a a a a a")
        assert len(exact) == 8
        assert "".join(engine.generate(exact, max_tokens=5)) is not None
        with pytest.raises(hybrid.ContextOverflow, match=r"9 tokens.* holds 8.*up to 512"):
            engine.generate("a a a a a a a a")


def test_another_thread_can_cancel(engine):
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
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -2}, "seed"),
        ({"max_tokens": "all"}, "max_tokens"),
    ],
)
def test_options_out_of_range_are_refused(engine, options, message):
    with pytest.raises(hybrid.InvalidOption, match=message):
        engine.generate("x", **options)


@pytest.mark.parametrize("ids", [[-1], [4096], [1.5], ["a"], []])
def test_token_ids_out_of_range_are_refused(engine, ids):
    with pytest.raises(hybrid.InvalidOption, match="prompt"):
        engine.generate(ids)


@pytest.mark.parametrize("stop", [3, [3], [""]])
def test_stop_strings_of_another_type_are_refused(engine, stop):
    with pytest.raises(hybrid.InvalidOption, match="stop"):
        engine.generate("x", stop=stop)


@pytest.mark.parametrize("model", [None, 3])
def test_a_model_of_another_type_is_refused(model):
    with pytest.raises(hybrid.InvalidOption, match="model"):
        hybrid.load(model)


@pytest.mark.parametrize("messages", [None, 3, "hello", [3]])
def test_messages_of_another_type_are_refused(engine, messages):
    with pytest.raises(hybrid.InvalidOption, match="messages"):
        engine.chat(messages)


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


def test_a_closed_engine_refuses_work_but_finishes_what_runs():
    with hybrid.load("stories") as engine:
        generation = engine.generate("The cat", max_tokens=10, temperature=0)
        next(generation)
    with pytest.raises(hybrid.EngineClosed):
        engine.generate("The cat")
    list(generation)
    assert len(generation.tokens) == 10
    engine.close()


def test_two_engines_work_in_one_process(tmp_path):
    other = write_model(tmp_path, vocab_size=4096, hidden_act="silu", hidden_act_param=None)
    with hybrid.load("stories", quant="bf16") as stories, hybrid.load(other) as tiny:
        first = "".join(stories.generate("The cat", max_tokens=10, temperature=0))
        assert "".join(tiny.generate("The cat", max_tokens=10, temperature=0)) != first
        assert "".join(stories.generate("The cat", max_tokens=10, temperature=0)) == first


@pytest.mark.parametrize("quant", ["bf16", "q8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_weights_are_an_error_that_names_them(tmp_path, quant, bad):
    folder = write_model(tmp_path, vocab_size=4096)
    change_weight(folder, bad)
    with pytest.raises(hybrid.InvalidCheckpoint, match=r"gate of layer 1 holds .* not finite"):
        hybrid.load(folder, quant=quant)


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize(
    ("name", "role"), [("model.norm", "norm"), ("model.embed_tokens", "embedding")]
)
def test_one_weight_that_is_not_finite_is_refused(tmp_path, quant, name, role):
    folder = write_model(tmp_path, vocab_size=4096)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"].flat[7] = -np.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(hybrid.InvalidCheckpoint, match=rf"{role} holds .* not finite"):
        hybrid.load(folder, quant=quant)


@pytest.mark.parametrize("quant", ["bf16", "f16", "q8", "q4"])
def test_weights_beyond_the_range_of_fp16_scales_are_loaded(tmp_path, quant):
    folder = write_model(tmp_path, vocab_size=4096)
    change_weight(folder, 1e8)
    with hybrid.load(folder, quant=quant) as engine:
        assert list(engine.generate("a", max_tokens=2)) is not None


def change_weight(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] = np.full((200, 96), value, np.float32)
    save_file(tensors, folder / "model.safetensors")


FORKED = """
import hybrid, os, sys, time, warnings
warnings.simplefilter("ignore")
def text(engine): return "".join(engine.generate("The cat", max_tokens=20, temperature=0))
engine = hybrid.load("stories", threads=3)
expected = text(engine)
time.sleep(0.3)  # the workers park
child = os.fork()
if child == 0:
    try:
        text(engine)
    except hybrid.EngineClosed as error:
        assert "forked" in str(error)
    else:
        os._exit(1)
    engine.close()
    with hybrid.load("stories", threads=3) as own:
        sys.exit(0 if text(own) == expected else 2)
assert text(engine) == expected
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_to_load_for_itself_and_can_exit():
    """A forked child has no worker threads, so nothing in it may wait for them."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


@pytest.mark.slow
def test_the_process_may_end_while_a_thread_generates():
    code = (
        "import hybrid, threading, time\n"
        "engine = hybrid.load('stories', threads=2)\n"
        "def work():\n"
        "    while True: list(engine.generate('Once', temperature=2.0))\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.3)\n"
    )
    for _ in range(4):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_generation_frees_its_memory(engine):
    """It does so at its end, if closed, and if dropped half-way, by reference counts alone."""
    for finish in (list, lambda generation: generation.close(), next):
        generation = engine.generate("Once", max_tokens=3)
        session = weakref.ref(generation._session._native)
        finish(generation)
        is_dropped = finish is next
        if is_dropped:
            del generation
        assert session() is None
        if not is_dropped:
            assert list(generation) == []


def test_cancel_ends_a_long_prompt_early():
    with hybrid.load("stories") as engine:
        generation = engine.generate([5] * 500)
        generation.cancel()
        assert list(generation) == []
        assert generation.finish_reason == "cancelled"
        assert generation.stats.active_fraction is None  # no token was run


@pytest.mark.parametrize("prompt", [b"hello", None, 5, [True, False], object()])
def test_prompts_of_another_type_are_refused(engine, prompt):
    with pytest.raises(hybrid.InvalidOption, match="prompt"):
        engine.generate(prompt)


def test_numpy_numbers_are_numbers(engine):
    ids = np.array(engine.tokenizer.encode("The cat"))
    options = {"max_tokens": np.int64(5), "temperature": np.float32(0.5), "seed": np.int64(1)}
    assert "".join(engine.generate(ids, **options))


def test_an_unknown_isa_cap_is_an_error_of_load_and_not_of_import():
    code = "import hybrid\ntry: hybrid.load()\nexcept hybrid.UnsupportedIsa as e: print(e)"
    environment = os.environ | {"HYBRID_ISA": "avx9000"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("HYBRID_ISA='avx9000' is no instruction set")


def test_text_ends_before_a_stop_string(engine):
    options = {"max_tokens": 60, "seed": 1}
    whole = "".join(engine.generate("Once upon a time", **options))
    words = whole.split()
    for stop in (words[5], whole[20:33], whole[-4:]):
        generation = engine.generate("Once upon a time", stop=["no such text", stop], **options)
        pieces = list(generation)
        assert "".join(pieces) == generation.text == whole[: whole.index(stop)]
        assert generation.finish_reason == "stop"
    generation = engine.generate("Once upon a time", stop=whole + "x", **options)
    assert "".join(generation) == whole  # held back until the end, then returned
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("stop", ["", [""], [5], ["a", None]])
def test_stop_strings_that_make_no_sense_are_refused(engine, stop):
    if stop == "":
        stop = [stop]
    with pytest.raises(hybrid.InvalidOption, match="stop"):
        engine.generate("x", stop=stop)


def test_a_bias_decides_which_tokens_come(engine):
    options = {"max_tokens": 5, "temperature": 0, "raw": True}
    forced = engine.generate("a", logit_bias={70: 100, 71: 99.0}, **options)
    list(forced)
    assert forced.tokens == [70] * 5
    penalised = engine.generate("a", logit_bias={70: 100, 71: 99.0}, presence_penalty=2, **options)
    list(penalised)
    assert penalised.tokens[:3] == [70, 71, 70]
    n = engine.config.vocab_size
    with pytest.raises(
        hybrid.InvalidOption, match=f"logit_bias: expected token ids below {n}, found {n}"
    ):
        engine.generate("a", logit_bias={n: 1})


def test_a_repeat_penalty_makes_text_less_repetitive(engine):
    def share_of_new_words(penalty: float) -> float:
        options = {"max_tokens": 150, "temperature": 0, "repeat_penalty": penalty}
        words = "".join(engine.generate("The tree", **options)).split()
        return len(set(words)) / len(words)

    assert share_of_new_words(1.5) > share_of_new_words(1.0)
