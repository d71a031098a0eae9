"""What happens to a connection while a request runs: bodies come, clients go, streams flow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybrid.server.api_error import ApiError

MAX_BODY = 4 << 20
_Result = TypeVar("_Result")
_CLOSE = {"Connection": "close"}  # the rest of a body is not read


class ClientGone(Exception):
    """The client has closed its connection, so nobody reads an answer."""


def route_path(scope: Scope) -> str:
    """Return a request's path within this application, which may be mounted below another path."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(root + "/") else path


async def read_body(headers: Headers, receive: Receive, timeout_s: float) -> bytes:
    """Return a request's body. Raises ApiError if it is too large, too slow or encoded."""
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "the request's body: expected no content encoding")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise _too_large()
    try:
        return await asyncio.wait_for(_read(receive), timeout_s)
    except asyncio.TimeoutError:
        message = f"the request's body: did not come within {timeout_s:g} s"
        raise ApiError(408, message, code="timeout", headers=_CLOSE) from None


async def until_disconnect(receive: Receive, work: Coroutine[object, object, _Result]) -> _Result:
    """Do work, but cancel it and raise ClientGone if the client goes before it is done."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for other in (task, watcher):
            other.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Sends server-sent events as they come, until the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        """`on_end` is called after the last event, or when the client has gone."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # What has begun cannot be answered in another way.
            with suppress(ClientGone):
                await until_disconnect(receive, self._send_all(send))
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read(receive: Receive) -> bytes:
    body, has_more = bytearray(), True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        has_more = message.get("more_body", False)
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"the request's body: expected at most {MAX_BODY:,} bytes",
        code="body_too_large",
        headers=_CLOSE,
    )
