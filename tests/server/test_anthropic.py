"""POST /v1/messages: Anthropic's form of what chat completions do."""

from __future__ import annotations

import json

import pytest
from http_client import serving

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Mia"]}},
    "required": ["name"],
}
JUMP = {"name": "jump", "description": "Jump", "input_schema": SCHEMA}


def test_a_message_is_the_librarys_answer(engine, client):
    body = {"model": "any", "messages": HELLO, "max_tokens": 12, "temperature": 0, "top_k": 5}
    reply = client.post(PATH, body)
    assert reply.status == 200
    generation = engine.chat(HELLO, max_tokens=12, temperature=0)
    text = "".join(generation)
    assert reply.json | {"id": "", "usage": None} == {
        "id": "",
        "type": "message",
        "role": "assistant",
        "model": "stories",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": None,
    }
    assert reply.json["id"].startswith("msg_")
    usage = reply.json["usage"]
    n_prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert (n_prompt, usage["output_tokens"]) == (len(generation.prompt), 12)


def test_a_stream_has_anthropics_events(engine, client):
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 0, "stream": True}
    events = client.post(PATH, body).named_events
    start, block, *deltas, stop, delta, end = events
    assert start["type"] == "message_start"
    assert start["message"]["content"] == []
    assert start["message"]["usage"]["input_tokens"] > 0
    assert block == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert {event["type"] for event in deltas} == {"content_block_delta"}
    text = "".join(event["delta"]["text"] for event in deltas)
    assert text == "".join(engine.chat(HELLO, max_tokens=12, temperature=0))
    assert stop == {"type": "content_block_stop", "index": 0}
    assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 12
    assert end == {"type": "message_stop"}


def test_a_stop_sequence_is_named(engine, client):
    text = "".join(engine.chat(HELLO, max_tokens=30, temperature=0))
    stop = text[8:12]
    body = {"messages": HELLO, "max_tokens": 30, "temperature": 0}
    reply = client.post(PATH, body | {"stop_sequences": ["zzz", stop]}).json
    assert reply["stop_reason"] == "stop_sequence"
    assert reply["stop_sequence"] == stop
    assert reply["content"][0]["text"] == text[: text.index(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "jump"}])
def test_tools_are_used(client, choice):
    choice = {**choice, "disable_parallel_tool_use": True}
    body = {"messages": HELLO, "tools": [JUMP], "tool_choice": choice, "max_tokens": 300}
    reply = client.post(PATH, body).json
    (block,) = reply["content"]
    assert (block["type"], block["name"]) == ("tool_use", "jump")
    assert block["id"].startswith("toolu_")
    assert block["input"]["name"] in ("Tom", "Mia")
    assert reply["stop_reason"] == "tool_use"
    _, start, delta, stop, end, _ = client.post(PATH, body | {"stream": True}).named_events
    assert start["content_block"]["type"] == "tool_use"
    assert start["content_block"]["input"] == {}
    assert json.loads(delta["delta"]["partial_json"])["name"] in ("Tom", "Mia")
    assert stop["index"] == start["index"] == 0
    assert end["delta"]["stop_reason"] == "tool_use"


def test_tokens_are_counted_as_they_are_used(client):
    body = {"messages": HELLO, "system": "Be kind.", "tools": [JUMP]}
    n = client.post(f"{PATH}/count_tokens", body).json
    assert set(n) == {"input_tokens"}
    usage = client.post(PATH, body | {"max_tokens": 1}).json["usage"]
    assert n["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    more = client.post(
        f"{PATH}/count_tokens", body | {"system": [{"type": "text", "text": "x " * 20}]}
    )
    assert more.json["input_tokens"] > n["input_tokens"]


def test_blocks_become_messages():
    from hybrid.server.anthropic.messages import read_messages
    from hybrid.server.fields import Fields

    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What"}, {"type": "text", "text": " is"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Here:"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "4"}],
                },
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
            ],
        },
    ]
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert read_messages(Fields({"messages": messages, "system": "Be kind."})) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [call],
            "reasoning_content": "hm",
        },
        {"role": "user", "content": "Here:"},
        {"role": "tool", "tool_call_id": "t1", "content": "4"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
    ]


def image(**more: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image", "source": {}, **more}]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens: it is missing"),
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1"),
        ({"messages": None}, "messages: it is missing"),
        ({"messages": []}, "messages: expected at least one"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "the role user or assistant"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: expected"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": image()}, "image input is not supported"),
        ({"system": 5}, "system: expected"),
        ({"tools": [{"type": "bash_20250124"}]}, "tools[0]: expected a tool with a name"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].function.name"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type: expected auto, any, tool or none"),
        ({"tool_choice": {"type": "any"}}, "a call is required, but there are no tools"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, "the context holds 512"),
    ],
)
def test_bad_requests_have_anthropics_errors(client, change, message):
    reply = client.post(PATH, {"messages": HELLO, "max_tokens": 5, **change})
    assert reply.status == 400
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert message in reply.json["error"]["message"]


def test_other_errors_too(engine):
    with serving(engine, api_keys=("k",)) as client:
        reply = client.post(PATH, {})
        assert (reply.status, reply.json["error"]["type"]) == (401, "authentication_error")
        reply = client.post(PATH, b"{", x_api_key="k")
        assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")
        client.service.drain(0)
        reply = client.post(PATH, {"messages": HELLO, "max_tokens": 1}, x_api_key="k")
        assert (reply.status, reply.json["error"]["type"]) == (503, "overloaded_error")


def test_an_error_after_the_first_byte_is_an_event(engine, monkeypatch):
    import hybrid
    from hybrid.engine.batch.stream import Stream

    def fails(stream: Stream) -> None:
        stream.error = hybrid.NumericOverflow("keys overflow")

    monkeypatch.setattr(Stream, "choose", fails)
    with serving(engine) as client:
        body = {"messages": HELLO, "max_tokens": 5, "stream": True}
        start, error = client.post(PATH, body).named_events
        assert start["type"] == "message_start"
        assert error["error"] == {"type": "api_error", "message": "keys overflow"}
