"""POST /v1/chat/completions gives what the library gives, in the form that clients expect."""

from __future__ import annotations

from typing import Any

import pytest

MESSAGES = [{"role": "user", "content": "Once upon a time there was a big red ball"}]
PATH = "/v1/chat/completions"


def said(engine: Any, messages: Any = MESSAGES, **options: Any) -> Any:
    generation = engine.chat(messages, **options)
    assert "".join(generation) == generation.text
    return generation


def test_an_answer_is_the_librarys(engine, client):
    options = {"max_tokens": 20, "seed": 5, "temperature": 0.7}
    reply = client.post(PATH, {"model": "anything", "messages": MESSAGES, **options})
    assert reply.status == 200
    expected, body = said(engine, **options), reply.json
    assert body["object"] == "chat.completion"
    assert body["model"] == "stories"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    n_prompt = len(expected.prompt)
    assert body["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 20,
        "total_tokens": n_prompt + 20,
        "prompt_tokens_details": None,
    }
    assert body["timings"]["predicted_n"] == 20


def test_forced_tokens_count_in_the_speed(client):
    options = {"regex": "[ab]{2} the little robot [0-9]", "temperature": 0}
    timings = client.post(PATH, {"messages": MESSAGES, **options}).json["timings"]
    n_decoded = timings["predicted_per_second"] * timings["predicted_ms"] / 1e3
    assert round(n_decoded) == timings["predicted_n"] - 1  # the prompt gives the first one


def test_the_second_time_the_prompt_is_cached(client):
    messages = [{"role": "user", "content": "Once upon a time there was a big dog " * 3}]
    usage = [
        client.post(PATH, {"messages": messages, "max_tokens": 1}).json["usage"] for _ in range(2)
    ]
    assert usage[1]["prompt_tokens_details"]["cached_tokens"] == usage[0]["prompt_tokens"] - 1


