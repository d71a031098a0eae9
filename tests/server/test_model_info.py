"""What a server says of its model, and texts that are encoded without generating any."""

from __future__ import annotations

import re

import pytest


def test_models(client):
    body = client.get("/v1/models").json
    assert body["object"] == "list"
    assert [entry["id"] for entry in body["data"]] == ["stories"]
    assert client.get("/models").json == body


def test_props_and_slots(client):
    props = client.get("/props").json
    assert props["model"] == "stories"
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert (props["n_layers"], props["n_neurons"], props["is_sparse"]) == (6, 1024, True)
    assert len(client.get("/slots").json) == 4


def test_tokenize_and_detokenize(engine, client):
    text = "Tom saw 媽 and 🤗."
    ids = engine.tokenizer.encode(text)
    assert client.post("/tokenize", {"content": text, "add_special": True}).json["tokens"] == ids
    without = client.post("/tokenize", {"content": text}).json["tokens"]
    assert without == ids[len(engine.tokenizer.bos) :]
    pieces = client.post("/tokenize", {"content": text, "with_pieces": True}).json["tokens"]
    assert [piece["id"] for piece in pieces] == without
    data = [p.encode() if isinstance(p, str) else bytes(p) for p in (e["piece"] for e in pieces)]
    assert b"".join(data).decode().strip() == text
    assert client.post("/detokenize", {"tokens": ids}).json["content"] == text


def test_apply_template(engine, client):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    prompt = client.post("/apply-template", {"messages": messages}).json["prompt"]
    assert prompt == engine.tokenizer.render_chat(messages) == "Be kind.<用户>Hello<AI>"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "content: it is missing"),
        ("/tokenize", {"content": "a" * (1 << 20) + "a"}, "at most 1,048,576 characters"),
        ("/tokenize", {"content": "<" * 60_000, "with_pieces": True}, "at most 50,000 tokens"),
        ("/tokenize", {"content": 5}, "content: expected a string"),
        ("/detokenize", {}, "tokens: it is missing"),
        ("/detokenize", {"tokens": [4096]}, "found 4096"),
        ("/detokenize", {"tokens": "a"}, "tokens: expected a list"),
        ("/apply-template", {}, "messages: it is missing"),
        ("/apply-template", {"messages": [1]}, "messages[0]"),
    ],
)
def test_bad_requests_are_refused(client, path, body, message):
    reply = client.post(path, body)
    assert reply.status == 400
    assert message in reply.error["message"]


def test_metrics_are_prometheus_text(client):
    def values() -> dict[str, float]:
        reply = client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        lines = reply.data.decode().splitlines()
        named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
        found = {}
        for line in lines:
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                base = re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", name)
                assert base in named or base.removesuffix("_total") in named, base
                found[name] = float(value)
        return found

    before = values()
    client.post(
        "/v1/completions", {"prompt": [[5, 6, 7]], "max_tokens": 4, "logit_bias": {"2": -100}}
    )
    after = values()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("hybrid_prompt_tokens_total") == 3
    assert grown("hybrid_generated_tokens_total") == 4
    assert grown("hybrid_pass_tokens_total") == 3 + 3
    assert grown("hybrid_pass_bytes_total") > 1e6
    assert 0 < after["hybrid_active_neuron_fraction"] < 0.5
    assert after["hybrid_pass_gigabytes_per_second"] > 0
    label = '{path="/v1/completions",status="200"}'
    assert grown(f"hybrid_http_requests_total{label}") == 1
    assert after["hybrid_active_sequences"] == after["hybrid_queued_requests"] == 0
