"""create_app: the server as an ASGI application of Starlette.

guards.py            Host, Origin, API key            refuses by headers alone
connection.py        a body that comes, a client that goes
fields.py            JSON with types and ranges
chat_page.py         the page at /
openai/, anthropic/  what the endpoints of two APIs read and write
service.py           the engine and its batching loop
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid import Engine, HybridError
from hybrid.server.anthropic.messages import MessageRun, count_tokens
from hybrid.server.api_error import ApiError, as_api_error
from hybrid.server.chat_page import page_routes
from hybrid.server.connection import (
    ClientGone,
    EventStream,
    read_body,
    route_path,
    until_disconnect,
)
from hybrid.server.events import logged, to_json
from hybrid.server.fields import Fields, parse_fields
from hybrid.server.guards import Guards
from hybrid.server.metrics import Metrics
from hybrid.server.model_info import (
    apply_template,
    detokenize,
    list_models,
    props,
    slots,
    tokenize,
)
from hybrid.server.openai.chat import ChatCompletion
from hybrid.server.openai.completions import TextCompletion
from hybrid.server.openai.responses import ResponseRun
from hybrid.server.service import Model, Service
from hybrid.server.settings import ServerSettings

Handler = Callable[[Request], Awaitable[Response]]


class Completion(Protocol):
    """What the model generates for a request of one of the endpoints."""

    is_stream: bool

    async def result(self) -> dict[str, Any]: ...
    def events(self, ping_s: float) -> AsyncIterator[bytes]: ...
    def close(self) -> None:
        """End what is not complete."""


def create_app(engine: Engine | None = None, settings: ServerSettings | None = None) -> Starlette:
    """Return the ASGI application that serves one engine.

    Without an engine it answers with status 503 until `app.state.service.open(engine)`. The engine
    stays the caller's: close `app.state.service` before it. Raises as `hybrid.BatchLoop` does.
    """
    settings = settings or ServerSettings()
    service = Service(settings)
    if engine is not None:
        service.open(engine)
    metrics = Metrics(service)
    routes = [*_routes(), *(page_routes() if settings.has_page else ())]
    measured = Middleware(Measured, metrics=metrics, paths={route.path for route in routes})
    middleware = [measured, Middleware(Guards, settings=settings)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "OPTIONS"),
            allow_headers=("*",),
        )
        middleware.insert(1, cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: _on_error,
            HybridError: _on_error,
            HTTPException: _on_http_error,
            ClientGone: _on_client_gone,
            Exception: _on_mistake,
        },
    )
    app.state.service, app.state.metrics = service, metrics
    return app


def _routes() -> list[Route]:
    completions: dict[str, Callable[[Model, Fields], Completion]] = {
        "/chat/completions": ChatCompletion,
        "/completions": TextCompletion,
        "/responses": ResponseRun,
        "/messages": MessageRun,
    }
    routes = [
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/props", _info(props)),
        Route("/slots", _info(slots)),
        Route("/tokenize", _read(tokenize), methods=["POST"]),
        Route("/detokenize", _read(detokenize), methods=["POST"]),
        Route("/apply-template", _read(apply_template), methods=["POST"]),
    ]
    for prefix in ("/v1", ""):  # many clients are given an address without /v1
        routes.append(Route(f"{prefix}/models", _info(list_models)))
        count = _read(count_tokens)
        routes.append(Route(f"{prefix}/messages/count_tokens", count, methods=["POST"]))
        routes.append(Route(f"{prefix}/embeddings", _embeddings, methods=["POST"]))
        for path, completion in completions.items():
            routes.append(Route(prefix + path, _complete(completion), methods=["POST"]))
    return routes


async def _health(request: Request) -> Response:
    _ = _service(request).model
    return _json({"status": "ok"})


async def _metrics(request: Request) -> Response:
    content = request.app.state.metrics.text()
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _embeddings(request: Request) -> Response:
    raise ApiError(
        501,
        "embeddings: hybrid computes none; it completes texts and answers chats",
        "not_supported_error",
        code="not_supported",
    )


def _info(describe: Callable[[Model], Any]) -> Handler:
    """Return the handler of a GET request that says something about the model."""

    async def handle(request: Request) -> Response:
        return _json(describe(_service(request).model))

    return handle


def _read(work: Callable[[Model, Fields], Any]) -> Handler:
    """Return the handler of a POST request that is answered at once."""

    async def handle(request: Request) -> Response:
        content = await _prepare(request, lambda model, fields: to_json(work(model, fields)))
        return Response(content, media_type="application/json")

    return handle


def _complete(completion: Callable[[Model, Fields], Completion]) -> Handler:
    """Return the handler of a POST request for which the model generates text."""

    async def handle(request: Request) -> Response:
        settings = _service(request).settings
        running = await _prepare(request, completion)
        if running.is_stream:
            return EventStream(running.events(settings.ping_s), running.close)
        try:
            return _json(await until_disconnect(request.receive, running.result()))
        finally:
            running.close()

    return handle


async def _prepare(request: Request, work: Callable[[Model, Fields], Any]) -> Any:
    """Read a request's body and do work with its fields, on a thread."""
    service = _service(request)
    model = service.model
    body = await read_body(request.headers, request.receive, service.settings.body_timeout_s)
    prepared = service.prepare(lambda: work(model, parse_fields(body)))
    return await until_disconnect(request.receive, prepared)


async def _on_error(request: Request, error: Exception) -> Response:
    known = logged(error)
    return _json(known.body_at(route_path(request.scope)), known.status, known.headers)


async def _on_mistake(request: Request, error: Exception) -> Response:
    """Answer a request that met a mistake of ours. Starlette passes it on, so it is logged."""
    return _json(as_api_error(error).body_at(route_path(request.scope)), 500)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    known = ApiError(error.status_code, text, headers=error.headers)
    return _json(known.body_at(route_path(request.scope)), known.status, known.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it, but logs and metrics show it


class Measured:
    """An ASGI middleware that counts responses and their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """Paths that are not in `paths` count as "other", because anybody can invent some."""
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:  # which Starlette answers outside of this
            status = 500
            raise
        finally:
            path = route_path(scope)
            path = path if path in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            self._metrics.request_seconds.labels(path).observe(time.perf_counter() - started)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")
