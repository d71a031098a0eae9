"""The chat page at /: static files that come with the package, and nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from hybrid.server.connection import route_path

_FOLDER = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
PATHS = frozenset(_FILES)
# A browser loads and runs what this server sends as files, and nothing that a model writes.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> list[Route]:
    return [Route(path, _send) for path in _FILES]


async def _send(request: Request) -> Response:
    return FileResponse(_FOLDER / _FILES[route_path(request.scope)], headers=_HEADERS)
