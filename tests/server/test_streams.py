"""Streams under way: clients that go, pings, errors, full queues, many at once, the end."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from http_client import Client, Reply, serving

import hybrid
from hybrid.server import http_protocol
from hybrid.server.api_error import as_api_error
from hybrid.server.service import MAX_PREPARING

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDLESS = {"max_tokens": 480, "logit_bias": {"2": -100}, "temperature": 1}


@pytest.fixture(scope="module")
def slow_engine(engine):
    """The same model with passes that take a while, so that things can happen meanwhile."""
    with hybrid.load("stories", threads=1, chat_template="minicpm") as engine:
        open_batch = engine.open_batch

        def open_slow_batch() -> Any:
            batch = open_batch()
            run = batch.run

            def run_slowly(parts: Any) -> Any:
                time.sleep(0.03)
                return run(parts)

            batch.run = run_slowly
            return batch

        engine.open_batch = open_slow_batch
        yield engine


@pytest.fixture(scope="module")
def slow_client(slow_engine):
    with serving(slow_engine, n_sequences=2, queue_size=1, ping_s=0.05) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_answer(slow_client, stream):
    with slow_client.begin(COMPLETIONS, {"prompt": "Once", "stream": stream, **ENDLESS}) as raw:
        deadline = time.monotonic() + 10
        while not slow_client.service.model.loop.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if stream:
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        (answer,) = slow_client.service.model.loop.running
    slow_client.wait_until_idle(5)
    assert answer.finish_reason == "cancelled"
    assert len(answer.tokens) < 400


def test_a_client_that_goes_ends_its_prompt(slow_client):
    before = slow_client.service.model.loop.stats.passes.n_tokens
    with slow_client.begin(COMPLETIONS, {"prompt": [[7] * 510], "stream": True}):
        deadline = time.monotonic() + 10
        while not slow_client.service.model.loop.running:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    slow_client.wait_until_idle(5)
    assert slow_client.service.model.loop.stats.passes.n_tokens - before < 400


def test_a_client_that_goes_leaves_the_queue(slow_client):
    loop = slow_client.service.model.loop
    first = [slow_client.begin(COMPLETIONS, {"prompt": "Once", **ENDLESS}) for _ in range(2)]
    while len(loop.running) < 2:
        time.sleep(0.01)
    waiting = slow_client.begin(COMPLETIONS, {"prompt": "Once", **ENDLESS})
    while not loop.stats.n_waiting:
        time.sleep(0.01)
    reply = slow_client.post(COMPLETIONS, {"prompt": "Once"})
    assert reply.status == 503
    assert reply.error["code"] == "queue_full"
    assert int(reply.headers["retry-after"]) > 0
    slots = slow_client.get("/slots").json
    assert [slot["is_processing"] for slot in slots] == [True, True]
    assert slots[0]["n_prompt_tokens"] == 2
    assert "hybrid_queued_requests 1.0" in slow_client.get("/metrics").data.decode()
    waiting.close()
    deadline = time.monotonic() + 10
    while loop.stats.n_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for raw in first:
        raw.close()
    slow_client.wait_until_idle(5)


def test_pings_come_while_nothing_else_does(slow_client):
    reply = slow_client.post(
        CHAT,
        {"messages": [{"role": "user", "content": "a " * 400}], "max_tokens": 2, "stream": True},
    )
    lines = reply.data.decode().split("\n\n")
    pings = [i for i, line in enumerate(lines) if line == ": ping"]
    assert pings
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["role"]
    assert pings[0] == 1  # after the first chunk, while the prompt is computed


def test_an_error_after_the_first_byte_is_an_event(engine, monkeypatch):
    from hybrid.engine.batch.stream import Stream

    choose, n = Stream.choose, iter(range(100))

    def fails(stream: Stream) -> None:
        choose(stream)
        if next(n) == 3:
            stream.error = hybrid.NumericOverflow("keys overflow")

    monkeypatch.setattr(Stream, "choose", fails)
    with serving(engine) as client:
        body = {"prompt": "Once", "max_tokens": 20, "stream": True}
        *chunks, error = client.post(COMPLETIONS, body).events
        assert len(chunks) >= 1
        assert error == as_api_error(hybrid.NumericOverflow("keys overflow")).body
        whole = client.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 5})
        assert whole.status == 200


def test_an_error_without_a_stream_has_a_status(engine, monkeypatch):
    from hybrid.engine.batch.stream import Stream

    def fails(stream: Stream) -> None:
        stream.error = hybrid.NumericOverflow("keys overflow")

    monkeypatch.setattr(Stream, "choose", fails)
    with serving(engine) as client:
        reply = client.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 20})
        assert reply.status == 500
        assert reply.error["message"] == "keys overflow"


def test_a_mistake_of_ours_tells_nothing_of_the_inside(engine, monkeypatch):
    monkeypatch.setattr(hybrid.BatchLoop, "submit", lambda *a, **k: 1 / 0)
    with serving(engine) as client:
        reply = client.post(COMPLETIONS, {"prompt": "Once"})
        assert reply.status == 500
        assert "division" not in reply.error["message"]
        counted = 'hybrid_http_requests_total{path="/v1/completions",status="500"} 1.0'
        assert counted in client.get("/metrics").data.decode()


def test_a_loop_that_has_ended_is_not_healthy(engine):
    with serving(engine) as client:
        client.service.model.loop.close()
        reply = client.get("/health")
        assert reply.status == 500
        assert "start the server again" in reply.error["message"]


def test_clients_that_go_fill_no_log(engine, caplog):
    with serving(engine) as client:
        with client.begin(COMPLETIONS, {"prompt": "Once", "stream": True, **ENDLESS}) as raw:
            assert raw.recv(100)
        client.wait_until_idle(5)
        with client.begin(COMPLETIONS, {"prompt": "Once", **ENDLESS}):
            time.sleep(0.1)
        client.wait_until_idle(5)
    assert caplog.records == []


def await_preparing(client: Any, n: int) -> None:
    """Wait until so many requests are being read."""
    deadline = time.monotonic() + 60
    while client.service._n_preparing != n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_of_clients_that_have_gone_are_not_read(engine):
    """Neither do they keep threads, nor does their number have no bound."""
    gate = threading.Event()
    with serving(engine) as client:
        pool = client.service._preparing
        held = [pool.submit(gate.wait) for _ in range(pool._max_workers)]
        waiting = [client.begin(COMPLETIONS, {"prompt": "Once"}) for _ in range(MAX_PREPARING)]
        await_preparing(client, MAX_PREPARING)
        assert client.post(COMPLETIONS, {"prompt": "Once"}).status == 503
        for raw in waiting:
            raw.close()
        await_preparing(client, 0)
        gate.set()
        assert all(future.result() for future in held)
        assert client.service.model.loop.stats.n_waiting == 0
        assert client.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 2}).status == 200


def test_many_clients_get_the_answers_that_each_gets_alone(engine):
    wanted = {}
    for seed in range(24):
        prompt = f"Once upon a time there was a {('dog', 'cat', 'bird')[seed % 3]} number {seed}"
        text = "".join(engine.generate(prompt, raw=True, seed=seed, max_tokens=20))
        wanted[seed] = prompt, text
    found: dict[int, str] = {}

    def ask(client: Any, seed: int) -> None:
        body = {"prompt": wanted[seed][0], "seed": seed, "max_tokens": 20, "stream": True}
        reply = client.post(COMPLETIONS, body)
        found[seed] = "".join(chunk["choices"][0]["text"] for chunk in reply.events)

    with serving(engine, n_sequences=5) as client:
        threads = [threading.Thread(target=ask, args=(client, seed)) for seed in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {seed: text for seed, (_, text) in wanted.items()}


def test_a_reader_that_stops_reading_is_cut_off(engine, monkeypatch):
    """Nobody else waits for it, and in the end neither its answer nor its connection is left."""
    monkeypatch.setattr(http_protocol, "SEND_TIMEOUT_S", 0.3)
    with serving(engine) as client:
        body = {"prompt": ["Once"] * 2, "n": 8, "stream": True, "logprobs": 20, **ENDLESS}
        held = [client.begin(COMPLETIONS, body), client.begin("/tokenize", LARGE)]
        client.wait_until_idle(60)
        other = client.post(COMPLETIONS, {"prompt": "Once", "max_tokens": 3})
        assert other.status == 200
        deadline = time.monotonic() + 20
        while client.server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for raw in held:
            raw.close()


LARGE = {"content": "<" * 40_000, "with_pieces": True}  # makes an answer of a megabyte


def test_a_reader_that_stops_ends_its_answer_when_it_goes(slow_client):
    body = {"prompt": "Once", "stream": True, "logprobs": 20, **ENDLESS}
    with slow_client.begin(COMPLETIONS, body):
        loop = slow_client.service.model.loop
        while not (loop.running and len(loop.running[0].tokens) > 60):
            time.sleep(0.01)  # buffers fill, and nobody reads
        (answer,) = loop.running
    slow_client.wait_until_idle(5)
    assert answer.finish_reason == "cancelled"


def test_a_server_that_loads_says_so(engine):
    with serving(None) as client:
        for path in ("/health", "/v1/models", "/slots"):
            reply = client.get(path)
            assert reply.status == 503
            assert reply.error["code"] == "loading"
            assert reply.headers["retry-after"]
        assert client.post(CHAT, {}).status == 503
        assert "hybrid_loaded 0.0" in client.get("/metrics").data.decode()
        client.service.open(engine)
        assert client.get("/health").status == 200


def drained(client: Client, body: dict[str, Any], within_s: float) -> Reply:
    """Return the reply to a request during which the server is drained."""
    found: list[Reply] = []
    asking = threading.Thread(target=lambda: found.append(client.post(COMPLETIONS, body)))
    asking.start()
    while not client.service.model.loop.running:
        time.sleep(0.01)
    client.service.drain(within_s)
    asking.join()
    return found[0]


def test_draining_lets_answers_end(slow_engine):
    with serving(slow_engine) as client:
        body = {"prompt": "Once", "max_tokens": 20, "logit_bias": {"2": -100}, "stream": True}
        reply = drained(client, body, within_s=30)
        assert reply.events[-1]["choices"][0]["finish_reason"] == "length"
        assert client.get("/health").status == 503
        reply = client.post(COMPLETIONS, {"prompt": "Once"})
        assert reply.status == 503
        assert reply.error["code"] == "shutting_down"


def test_draining_has_a_deadline(slow_engine):
    with serving(slow_engine) as client:
        body = {"prompt": "Once", "stream": True, **ENDLESS}
        reply = drained(client, body, within_s=0.2)
        assert reply.events[-1]["error"]["code"] == "shutting_down"
