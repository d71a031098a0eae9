"""Clients that others wrote use the server as they use the services that they are made for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Mia"]}, "fast": {"type": "boolean"}},
    "required": ["name", "fast"],
    "additionalProperties": False,
}
JUMP: Any = {"type": "function", "function": {"name": "jump", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def openai(client):
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none") as openai:
        yield openai


@pytest.fixture(scope="module")
def text(engine):
    return "".join(engine.chat(MESSAGES, max_tokens=20, seed=7))


def test_openai_chats(openai, text):
    answer = openai.chat.completions.create(model="x", messages=MESSAGES, max_tokens=20, seed=7)
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == 20
    assert [model.id for model in openai.models.list()] == ["stories"]


def test_openai_streams(openai, text):
    chunks = openai.chat.completions.create(
        model="x",
        messages=MESSAGES,
        max_tokens=20,
        seed=7,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    )
    found, usage = "", None
    for chunk in chunks:
        found += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk.usage or usage
    assert found == text
    assert usage.completion_tokens == 20


def test_openai_calls_tools(openai):
    options = {"model": "x", "tools": [JUMP], "tool_choice": "required", "max_tokens": 300}
    answer = openai.chat.completions.create(
        messages=MESSAGES, parallel_tool_calls=False, seed=1, **options
    )
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["name"] in ("Tom", "Mia")
    messages = [
        *MESSAGES,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "Done."},
    ]
    followed = openai.chat.completions.create(
        model="x", messages=messages, tools=[JUMP], max_tokens=3
    )
    assert followed.choices[0].finish_reason == "length"


def test_openai_parses_a_schema(openai):
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", fast=(bool, ...), age=(int, pydantic.Field(le=99)))
    answer = openai.chat.completions.parse(
        model="x", messages=MESSAGES, response_format=person, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, person)


def test_openai_responds(openai, text):
    answer = openai.responses.create(
        model="x", input=MESSAGES, max_output_tokens=20, extra_body={"seed": 7}
    )
    assert answer.output_text == text
    kinds, found = [], ""
    for event in openai.responses.create(
        model="x", input=MESSAGES, max_output_tokens=20, stream=True, extra_body={"seed": 7}
    ):
        kinds.append(event.type)
        found += event.delta if event.type == "response.output_text.delta" else ""
    assert found == text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"


def test_openai_gets_errors(openai):
    module = pytest.importorskip("openai")
    with pytest.raises(module.BadRequestError, match="temperature") as caught:
        openai.chat.completions.create(model="x", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(module.BadRequestError, match="the context holds 512") as caught:
        openai.completions.create(model="x", prompt="word " * 2000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(module.InternalServerError, match="embeddings"):
        openai.with_options(max_retries=0).embeddings.create(model="x", input="a")


def test_anthropics_client(client, text):
    module = pytest.importorskip("anthropic")
    with module.Anthropic(base_url=f"http://127.0.0.1:{client.port}", api_key="none") as anthropic:
        plain = {"model": "x", "messages": MESSAGES, "max_tokens": 20}
        answer = anthropic.messages.create(**plain)
        assert answer.stop_reason == "max_tokens"
        assert answer.content[0].text
        with anthropic.messages.stream(**plain) as stream:
            found = "".join(stream.text_stream)
            assert stream.get_final_message().content[0].text == found != ""
        tool = {"name": "jump", "input_schema": SCHEMA}
        with anthropic.messages.stream(
            **plain | {"max_tokens": 300}, tools=[tool], tool_choice={"type": "any"}
        ) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        assert message.content[0].input["name"] in ("Tom", "Mia")
        counted = anthropic.messages.count_tokens(model="x", messages=MESSAGES)
        assert counted.input_tokens > 5


LITELLM = """
import json, sys, litellm
litellm.suppress_debug_info = True
options = dict(model="openai/x", api_base=sys.argv[1], api_key="none", max_tokens=20, seed=7)
messages = [{"role": "user", "content": "Once upon a time"}]
whole = litellm.completion(messages=messages, **options).choices[0].message.content
parts = [c.choices[0].delta.content or "" for c in
         litellm.completion(messages=messages, stream=True, **options)]
print(json.dumps([whole, "".join(parts)]))
"""


def test_litellm(client, text):
    pytest.importorskip("litellm")
    # In a process of its own: it changes this one's event loops and warnings.
    address = f"http://127.0.0.1:{client.port}/v1"
    run = subprocess.run(
        [sys.executable, "-c", LITELLM, address], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [text, text]
