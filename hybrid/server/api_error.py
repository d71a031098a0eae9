"""ApiError: what a client is told when a request fails, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid import (
    ContextOverflow,
    EngineClosed,
    HybridError,
    InvalidOption,
    OutOfMemory,
    QueueFull,
)

RETRY_AFTER_S = 2


_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that fails, with its HTTP status and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        *,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`details` are further fields of the error, `headers` those of the response."""
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.code, self.param = code, param
        self.details, self.headers = dict(details or {}), dict(headers or {})

    def body_at(self, path: str) -> dict[str, Any]:
        """Return the response's body at a path: Anthropic's API has errors of its own form."""
        if not path.removeprefix("/v1").startswith("/messages"):
            return self.body
        kind = _ANTHROPIC.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    @property
    def body(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": self.type, "code": self.code}
        return {"error": {**fields, "param": self.param, **self.details}}


def wrong(name: str, expected: str, found: object) -> ApiError:
    """Return the error of a field with a wrong value."""
    return ApiError(400, f"{name}: expected {expected}, found {found!r:.80}", param=name)


def unavailable(message: str, code: str) -> ApiError:
    """Return the error of a request that may succeed a little later."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, message, "unavailable_error", code=code, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error. What is not the client's business stays here."""
    match error:
        case ApiError():
            return error
        case ContextOverflow():
            return ApiError(
                400,
                str(error),
                "exceed_context_size_error",
                code="context_length_exceeded",
                details={"n_prompt_tokens": error.n_tokens, "n_ctx": error.n_context},
            )
        case InvalidOption():
            name, colon, _ = str(error).partition(":")
            return ApiError(400, str(error), param=name if colon and name.isidentifier() else None)
        case QueueFull():
            return unavailable(str(error), "queue_full")
        case OutOfMemory():
            return unavailable(str(error), "out_of_memory")
        case EngineClosed():
            return unavailable("the server is shutting down", "shutting_down")
        case HybridError():
            return ApiError(500, str(error), "server_error")
    return ApiError(500, "internal error; the server's log has the details", "server_error")
