"""ServerSettings: what the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.engine.batch.loop import DEFAULT_CACHE_BYTES, DEFAULT_QUEUE, DEFAULT_SEQUENCES


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the operator of a server decides."""

    api_keys: tuple[str, ...] = ()  # one of them opens all endpoints but /health and the page
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header besides localhost; "*": any
    cors_origins: tuple[str, ...] = ()  # of pages elsewhere that may use this server; "*": any
    n_sequences: int = DEFAULT_SEQUENCES  # answers at once
    queue_size: int = DEFAULT_QUEUE  # further requests that wait
    cache_bytes: int = DEFAULT_CACHE_BYTES  # of the prefix cache
    has_page: bool = True  # whether there is a chat page at /
    body_timeout_s: float = 30.0  # until a request's body must have come
    ping_s: float = 10.0  # a stream never says nothing for longer
