"""hybrid's HTTP server: `create_app(engine)` is an ASGI application."""

from hybrid.server.app import create_app as create_app
from hybrid.server.settings import ServerSettings as ServerSettings
