"""A server on a thread of this process, and a client without any library's opinions."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import uvicorn

import hybrid
from hybrid.server import ServerSettings, create_app
from hybrid.server.http_protocol import GuardedProtocol


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        found: dict[str, Any] = self.json["error"]
        assert {"message", "type", "code"} <= set(found)
        return found

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, without the last one."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in self.data.decode().split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        data = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
        return [json.loads(each) for each in data]

    @property
    def named_events(self) -> list[Any]:
        """The data of a stream whose events have names, which their types repeat."""
        assert self.headers["content-type"].startswith("text/event-stream")
        found = []
        for block in self.data.decode().split("\n\n"):
            if block and not block.startswith(":"):
                name, data = block.split("\n")
                found.append(json.loads(data.removeprefix("data: ")))
                assert name == f"event: {found[-1]['type']}"
        return found


class Client:
    """Sends requests to one server."""

    def __init__(self, port: int, app: Any = None, server: Any = None) -> None:
        self.port, self.app, self.server = port, app, server

    @property
    def service(self) -> Any:
        return self.app.state.service

    def connect(self, timeout: float = 60) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, content_type="application/json", **headers)

    def begin(self, path: str, body: Any) -> socket.socket:
        """Send a request and return its connection, before anything has been read."""
        data = json.dumps(body).encode()
        connection = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Wait until no answer is generated."""
        deadline = time.monotonic() + seconds
        loop = self.service.model.loop
        while loop.running or loop.stats.n_waiting:
            assert time.monotonic() < deadline, "an answer is still being generated"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(engine: hybrid.Engine | None, **settings: Any) -> Iterator[Client]:
    """Serve an engine at a free port of this machine."""
    app = create_app(engine, ServerSettings(**settings))
    with serving_app(app) as client:
        try:
            yield client
        finally:
            client.server.should_exit = True
            app.state.service.close()


@contextlib.contextmanager
def serving_app(app: Any) -> Iterator[Client]:
    """Serve an ASGI application as `hybrid serve` does."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        config = uvicorn.Config(
            app, http=GuardedProtocol, ws="none", lifespan="off", log_level="critical"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Client(listening.getsockname()[1], app, server)
        finally:
            server.should_exit = True
            thread.join()
