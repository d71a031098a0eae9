"""POST /v1/completions: texts, token ids, several prompts, echo, log-probabilities."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from http_client import serving

PATH = "/v1/completions"
TEXT = "Once upon a time there was"


def test_a_text_is_continued_as_it_is(engine, client):
    options = {"max_tokens": 10, "seed": 4}
    reply = client.post(PATH, {"prompt": TEXT, **options})
    expected = engine.generate(TEXT, raw=True, **options)
    text = "".join(expected)
    (choice,) = reply.json["choices"]
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    assert reply.json["object"] == "text_completion"
    assert reply.json["usage"]["prompt_tokens"] == len(expected.prompt)


def test_a_stream_has_the_same_text(engine, client):
    options = {"max_tokens": 10, "seed": 4, "stream_options": {"include_usage": True}}
    *chunks, usage = client.post(PATH, {"prompt": TEXT, "stream": True, **options}).events
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == "".join(engine.generate(TEXT, raw=True, max_tokens=10, seed=4))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert usage["usage"]["completion_tokens"] == 10


def test_several_prompts_of_texts_and_ids(engine, client):
    ids = engine.tokenizer.encode("The little robot")
    body = {"prompt": [TEXT, "The little robot"], "max_tokens": 6, "seed": 4, "n": 2}
    choices = client.post(PATH, body).json["choices"]
    expected = [
        "".join(engine.generate(prompt, raw=True, max_tokens=6, seed=seed))
        for prompt in (TEXT, ids)
        for seed in (4, 5)
    ]
    assert [choice["text"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    as_ids = client.post(PATH, body | {"prompt": [engine.tokenizer.encode(TEXT), ids]})
    assert [choice["text"] for choice in as_ids.json["choices"]] == expected
    alone = client.post(PATH, body | {"prompt": ids, "n": 1}).json["choices"]
    assert [choice["text"] for choice in alone] == expected[2:3]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_an_echo_has_the_prompts_logprobs(engine, client, stream, max_tokens):
    ids = engine.tokenizer.encode(TEXT)
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    reply = client.post(PATH, body | {"temperature": 0, "stream": stream})
    if stream:
        choices = [chunk["choices"][0] for chunk in reply.events]
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        text = "".join(choice["text"] for choice in choices)
        logprobs = {name: [x for part in parts for x in part[name]] for name in parts[0]}
    else:
        (choice,) = reply.json["choices"]
        text, logprobs = choice["text"], choice["logprobs"]
    generation = engine.generate(ids, max_tokens=max(max_tokens, 1), temperature=0)
    answer = "".join(generation)
    assert text == TEXT + (answer if max_tokens else "")
    if not stream:
        assert reply.json["usage"]["completion_tokens"] == max_tokens
    n = len(ids) + max_tokens
    assert all(len(values) == n for values in logprobs.values())
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    with engine.open_session() as session:
        rows = session.prefill([*ids, *generation.tokens], all_logits=True).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    for i, token in enumerate([*ids, *generation.tokens][1:n], 1):
        assert logprobs["token_logprobs"][i] == pytest.approx(rows[i - 1, token], abs=1e-6)
        ((_, best),) = logprobs["top_logprobs"][i].items()
        assert best == pytest.approx(rows[i - 1].max(), abs=1e-6)
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert text[offset:].startswith(token.lstrip(" ") if offset == 0 else token)


def test_an_end_may_be_ignored(client):
    body = {"prompt": "The end.", "max_tokens": 400, "ignore_eos": True, "seed": 1}
    reply = client.post(PATH, body | {"logit_bias": {"300": 1}}).json
    assert reply["usage"]["completion_tokens"] == 400


def test_logprobs_without_an_echo_are_those_of_the_answer(engine, client):
    body = {"prompt": TEXT, "logprobs": 2, "max_tokens": 4, "temperature": 0}
    logprobs = client.post(PATH, body).json["choices"][0]["logprobs"]
    generation = engine.generate(TEXT, raw=True, logprobs=2, max_tokens=4, temperature=0)
    list(generation)
    assert logprobs["token_logprobs"] == [entry.logprob for entry in generation.logprobs]
    assert logprobs["text_offset"][0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt: it is missing"),
        ({"prompt": []}, "prompt: expected a text, token ids"),
        ({"prompt": [[]]}, "prompt: expected a text, token ids"),
        ({"prompt": [1, "a"]}, "prompt: expected a text, token ids"),
        ({"prompt": {"a": 1}}, "prompt: expected a text, token ids"),
        ({"prompt": [5000]}, "token ids from 0 to 4095, found 5000"),
        ({"prompt": [-1]}, "token ids from 0 to 4095, found -1"),
        ({"prompt": ["a"] * 65}, "at most 64 prompts"),
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1"),
        ({"logprobs": 21}, "logprobs: expected an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs: expected an integer"),
        ({"prompt": [[1] * 600]}, "the prompt has 600 tokens, the context holds 512"),
    ],
)
def test_bad_requests_are_refused(client, change, message):
    reply = client.post(PATH, {"prompt": TEXT, **change})
    assert reply.status == 400
    assert message in reply.error["message"]


def test_each_of_several_answers_echoes_the_prompts_logprobs(engine, client):
    body = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 3, "n": 3, "seed": 5}
    choices = client.post(PATH, body).json["choices"]
    n = len(engine.tokenizer.encode(TEXT))
    first = choices[0]["logprobs"]["token_logprobs"][:n]
    assert first[0] is None
    for choice in choices:
        assert choice["logprobs"]["token_logprobs"][:n] == first
        assert len(choice["logprobs"]["tokens"]) == n + 3
        assert choice["text"].startswith(TEXT)


def test_more_answers_than_can_ever_wait_are_refused(client):
    reply = client.post(PATH, {"prompt": ["a"] * 64, "n": 16, "max_tokens": 400})
    assert reply.status == 400
    assert "at most 68 prompts times n, found 1024" in reply.error["message"]


def test_more_answers_than_may_wait_now_are_refused_and_none_is_begun(engine):
    body = {"prompt": ["a"] * 6, "max_tokens": 400, "ignore_eos": True}
    gate = threading.Event()
    with serving(engine, n_sequences=2, queue_size=5) as client:
        loop = client.service.model.loop
        steps, step = loop._worker._steps, loop._worker._steps.step
        steps.step = lambda: gate.wait() and step()
        with client.begin(PATH, body):
            deadline = time.monotonic() + 60
            while loop.stats.n_waiting < 4:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            reply = client.post(PATH, body)
            assert reply.status == 503
            assert reply.error["code"] == "queue_full"
            assert int(reply.headers["retry-after"]) > 0
            # What was refused as a whole has left no place taken.
            waiting = [each for each in loop._worker._queue if not each.answer.is_cancelled]
            assert len(waiting) == 4
            gate.set()
        client.wait_until_idle()
