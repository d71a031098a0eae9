"""POST /v1/responses: the newer form of what chat completions do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_client import serving

PATH = "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Mia"]}},
    "required": ["name"],
    "additionalProperties": False,
}
JUMP = {"type": "function", "name": "jump", "parameters": SCHEMA, "strict": True}


def test_a_text_is_answered(engine, client):
    body = {"model": "any", "input": "Once upon a time", "max_output_tokens": 12, "temperature": 0}
    reply = client.post(PATH, body)
    assert reply.status == 200
    messages = [{"role": "user", "content": "Once upon a time"}]
    generation = engine.chat(messages, max_tokens=12, temperature=0)
    text, found = "".join(generation), reply.json
    assert found["object"] == "response"
    assert found["id"].startswith("resp_")
    assert (found["status"], found["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    (message,) = found["output"]
    assert message["id"].startswith("msg_")
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    assert message["content"] == [part]
    assert found["usage"]["output_tokens"] == 12
    assert found["usage"]["input_tokens"] == len(generation.prompt)


def test_a_stream_has_the_events_of_a_message(engine, client):
    body = {"input": [{"role": "user", "content": "Once"}], "max_output_tokens": 10, "seed": 1}
    events = client.post(PATH, body | {"stream": True}).named_events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    n = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * n,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    text = "".join(event.get("delta", "") for event in events)
    assert text == "".join(
        engine.chat([{"role": "user", "content": "Once"}], max_tokens=10, seed=1)
    )
    response = events[-1]["response"]
    assert response["output"][0]["content"][0]["text"] == text
    assert events[-4]["text"] == text
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {response["output"][0]["id"]}
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["id"] == response["id"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "jump"}])
def test_functions_are_called(client, choice):
    body = {"input": "Hi", "tools": [JUMP], "tool_choice": choice, "max_output_tokens": 300}
    body["parallel_tool_calls"] = False
    found = client.post(PATH, body).json
    (call,) = found["output"]
    assert (call["type"], call["name"], found["status"]) == ("function_call", "jump", "completed")
    assert json.loads(call["arguments"])["name"] in ("Tom", "Mia")
    events = client.post(PATH, body | {"stream": True}).named_events
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert events[3]["delta"] == events[5]["item"]["arguments"]
    followed = [
        {"role": "user", "content": "Hi"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "Done."},
    ]
    reply = client.post(PATH, {"input": followed, "tools": [JUMP], "max_output_tokens": 3})
    assert reply.status == 200


def test_the_format_of_the_text(client):
    form = {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}
    body = {"input": "Hi", "text": {"format": form}, "max_output_tokens": 150}
    text = client.post(PATH, body).json["output"][0]["content"][0]["text"]
    assert json.loads(text)["name"] in ("Tom", "Mia")
    plain = client.post(PATH, body | {"text": {"format": {"type": "text"}}})
    assert plain.status == 200


def test_items_become_messages():
    from hybrid.server.fields import Fields
    from hybrid.server.openai.responses import read_input

    def call(n: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{n}", "name": "f", "arguments": "{}"}

    def called(n: int) -> dict[str, Any]:
        function = {"name": "f", "arguments": "{}"}
        return {"id": f"c{n}", "type": "function", "function": function}

    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]},
        call(1),
        call(2),
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
    ]
    assert read_input(Fields({"input": items, "instructions": "Be brief."})) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [called(1), called(2)]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": None}, "input: it is missing"),
        ({"input": []}, "messages: expected at least one"),
        ({"input": 5}, "input: expected a list"),
        ({"input": [5]}, "input[0]: expected an object"),
        ({"input": [{"type": "image"}]}, "input[0].type: expected message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "parts of text"),
        ({"max_output_tokens": 0}, "max_output_tokens: expected"),
        ({"previous_response_id": "resp_1"}, "nothing is stored here"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]: expected a tool of type function"),
        ({"text": {"format": {"type": "x"}}}, "response_format: expected the type"),
        ({"tool_choice": "required"}, "there are no tools"),
    ],
)
def test_bad_requests_are_refused(client, change, message):
    reply = client.post(PATH, {"input": "Hi", "max_output_tokens": 3, **change})
    assert reply.status == 400
    assert message in reply.error["message"]


def test_an_error_after_the_first_byte_is_an_event(engine, monkeypatch):
    import hybrid
    from hybrid.engine.batch.stream import Stream

    def fails(stream: Stream) -> None:
        stream.error = hybrid.NumericOverflow("keys overflow")

    monkeypatch.setattr(Stream, "choose", fails)
    with serving(engine) as client:
        *_, error = client.post(PATH, {"input": "Hi", "stream": True}).named_events
        assert (error["type"], error["message"]) == ("error", "keys overflow")
