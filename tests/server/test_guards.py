"""What may enter: hosts, origins, keys, bodies of limited size, depth and time."""

from __future__ import annotations

import http.client
import socket
import time

import pytest
from http_client import serving, serving_app
from starlette.applications import Starlette
from starlette.routing import Mount

from hybrid.server import ServerSettings, create_app, http_protocol
from hybrid.server.guards import is_allowed_host

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Once", "max_tokens": 2}


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:8080", True),
        ("LOCALHOST:1", True),
        ("app.localhost", True),
        ("127.0.0.1:8080", True),
        ("192.168.1.7", True),
        ("[::1]:8080", True),
        ("box.lan:8080", True),
        ("evil.com", False),
        ("localhost.evil.com", False),
        ("127.0.0.1.evil.com", False),
        ("evil.com:127", False),
        ("box.lan.evil.com", False),
        ("", False),
        ("a b", False),
        ("localhost:port", False),
        ("[::1", False),
        ("user@localhost", False),
    ],
)
def test_hosts(host, allowed):
    assert is_allowed_host(host, ("box.lan",)) is allowed
    if host and host.isascii() and " " not in host and not host.startswith(("user", "[::1")):
        assert is_allowed_host(host, ("*",)) is not host.endswith(":port")


def test_a_name_that_a_site_made_point_here_is_refused(client):
    reply = client.get("/health", host="evil.example")
    assert reply.status == 403
    assert reply.error["code"] == "host_not_allowed"


def test_pages_of_other_sites_are_refused(engine, client):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://["):
        reply = client.post(COMPLETIONS, BODY, origin=origin)
        assert reply.status == 403, origin
        assert reply.error["code"] == "origin_not_allowed"
    own = client.post(COMPLETIONS, BODY, origin=f"http://127.0.0.1:{client.port}")
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers
    preflight = {"access_control_request_method": "POST", "origin": "http://evil.example"}
    assert client.request("OPTIONS", COMPLETIONS, **preflight).status == 403
    with serving(engine, cors_origins=("http://good.example",), api_keys=("key",)) as other:
        preflight["origin"] = "http://good.example"
        reply = other.request("OPTIONS", COMPLETIONS, **preflight)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "http://good.example"
        good = other.post(COMPLETIONS, BODY, origin="http://good.example", x_api_key="key")
        assert good.status == 200
        assert good.headers["access-control-allow-origin"] == "http://good.example"
        assert other.post(COMPLETIONS, BODY, origin="http://bad.example").status == 403


def test_a_key_opens_everything_but_what_is_public(engine):
    with serving(engine, api_keys=("sk-one", "sk-zwei-ü")) as client:
        assert client.get("/health").status == 200
        for method, path in [
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/slots"),
            ("POST", COMPLETIONS),
            ("GET", "/nothing"),
        ]:
            reply = client.request(method, path)
            assert reply.status == 401, path
            assert reply.error["type"] == "authentication_error"
        for headers in (
            {"authorization": "Bearer sk-one"},
            {"authorization": "bearer  sk-one "},
            {"x_api_key": "sk-one"},
        ):
            assert client.post(COMPLETIONS, BODY, **headers).status == 200
        for headers in (
            {"authorization": "Bearer sk-on"},
            {"authorization": "Bearer sk-one2"},
            {"authorization": "Basic sk-one"},
            {"authorization": "sk-one"},
            {"x_api_key": ""},
        ):
            assert client.post(COMPLETIONS, BODY, **headers).status == 401


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": "a", "prompt": "b"}', "has the field 'prompt' twice"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b'{"a":' + b"[" * 500_000, "nested too deeply"),
        (b'{"a": [' + b"0," * 500_001 + b"0]}", "more than 500,000 values"),
        (b'{"prompt": "\\ud800"}', "found the lone surrogate"),
        (b'{"\\udfff": 1}', "found the lone surrogate"),
        (b'{"temperature": 1e999, "prompt": ""}', "a number is too large"),
    ],
)
def test_bodies_that_are_no_request(client, body, message):
    reply = client.post(COMPLETIONS, body)
    assert reply.status == 400
    assert message in reply.error["message"]


def test_a_body_that_is_too_large_is_not_read(client):
    with client.connect() as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4194305\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    with client.connect() as raw:  # one that does not say how large it is
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(65):
            try:
                raw.sendall(chunk)
            except OSError:
                break
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    reply = client.request("POST", CHAT, b"{}", content_encoding="gzip")
    assert reply.status == 415


def closes_within(raw: socket.socket, seconds: float) -> bytes:
    """Return what comes until the server closes the connection."""
    raw.settimeout(seconds)
    found = b""
    while data := raw.recv(4096):
        found += data
    return found


def test_slow_headers_and_bodies_are_cut_off(engine, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.3)
    with serving(engine, body_timeout_s=0.3) as client:
        with client.connect() as raw:  # says nothing
            assert closes_within(raw, 10) == b""
        with client.connect() as raw:  # a header line now and then
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            assert closes_within(raw, 10) == b""
        with client.connect() as raw:  # the next request of a connection
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 200")
            raw.sendall(b"GET /health HT")
            closes_within(raw, 10)
        with client.connect() as raw:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n"
            raw.sendall(head.encode() + b'{"prompt"')
            assert closes_within(raw, 10).startswith(b"HTTP/1.1 408 ")
        # A request whose answer takes longer than that is none of these.
        with client.begin(
            COMPLETIONS, {"prompt": "Once", "max_tokens": 480, "logit_bias": {"2": -100}}
        ) as raw:
            time.sleep(0.4)
            assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_what_comes_behind_an_answer_is_no_reason_to_wait(engine, monkeypatch):
    """The rest of a body that nobody reads must not keep a connection."""
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with serving(engine, api_keys=("key",)) as client:
        for request in (head, head.replace(b"POST /v1/completions", b"GET /health")):
            with client.connect() as raw:
                raw.sendall(request)
                assert raw.recv(4096).startswith(b"HTTP/1.1 ")
                raw.sendall(b"{")
                closes_within(raw, 10)


def test_an_application_below_a_path(engine):
    app = create_app(engine, ServerSettings(api_keys=("key",)))
    mounted = Starlette(routes=[Mount("/llm", app)])
    with serving_app(mounted) as client:
        assert client.get("/llm/health").status == 200
        assert client.get("/llm/page.css").status == 200
        assert client.get("/llm/v1/models").status == 401
        assert client.post("/llm/v1/messages", {}).json["type"] == "error"
        assert client.get("/health").status == 404
    app.state.service.close()


def test_connections_have_a_limit(engine, monkeypatch):
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 3)
    with serving(engine) as client:
        held = [client.connect() for _ in range(3)]
        time.sleep(0.2)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            client.get("/health")
        for raw in held:
            raw.close()
        time.sleep(0.2)
        assert client.get("/health").status == 200


def test_what_is_no_http_is_answered(client):
    with client.connect() as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        assert closes_within(raw, 10).startswith(b"HTTP/1.1 400 ")


def test_errors_of_routes_are_json(client):
    assert client.get("/nothing").status == 404
    assert client.get("/nothing").error["message"] == "GET /nothing: Not Found"
    assert client.get(CHAT).status == 405
    assert client.post("/v1/embeddings", {"input": "a"}).status == 501
    assert "embeddings" in client.post("/v1/embeddings", {}).error["message"]
    assert client.get("/../../etc/passwd").status == 404
    assert client.get("/%2e%2e/%2e%2e/etc/passwd").status == 404
