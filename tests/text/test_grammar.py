"""Answers of a given form: whatever a model prefers, its answer has the form."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import numpy as np
import pytest

import hybrid
from hybrid.errors import HybridError, InvalidOption, MissingPackage
from hybrid.text import grammar as grammar_module
from hybrid.text.grammar import Form, Grammars, closed, form_of_response, form_of_schema
from hybrid.text.tool_calls import BareJson, PythonCalls, TaggedJson, ToolFormat, XmlCalls
from hybrid.text.tool_grammar import forced_calls

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "ok": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "ok", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def grammars(engine) -> Grammars:
    return Grammars(engine.tokenizer, engine.config.eos_ids)


def random_answer(grammars: Grammars, form: Form, seed: int, most: int = 400) -> tuple[str, bool]:
    """Return a text of random tokens that the form allows, and whether it came to an end."""
    draw, tokens = np.random.default_rng(seed), list[int]()
    constraint, eos = grammars.compile(form).begin(), {*grammars._eos_ids}
    while len(tokens) < most and not constraint.is_over:
        following = constraint.forced()
        if not following:
            allowed = np.flatnonzero(constraint.allowed())
            if eos & {*allowed.tolist()}:
                break
            following = [int(draw.choice(allowed))]
        constraint.consume(following)
        tokens += following
    ended = constraint.is_over or bool(eos & {*np.flatnonzero(constraint.allowed()).tolist()})
    data = b"".join(grammars._tokenizer.token_bytes(token) for token in tokens)
    return data.decode(), ended


def check_person(value: Any) -> None:
    assert [*value] == [*PERSON["properties"]]
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 150
    assert value["ok"] in (True, False)
    assert {*value["tags"]} <= {"a", "b"}
    assert len(value["tags"]) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_of_a_schema_are_such_a_value(grammars, seed):
    text, ended = random_answer(grammars, form_of_schema(PERSON, "response_format"), seed)
    assert ended
    check_person(json.loads(text))
    assert not re.search(r"\s{18}|\n\n", text)  # spaces have a bound


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_of_an_expression_match_it(grammars, seed):
    pattern = r"([0-9]{3}-[a-f]+|媽é?)[.!]"
    text, ended = random_answer(grammars, Form("regex", pattern, "regex"), seed)
    assert not ended or re.fullmatch(pattern, text)


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_of_a_gbnf_grammar_follow_it(grammars, seed):
    source = 'root ::= item ("," item){1,2} "."\nitem ::= "x" | "[" [0-9]+ "]"'
    text, ended = random_answer(grammars, Form("gbnf", source, "grammar"), seed, most=40)
    whole = r"(x|\[[0-9]+\])(,(x|\[[0-9]+\])){1,2}\."
    assert not ended or re.fullmatch(whole, text)


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "unit": {"enum": ["C", 'F"<&']},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                    "exact": {"type": ["boolean", "null"]},
                    "from": {"$ref": "#/$defs/place"},
                    "each": {"type": "array", "items": {"enum": [1, 2.5, None]}, "maxItems": 2},
                },
                "required": ["unit", "from"],
                "$defs": {
                    "place": {
                        "type": "object",
                        "properties": {"near": {"type": "boolean"}},
                        "required": ["near"],
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def check_call(name: str, arguments: dict[str, Any], format: ToolFormat) -> None:
    if name == "now":
        return
    assert name == "weather"
    assert {"unit", "from"} <= {*arguments} <= {"unit", "days", "exact", "from", "each"}
    assert arguments["unit"] in ("C", 'F"<&')
    assert arguments["exact"] in (True, False, None) if "exact" in arguments else True
    assert arguments["from"]["near"] in (True, False)
    assert [*arguments["from"]] == ["near"]
    assert {*arguments.get("each", ())} <= {1, 2.5, None}
    if "days" in arguments:
        assert isinstance(arguments["days"], int)
        if not isinstance(format, PythonCalls):  # whose grammar knows types and enumerations
            assert 1 <= arguments["days"] <= 7


@pytest.mark.parametrize("kind", [TaggedJson, BareJson, XmlCalls, PythonCalls])
@pytest.mark.parametrize("one", [True, False])
def test_random_tokens_of_required_calls_are_calls(engine, grammars, kind, one):
    format, n_calls = kind(TOOLS), []
    source = forced_calls(format, TOOLS, engine.tokenizer.spell_marker, one=one)
    for seed in range(12):
        text, ended = random_answer(grammars, Form("lark", source, "tools"), seed)
        if not ended:
            continue  # a long array, say
        parser = hybrid.text.tool_calls.ToolCallParser(format)
        (content, calls), (rest, last) = parser.push(text), parser.finish()
        assert content + rest == ""
        calls += last
        n_calls.append(len(calls))
        for call in calls:
            check_call(call.name, json.loads(call.arguments), format)
    assert n_calls
    assert min(n_calls) == 1
    if one:
        assert max(n_calls) == 1


RECURSIVE = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/a"}, "n": {"$ref": "#/$defs/n"}},
            "required": ["x", "n"],
            "$defs": {
                "a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 8},
                "n": {"type": "integer"},
                "loop": {"$ref": "#/$defs/loop"},
            },
        },
    },
}


@pytest.mark.parametrize("kind", [TaggedJson, BareJson, XmlCalls, PythonCalls])
def test_grammars_of_calls_are_not_much_longer_than_schemas(engine, grammars, kind):
    spell = engine.tokenizer.spell_marker
    source = forced_calls(kind([RECURSIVE]), [RECURSIVE], spell, one=True)
    assert len(source) < 10 * len(json.dumps(RECURSIVE)) + 2000
    grammars.compile(Form("lark", source, "tools"))
    wide = {f"p{i}": {"type": "array", "items": {"$ref": "#/$defs/a"}} for i in range(2000)}
    parameters = {**RECURSIVE["function"]["parameters"], "properties": wide}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with contextlib.suppress(InvalidOption):
        source = forced_calls(kind([tool]), [tool], spell, one=True)
        assert len(source) < 10 * len(json.dumps(tool))


def test_a_grammar_whose_masks_take_ever_longer_ends_the_answer(engine, grammars):
    """Nothing but time bounds an ambiguous grammar, and the clock is that of this thread."""
    source = 'root ::= s\ns ::= s s s | s s | "a" | "aa" | "b"\n'
    constraint = grammars.compile(Form("gbnf", source, "grammar")).begin()
    token = engine.tokenizer.encode_continuation("a")[0]
    allowed = []

    def go_on() -> None:
        for _ in range(3000):
            allowed.append(constraint.allowed()[token])
            constraint.consume([token])

    with pytest.raises(InvalidOption, match=r"grammar: (is too complex|the grammar cannot go on)"):
        go_on()
    assert len(allowed) > 30
    assert all(allowed)


def test_tokens_without_a_choice_are_forced(grammars):
    form = form_of_schema({"const": "the little robot"}, "response_format")
    constraint = grammars.compile(form).begin()
    forced = constraint.forced()
    assert len(forced) >= 3
    constraint.consume(forced)
    while not constraint.is_over:
        constraint.consume([int(np.flatnonzero(constraint.allowed())[0])])


def test_answers_have_states_of_their_own_and_forms_are_kept(grammars):
    form = Form("regex", "ab+c", "regex")
    first, again = grammars.compile(form), grammars.compile(Form("regex", "ab+c", "regex"))
    assert first is again
    one, two = first.begin(), first.begin()
    token = int(np.flatnonzero(one.allowed())[0])
    one.consume([token])
    assert two.allowed()[token]
    with pytest.raises(HybridError, match="regex: the grammar cannot go on"):
        one.consume([grammars._tokenizer.encode_continuation("zebra")[0]])
    for n in range(40):
        grammars.compile(Form("regex", f"a{{{n + 1}}}", "regex"))
    assert grammars.compile(form) is not first
    assert len(grammars._compiled) <= 32


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form("regex", "(", "regex"), "regex: .*unclosed group"),
        (Form("regex", "a" * 20_000, "regex"), "regex: expected at most 16,384 characters"),
        (Form("gbnf", "root ::= (x", "grammar"), "grammar: "),
        (Form("gbnf", "nothing", "grammar"), "grammar: "),
        (Form("gbnf", 'root ::= "a" | missing', "grammar"), "grammar: "),
        (Form("json_schema", '{"type": "hiccup"}', "response_format"), "response_format: .*hiccup"),
        (Form("json_schema", '{"$ref": "#/a"}', "response_format"), "response_format: "),
        (Form("json_schema", '{"pattern": "("}', "response_format"), "response_format: "),
    ],
)
def test_broken_forms_are_refused(grammars, form, message):
    with pytest.raises(InvalidOption, match=message):
        grammars.compile(form)


@pytest.mark.parametrize(
    "form",
    [
        Form("regex", "(a|b)*" * 2000, "regex"),
        Form("regex", "((a{1,1000}){1,1000}){1,1000}", "regex"),
        Form("regex", "(.*a){200}", "regex"),
        Form("gbnf", 'root ::= root root | "a" | ""', "grammar"),
        Form("gbnf", 'root ::= ("a" | "b" root "c"){1000} root*', "grammar"),
        form_of_schema(
            {
                "anyOf": [
                    {"type": "object", "properties": {f"k{i}": {"type": "string"}}}
                    for i in range(300)
                ]
            },
            "response_format",
        ),
        form_of_schema(
            {
                "$ref": "#/$defs/a",
                "$defs": {
                    "a": {
                        "anyOf": [
                            {"type": "array", "items": {"$ref": "#/$defs/a"}},
                            {"type": "string"},
                        ]
                    }
                },
            },
            "response_format",
        ),
    ],
)
def test_hostile_forms_are_refused_or_go_on_quickly(grammars, form):
    """Without limits some of them would not end before the test run is stopped."""
    with contextlib.suppress(HybridError):
        random_answer(grammars, form, 1, most=30)


def test_response_formats():
    assert form_of_response({"type": "text"}) is None
    assert json.loads(form_of_response({"type": "json_object"}).source) == {"type": "object"}
    inner = {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON}}
    assert json.loads(form_of_response(inner).source) == PERSON
    assert json.loads(form_of_response({"type": "json_object", "schema": True}).source) is True
    open_schema = {"properties": {"a": {}}}
    strict = {"type": "json_schema", "json_schema": {"schema": open_schema, "strict": True}}
    assert json.loads(form_of_response(strict).source) == closed(open_schema)
    assert closed(open_schema) == {"properties": {"a": {}}, "additionalProperties": False}
    for wrong in (
        {},
        {"type": "sound"},
        {"type": "json_schema"},
        {"type": "json_object", "schema": 5},
    ):
        with pytest.raises(InvalidOption, match="response_format: expected"):
            form_of_response(wrong)
    for broken in ({"a": float("nan")}, {"a": "\ud800"}, {"a": {1, 2}}):
        with pytest.raises(InvalidOption, match="is no JSON schema"):
            form_of_schema(broken, "response_format")


def test_a_model_without_an_end_ends_with_the_form(engine):
    grammars = Grammars(engine.tokenizer, ())
    text, ended = random_answer(grammars, Form("regex", "[ab]{3}", "regex"), 1)
    assert ended
    assert re.fullmatch("[ab]{3}", text)


def test_without_the_package_it_is_named(engine, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(MissingPackage, match=r"pip install 'hybrid-inference\[grammar\]'"):
        Grammars(engine.tokenizer, ()).prepare()
    assert grammar_module.MAX_REGEX < grammar_module.MAX_SCHEMA
