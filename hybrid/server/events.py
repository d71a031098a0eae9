"""Server-sent events: `data: {...}` lines, pings while nothing happens, and errors at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from hybrid.server.api_error import ApiError, as_api_error

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_LOG = logging.getLogger("hybrid.server")


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


async def data_events(chunks: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[bytes]:
    """Yield chunks as events of OpenAI's streams; None becomes a ping, an error the last event."""
    try:
        async for chunk in chunks:
            yield PING if chunk is None else b"data: " + to_json(chunk) + b"\n\n"
    except Exception as error:
        yield b"data: " + to_json(logged(error).body) + b"\n\n"
    yield DONE


def named_event(name: str, data: dict[str, Any]) -> bytes:
    """Return an event with a name, which its data repeat as their type."""
    return f"event: {name}\n".encode() + b"data: " + to_json({"type": name, **data}) + b"\n\n"


def logged(error: Exception) -> ApiError:
    """Return what a client is told of an error, and log what it is not told."""
    known = as_api_error(error)
    if known.status == 500:
        _LOG.error("a request failed: %s", error, exc_info=error)
    return known
