"""Answers with a form: the same alone, in a session and in a batching loop, and in fewer passes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import hybrid

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Mia"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "jump", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "rest", "parameters": {"type": "object"}}}
HELLO = [{"role": "user", "content": "Hello"}]
# Templates as those of MiniCPM3 and MiniCPM5 write tools and calls, as far as it matters here.
PYTHON = (
    "{% for tool in tools or [] %}{{ tool | tojson }}<|tool_call_start|>{% endfor %}"
    "{% for m in messages %}<用户>{{ m.content }}<AI>{% endfor %}"
)
XML = PYTHON.replace(
    "<|tool_call_start|>", '<function name="f"><param name="x">1</param></function>'
)
TAGGED = PYTHON.replace("<|tool_call_start|>", "<tool_call></tool_call>")
LLAMA = PYTHON.replace("<|tool_call_start|>", "<|python_tag|>ipython")
SILENT = "{% for m in messages %}<用户>{{ m.content }}<AI>{% endfor %}"


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=2, chat_template="minicpm") as engine:
        yield engine


def outcome(generation: Any) -> tuple[Any, ...]:
    text, stats = "".join(generation), generation.stats
    assert text == generation.text
    counts = (stats.generated_tokens, stats.forced_tokens, stats.decode_steps)
    return (text, [*generation.tokens], generation.logprobs, generation.finish_reason, counts)


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": FORMAT},
        {"response_format": {"type": "json_object", "schema": {"const": {"a": [1, "the end"]}}}},
        {"regex": "[ab]{2} the little robot [0-9]"},
        {"grammar": 'root ::= "one" | "two" root'},
        {"regex": "a{2,}", "max_tokens": 5},
        {"regex": "the little robot went home", "max_tokens": 2},
        {"response_format": FORMAT, "stop": ["age"]},
        {"response_format": FORMAT, "logprobs": 2, "repeat_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_loop_a_session_and_a_generation_give_the_same(engine, options, temperature):
    options = {"max_tokens": 60, "seed": 3, "temperature": temperature, **options}
    alone = outcome(engine.generate("Once upon", raw=True, **options))
    with engine.open_session() as session, hybrid.BatchLoop(engine) as loop:
        again = [engine.generate("Once upon", raw=True, session=session, **options) for _ in "12"]
        assert [outcome(generation) for generation in again[1:]] == [alone]
        batched = [loop.submit("Once upon", raw=True, **options) for _ in range(6)]
        assert [outcome(generation) for generation in batched] == [alone] * 6
    text, _, _, reason, (n, n_forced, n_steps) = alone
    if reason == "stop" and "stop" not in options:
        if "response_format" in options:
            json.loads(text)
        elif "regex" in options:
            assert re.fullmatch(options["regex"], text)
        assert n_steps <= n - n_forced + 1
    if options.get("regex") == "[ab]{2} the little robot [0-9]":
        assert n_forced >= 3


def test_a_form_changes_nothing_for_others(engine):
    options = {"max_tokens": 30, "seed": 1}
    plain = "".join(engine.generate("Tom saw", raw=True, **options))
    with hybrid.BatchLoop(engine) as loop:
        formed = [loop.submit("Tom", raw=True, response_format=FORMAT) for _ in range(3)]
        found = loop.submit("Tom saw", raw=True, **options)
        broken = loop.submit("Tom", raw=True, regex="[ab]+", logit_bias={5: 1})
        assert "".join(found) == plain
        for generation in formed:
            json.loads("".join(generation))
        broken.cancel()


def test_a_full_context_ends_a_form_or_is_shifted():
    with hybrid.load("stories", threads=1, context_size=64) as engine:
        ids = list(range(20, 80))
        form = {"regex": "(the little robot ){20}", "max_tokens": 100}
        full = engine.generate(ids, **form)
        "".join(full)
        assert full.context_is_full
        assert full.finish_reason == "length"
        assert len(full.tokens) == 5  # the last one is not appended
        shifted = engine.generate(ids, context_shift=True, n_keep=2, **form)
        assert "".join(shifted) == "the little robot " * 20
        with hybrid.BatchLoop(engine) as loop:
            batched = loop.submit(ids, context_shift=True, n_keep=2, **form)
            assert "".join(batched) == shifted.text
            assert batched.stats.n_shifts == shifted.stats.n_shifts > 0


def test_a_stop_string_within_forced_tokens_ends_the_answer_there(engine):
    options = {"regex": "abc STOP and then it goes on", "stop": "STOP", "logprobs": 0}
    generation = engine.generate("Once", raw=True, max_tokens=50, **options)
    assert "".join(generation) == "abc "
    said = engine.tokenizer.continue_text(generation.prompt, generation.tokens)
    assert said.startswith("abc S")
    assert len(said) <= len("abc STOP") + 3
    assert len(generation.logprobs) == len(generation.tokens)
    with hybrid.BatchLoop(engine) as loop:
        batched = loop.submit("Once", raw=True, max_tokens=50, **options)
        assert "".join(batched) == "abc "
        assert batched.tokens == generation.tokens


def test_speculation_and_forms_go_together(engine):
    options = {"response_format": FORMAT, "max_tokens": 60, "seed": 2}
    plain = outcome(engine.generate("Once", raw=True, **options))
    assert outcome(engine.generate("Once", raw=True, speculate="ngram", **options)) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regex: .*unclosed"),
        ({"grammar": "x"}, "grammar: "),
        ({"grammar": 5}, "grammar: expected a string"),
        ({"response_format": {"type": "x"}}, "response_format: expected the type"),
        ({"response_format": "json"}, "response_format: expected a mapping"),
        ({"response_format": FORMAT, "regex": "a"}, "response_format and regex exclude each other"),
        ({"tool_choice": "maybe"}, "tool_choice: expected"),
        ({"parallel_tool_calls": 2}, "parallel_tool_calls: expected"),
    ],
)
def test_wrong_options_are_refused(engine, options, message):
    with pytest.raises(hybrid.InvalidOption, match=message):
        engine.generate("Once", **options)


@pytest.fixture(scope="module", params=["python", "xml", "tagged", "llama", "silent"])
def with_template(request, tmp_path_factory):
    source = {"python": PYTHON, "xml": XML, "tagged": TAGGED, "llama": LLAMA, "silent": SILENT}
    file = tmp_path_factory.mktemp("template") / "template.jinja"
    file.write_text(source[request.param])
    with hybrid.load("stories", threads=1, chat_template=file) as engine:
        yield engine


def test_a_required_call_is_one_for_a_model_that_knows_no_tools(with_template):
    for seed in range(3):
        options = {"max_tokens": 200, "seed": seed, "temperature": 1.0}
        generation = with_template.chat(
            HELLO, tools=[TOOL, OTHER], tool_choice={"function": {"name": "jump"}}, **options
        )
        assert generation.tool_parser() is not None
        text = "".join(generation)
        assert generation.finish_reason == "stop", text
        (call,) = generation.tool_calls
        assert call.name == "jump"
        arguments = json.loads(call.arguments)
        assert arguments["name"] in ("Tom", "Mia")
        assert isinstance(arguments["age"], int)
        with hybrid.BatchLoop(with_template) as loop:
            batched = loop.submit_chat(
                HELLO, tools=[TOOL, OTHER], tool_choice={"function": {"name": "jump"}}, **options
            )
            assert "".join(batched) == text
            assert batched.tool_calls == (call,)


def test_the_prompt_shows_the_tools(with_template):
    shown = with_template.chat(HELLO, tools=[TOOL], max_tokens=1)
    assert '"jump"' in with_template.tokenizer.decode(shown.prompt)
    hidden = with_template.chat(HELLO, tools=[TOOL], tool_choice="none", max_tokens=1)
    assert hidden.prompt == with_template.chat(HELLO, max_tokens=1).prompt
    assert hidden.tool_parser() is None
    assert hidden.tool_calls == ()


def test_wrong_choices_of_tools_are_refused(engine):
    for options, message in (
        ({"tool_choice": "required"}, "a call is required, but there are no tools"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"name": "fly"}}, "there is no tool 'fly'"),
        ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "excludes regex"),
    ):
        with pytest.raises(hybrid.InvalidOption, match=message):
            engine.chat(HELLO, **options)


def test_a_session_goes_on_after_a_call(engine):
    with engine.open_session() as session:
        options = {"tools": [TOOL], "max_tokens": 200, "seed": 1}
        first = engine.chat(HELLO, session=session, tool_choice="required", **options)
        said = "".join(first)
        answer = {"role": "assistant", "content": said}
        messages = [*HELLO, answer, {"role": "user", "content": "Again"}]
        second = engine.chat(messages, session=session, tools=[TOOL], max_tokens=3)
        "".join(second)
        assert second.stats.cached_tokens >= len(first.sequence) - 1


def test_markers_that_are_special_tokens_are_part_of_the_text(tmp_path):
    """MiniCPM5's are, and other texts leave special tokens out."""
    folder = tmp_path / "model"
    shutil.copytree(Path(hybrid.__file__).parent / "models" / "stories", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = {token["id"] for token in tokenizer["added_tokens"]}
    pieces = [p for p, id in tokenizer["model"]["vocab"].items() if id not in known][-4:]
    renamed = dict(zip(pieces, ("<function", "</function>", "<param", "</param>"), strict=True))
    vocab = {renamed.get(p, p): id for p, id in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] = vocab
    tokenizer["model"]["merges"] = [
        merge
        for merge in tokenizer["model"]["merges"]
        if "".join(merge if isinstance(merge, list) else merge.split(" ")) in vocab
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": vocab[text], "content": text, "special": True, **flags} for text in renamed.values()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(XML)
    with hybrid.load(folder, threads=1) as engine:
        generation = engine.chat(
            HELLO, tools=[TOOL], tool_choice="required", max_tokens=200, seed=1
        )
        text = "".join(generation)
        assert text.startswith('<function name="jump"><param name="name">')
        assert {vocab["<function"], vocab["</param>"]} <= {*generation.tokens}
        assert generation.tool_calls[0].name == "jump"
        marker = vocab["<function"]
        plain = engine.generate("Once", raw=True, max_tokens=3, logit_bias={marker: 100})
        assert "<function" not in "".join(plain)
        assert marker in plain.tokens
