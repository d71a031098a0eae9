"""Guards: which requests may enter. They stand before everything else.

A page of another site must not use a server on this machine: its requests carry that site's name in
the Origin header, or, if its DNS entry was changed to this machine, in the Host header.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid.server import chat_page
from hybrid.server.api_error import ApiError
from hybrid.server.connection import route_path
from hybrid.server.settings import ServerSettings

PUBLIC = {"/health", *chat_page.PATHS}  # need no key
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Guards:
    """An ASGI middleware that refuses requests by their headers."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(route_path(scope), Headers(scope=scope))
            except ApiError as error:
                body = error.body_at(route_path(scope))
                response = JSONResponse(body, error.status, headers=error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not is_allowed_host(host, self._settings.allowed_hosts):
            raise ApiError(
                403,
                f"Host: {host!r:.80} is no address of this server; if it should be, start it with "
                "--allowed-host",
                "permission_error",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed_origin(origin, host):
            raise ApiError(
                403,
                f"Origin: pages of {origin!r:.80} may not use this server; if they should, start "
                "it with --cors-origin",
                "permission_error",
                code="origin_not_allowed",
            )
        if self._keys and path not in PUBLIC and not self._has_key(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as "
                "x-api-key: KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        allowed = self._settings.cors_origins
        if "*" in allowed or origin in allowed:
            return True
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # All keys are compared, and each takes the same time, so a guess cannot be refined.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        return any(matches)


def is_allowed_host(host: str, allowed: tuple[str, ...]) -> bool:
    """Return whether a Host header names this server: by an IP address, localhost or a given name.

    No name in the DNS can be an IP address, so those are safe from rebinding.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match[1].lower()
    if "*" in allowed or name in {other.lower() for other in allowed}:
        return True
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