def test_a_stream_has_the_chunks_that_clients_expect(engine, client):
    options = {"max_tokens": 12, "seed": 5}
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    chunks = client.post(PATH, body | options).events
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": None}
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [
        "length"
    ]
    deltas = [choice["delta"] for choice in choices[1:-1]]
    assert all(set(delta) == {"content"} for delta in deltas)
    assert "".join(delta["content"] for delta in deltas) == said(engine, **options).text
    without = client.post(PATH, {"messages": MESSAGES, "stream": True} | options).events
    assert not any("usage" in chunk for chunk in without)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_seeds_that_follow_each_other(engine, client, stream):
    options = {"max_tokens": 9, "temperature": 1.0}
    body = {"messages": MESSAGES, "n": 3, "seed": 7, "stream": stream, **options}
    reply = client.post(PATH, body)
    texts = [""] * 3
    if stream:
        reasons = [[], [], []]
        for chunk in reply.events:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]].append(choice["finish_reason"])
        assert all(found[-1] == "length" and not any(found[:-1]) for found in reasons)
    else:
        texts = [choice["message"]["content"] for choice in reply.json["choices"]]
        usage = reply.json["usage"]
        assert usage["completion_tokens"] == 27
        assert usage["prompt_tokens"] == len(said(engine, max_tokens=1).prompt)
    assert texts == [said(engine, seed=7 + i, **options).text for i in range(3)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_librarys(engine, client, stream):
    options = {"max_tokens": 6, "temperature": 0}
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, "stream": stream, **options}
    reply = client.post(PATH, body)
    expected = said(engine, logprobs=3, **options)
    if stream:
        found = [chunk["choices"][0]["logprobs"] for chunk in reply.events]
        entries = [entry for each in found if each for entry in each["content"]]
    else:
        entries = reply.json["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [e.logprob for e in expected.logprobs]
    assert "".join(entry["token"] for entry in entries) == expected.text
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == expected.text
    for entry, wanted in zip(entries, expected.logprobs, strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == [p for _, p in wanted.top]


def test_options_reach_the_sampler(engine, client):
    options = {
        "max_tokens": 15,
        "seed": 1,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repeat_penalty": 1.2,
        "stop": ["zzz", "qqq"],
    }
    body = {"messages": MESSAGES, "logit_bias": {"300": -100, "301": 4.5}, **options}
    expected = said(engine, logit_bias={300: -100, 301: 4.5}, **options)
    assert client.post(PATH, body).json["choices"][0]["message"]["content"] == expected.text
    others = said(engine, max_tokens=15, seed=1)
    assert expected.text != others.text


def test_a_stop_string_ends_the_answer(engine, client):
    whole = said(engine, max_tokens=40, seed=2).text
    stop = whole[10:14]
    body = {"messages": MESSAGES, "max_tokens": 40, "seed": 2, "stop": stop}
    (choice,) = client.post(PATH, body).json["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "content", ["Once upon", [{"type": "text", "text": "Once"}, {"type": "text", "text": "upon"}]]
)
def test_content_is_a_text_or_parts_of_text(engine, client, content):
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": 5, "temperature": 0}
    expected = said(engine, messages, max_tokens=5, temperature=0)
    assert client.post(PATH, body).json["choices"][0]["message"]["content"] == expected.text


def test_an_answer_that_the_client_began_is_continued(engine, client):
    messages = [*MESSAGES, {"role": "assistant", "content": "It was"}]
    body = {"messages": messages, "max_tokens": 5, "temperature": 0}
    expected = said(engine, messages, max_tokens=5, temperature=0)
    for more in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        choice = client.post(PATH, body | more).json["choices"][0]
        assert choice["message"]["content"] == expected.text
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert client.post(PATH, body | both).status == 400


def test_without_a_limit_the_answer_goes_on_to_its_end(client):
    body = {"messages": MESSAGES, "seed": 3, "max_tokens": None, "logit_bias": {"2": -100}}
    reply = client.post(PATH, body).json
    assert reply["usage"]["total_tokens"] in (512, 513)
    assert reply["choices"][0]["finish_reason"] == "length"


def test_both_names_of_the_limit_mean_the_same(client):
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": MESSAGES, name: 3, "seed": 3}
        assert client.post(PATH, body).json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        ({"messages": None}, "messages: it is missing", "messages"),
        ({"messages": "hi"}, "messages: expected a list", "messages"),
        ({"messages": []}, "messages: expected at least one", "messages"),
        ({"messages": [1]}, "messages[0]: expected a dict", None),
        ({"messages": [{}]}, "messages[0]: role", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0]: content", None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate", None),
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1", "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens: expected an integer", "max_tokens"),
        ({"temperature": -1}, "temperature: expected a number from 0", "temperature"),
        ({"temperature": True}, "temperature: expected a number", "temperature"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1", "top_p"),
        ({"n": 0}, "n: expected an integer from 1 to 16", "n"),
        ({"n": 1000}, "n: expected an integer from 1 to 16", "n"),
        ({"seed": 2**70}, "seed: expected an integer", "seed"),
        ({"stop": 5}, "stop: expected a string or a list", "stop"),
        ({"stop": ["a"] * 17}, "stop: expected at most 16", "stop"),
        ({"logprobs": "yes"}, "logprobs: expected true or false", "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs: needs logprobs", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20", "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "from -100 to 100", "logit_bias: 5"),
        ({"logit_bias": {"99999": 1}}, "token ids below 4096", "logit_bias"),
        ({"stream": 1}, "stream: expected true or false", "stream"),
        ({"stream_options": []}, "stream_options: expected an object", "stream_options"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage", None),
        ({"presence_penalty": 3}, "from -2 to 2", "presence_penalty"),
    ],
)
def test_bad_requests_are_refused_by_name(client, change, message, param):
    reply = client.post(PATH, {"messages": MESSAGES, **change})
    assert reply.status == 400
    assert message in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    if param is not None:
        assert reply.error["param"] == param


def test_a_developer_is_a_system(engine, client):
    messages = [{"role": "developer", "content": "Be kind."}, *MESSAGES]
    system = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    found = client.post(PATH, {"messages": messages, "max_tokens": 5, "temperature": 0})
    text = said(engine, system, max_tokens=5, temperature=0).text
    assert found.json["choices"][0]["message"]["content"] == text


def test_unknown_fields_are_ignored(client):
    body = {"messages": MESSAGES, "max_tokens": 1, "user": "me", "metadata": {"a": [1]}, "x": None}
    assert client.post(PATH, body).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_gets_both_numbers(client, stream):
    messages = [{"role": "user", "content": "word " * 2000}]
    reply = client.post(PATH, {"messages": messages, "stream": stream})
    assert reply.status == 400
    error = reply.error
    assert error["code"] == "context_length_exceeded"
    assert error["n_ctx"] == 512
    assert error["n_prompt_tokens"] > 2000
    assert str(error["n_prompt_tokens"]) in error["message"]
    assert "512" in error["message"]


def test_a_text_of_megabytes_is_refused_before_it_is_encoded(client, monkeypatch):
    from hybrid.text.vocabulary import Vocabulary

    monkeypatch.setattr(Vocabulary, "encode_marked", None)
    monkeypatch.setattr(Vocabulary, "encode", None)
    for path, body in (
        (PATH, {"messages": [{"role": "user", "content": "the cat sat on " * 250_000}]}),
        ("/v1/completions", {"prompt": "<" * 4_000_000}),
    ):
        error = client.post(path, body).error
        assert error["code"] == "context_length_exceeded"
        assert error["n_prompt_tokens"] > 50_000
        assert "more than" in error["message"]
