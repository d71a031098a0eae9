"""Tools and forms through OpenAI's API: calls are objects, forms hold, bad ones are refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
from http_client import serving

from hybrid.server import form_check
from hybrid.server.form_check import FormChecker
from hybrid.text.grammar import Form, form_of_schema

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Mia"]}, "fast": {"type": "boolean"}},
    "required": ["name", "fast"],
}


def tool(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


def check(call: dict[str, object]) -> None:
    assert call["type"] == "function"
    assert str(call["id"]).startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["name"] in ("Tom", "Mia")
    assert arguments["fast"] in (True, False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "jump"}}])
def test_a_required_call(client, stream, choice):
    body = {"messages": MESSAGES, "tools": [tool("jump")], "tool_choice": choice, "seed": 1}
    body |= {"parallel_tool_calls": False, "max_tokens": 300, "stream": stream}
    reply = client.post(CHAT, body)
    assert reply.status == 200
    if stream:
        choices = [chunk["choices"][0] for chunk in reply.events]
        calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
        assert "".join(c["delta"].get("content") or "" for c in choices) == ""
        assert [call.pop("index") for call in calls] == [0]
        reason = choices[-1]["finish_reason"]
    else:
        (found,) = reply.json["choices"]
        assert found["message"]["content"] is None
        calls, reason = found["message"]["tool_calls"], found["finish_reason"]
    (call,) = calls
    assert call["function"]["name"] == "jump"
    check(call)
    assert reason == "tool_calls"


def test_several_calls_have_an_index_each(client):
    """The model would hardly write several: a form makes it, under tool_choice auto."""
    text = '<tool_call>\n{"name": "jump", "arguments": {"name": "Tom", "fast": true}}\n</tool_call>'
    grammar = f"root ::= {json.dumps('Well. ' + text)} {json.dumps(chr(10) + text)}"
    body = {"messages": MESSAGES, "tools": [tool("jump")], "grammar": grammar, "max_tokens": 300}
    chunks = client.post(CHAT, body | {"stream": True}).events
    choices = [chunk["choices"][0] for chunk in chunks]
    calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    for call in calls:
        check(call)
    assert "".join(c["delta"].get("content") or "" for c in choices) == "Well. "
    message = client.post(CHAT, body).json["choices"][0]["message"]
    assert message["content"] == "Well. "
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["jump", "jump"]
    without = client.post(CHAT, body | {"tool_choice": "none"}).json["choices"][0]["message"]
    assert "tool_calls" not in without
    assert without["content"].count("<tool_call>") == 2


def test_results_of_calls_reach_the_prompt(client):
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "jump", "arguments": '{"name": "Tom"}'}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "He jumped far."},
    ]
    prompt = client.post("/apply-template", {"messages": messages, "tools": [tool("jump")]}).json
    assert '"arguments": {"name": "Tom"}' in prompt["prompt"]
    assert "He jumped far." in prompt["prompt"]
    reply = client.post(CHAT, {"messages": messages, "tools": [tool("jump")], "max_tokens": 2})
    assert reply.status == 200


@pytest.mark.parametrize(
    "form",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": SCHEMA, "strict": True},
            }
        },
        {
            "response_format": {
                "type": "json_object",
                "schema": {**SCHEMA, "additionalProperties": False},
            }
        },
        {"json_schema": {**SCHEMA, "additionalProperties": False}},
    ],
)
def test_schemas(client, form):
    reply = client.post(CHAT, {"messages": MESSAGES, "max_tokens": 200, "seed": 1, **form})
    value = json.loads(reply.json["choices"][0]["message"]["content"])
    assert set(value) == {"name", "fast"}
    completion = client.post("/v1/completions", {"prompt": "Once", "max_tokens": 200, **form})
    assert set(json.loads(completion.json["choices"][0]["text"])) == {"name", "fast"}


def test_grammars_and_expressions(client):
    body = {"messages": MESSAGES, "max_tokens": 20}
    reply = client.post(CHAT, body | {"grammar": 'root ::= "a"{5,5}'})
    assert reply.json["choices"][0]["message"]["content"] == "aaaaa"
    reply = client.post(CHAT, body | {"regex": "[0-9]{4}"})
    assert reply.json["choices"][0]["message"]["content"].isdecimal()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": 5}, "tools: expected a list"),
        ({"tools": [5]}, "tools[0]: expected an object of type function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]: expected an object of type function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1]: a occurs twice"),
        ({"tools": [tool("a")] * 129}, "tools: expected at most 128"),
        ({"tools": [tool("a")], "tool_choice": "perhaps"}, "tool_choice: expected"),
        ({"tools": [tool("a")], "tool_choice": {"function": {"name": "b"}}}, "no tool 'b'"),
        ({"tool_choice": "required"}, "tool_choice: a call is required"),
        ({"response_format": {"type": "sound"}}, "response_format: expected the type"),
        ({"response_format": {"type": "json_object", "schema": 123}}, "response_format: expected"),
        ({"response_format": {"type": "json_object", "schema": {"type": 1}}}, "response_format: "),
        ({"response_format": 5}, "response_format: expected a mapping"),
        ({"grammar": "root ::= this is (not"}, "grammar: "),
        ({"grammar": 5}, "grammar: expected a string"),
        ({"regex": "("}, "regex: "),
        ({"regex": "a", "grammar": "b"}, "exclude each other"),
        ({"regex": "a" * 20_000}, "regex: expected at most 16,384"),
    ],
)
def test_bad_tools_and_forms_are_refused(client, change, message):
    reply = client.post(CHAT, {"messages": MESSAGES, **change})
    assert reply.status == 400
    assert message in reply.error["message"]


def hostile(n: int) -> dict[str, object]:
    return {"type": "json_object", "schema": {"allOf": [{"pattern": f"a{i}.*b"} for i in range(n)]}}


def test_a_schema_that_takes_for_ever_to_compile_stops_nobody(engine, monkeypatch):
    monkeypatch.setattr(form_check, "LIMIT_S", 0.5)
    with serving(engine) as client:
        with client.begin(CHAT, {"messages": MESSAGES, "response_format": hostile(60)}) as raw:
            for _ in range(20):
                body = {"messages": MESSAGES, "max_tokens": 3}
                assert client.post(CHAT, body).status == 200
            reply = b""
            while not reply.endswith(b"}}"):
                reply += raw.recv(2000)
            assert reply.startswith(b"HTTP/1.1 400 ")
            assert b"takes more than 0.5 s to compile" in reply
        reply = client.post(CHAT, {"messages": MESSAGES, "regex": "[ab]{3}", "max_tokens": 9})
        assert reply.status == 200


def test_the_checker_lives_on():
    check = FormChecker()
    try:
        check(Form("regex", "a+", "regex"))
        first = check._process
        check(Form("regex", "b+", "regex"))
        assert check._process is first
        with pytest.raises(ValueError, match=r"regex: .*unclosed"):
            check(Form("regex", "(", "regex"))
        assert check._process is first
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        check(Form("regex", "c+", "regex"))
        assert check._process is not first
        check(Form("regex", "a+", "regex"))
        check(form_of_schema(SCHEMA, "response_format"))
    finally:
        check.close()
    assert check._process is None


def test_the_checkers_patience_ends(monkeypatch):
    monkeypatch.setattr(form_check, "PATIENCE_S", 0.05)
    check = FormChecker()
    with check._lock, pytest.raises(Exception, match="other grammars"):
        check(Form("regex", "a", "regex"))
