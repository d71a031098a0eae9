"""Serve a model over HTTP, for OpenAI's clients and for a browser.

    python -m hybrid.serve
    python -m hybrid.serve -m MiniCPM-S-1B --quant q4 --port 8080
    python -m hybrid.serve -m MiniCPM-S-1B --host 0.0.0.0 --api-key-file keys.txt

The server listens at once and answers with status 503 until the model is loaded. The first SIGTERM
or Ctrl-C lets running answers end; a second one ends at once. Exit codes: 0 ended by a signal, 1 a
model, file or address could not be used, 2 a bad option.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from hybrid import InvalidOption, MissingPackage
from hybrid.cli.command_line import (
    ArgumentParser,
    add_bos_option,
    add_context_option,
    add_device_options,
    add_kv_option,
    add_model_options,
    add_predictor_options,
    add_template_option,
    byte_size,
    open_engine,
    print_notices,
    printable,
    read_option_text,
    run_command,
)

try:
    import uvicorn

    from hybrid.server import ServerSettings, create_app
    from hybrid.server.http_protocol import GuardedProtocol
except ModuleNotFoundError as error:
    _MISSING: str | None = error.name
else:
    _MISSING = None

KEY_VARIABLE = "HYBRID_API_KEY"
MAX_KEY_BYTES = 1 << 20
DRAIN_S = 30.0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.serve",
        description="Serve a model over HTTP: OpenAI's API at /v1, and a chat page at /.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=8080, help="port; 0: any free one (default: 8080)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with one API key a line; a request must have one of them (default: the key in "
        f"the environment variable {KEY_VARIABLE}, or none)",
    )
    add(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="name of this machine that clients may use in addresses, besides localhost and IP "
        "addresses; * allows any; may be repeated (default: none)",
    )
    add(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="a web site whose pages may use this server, such as https://chat.example.org; * "
        "allows any; may be repeated (default: none)",
    )
    add(
        "-np",
        "--parallel",
        type=int,
        default=4,
        metavar="N",
        help="answers at once (default: 4)",
    )
    add("--queue", type=int, default=64, metavar="N", help="requests that wait (default: 64)")
    add(
        "--cache-ram",
        type=byte_size,
        default=512 << 20,
        metavar="SIZE",
        help="memory for keys and values of earlier conversations; 0: none (default: 512MiB)",
    )
    add(
        "--drain",
        type=float,
        default=DRAIN_S,
        metavar="SECONDS",
        help="time that running answers get when the server is to end (default: 30)",
    )
    add("--no-page", action="store_true", help="serve no chat page at /")
    add_context_option(parser)
    add_template_option(parser)
    add_kv_option(parser)
    add_predictor_options(parser)
    add_device_options(parser)
    add_bos_option(parser)
    args = parser.parse_args(arguments)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port: expected 0 to 65535, found {args.port}")
    if not 0 <= args.drain <= 3600:
        parser.error(f"--drain: expected 0 to 3600 seconds, found {args.drain:g}")
    return args


def read_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the API keys of --api-key-file, or that of the environment. Raises InvalidOption."""
    path: Path | None = args.api_key_file
    if path is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    text = read_option_text("--api-key-file", path, MAX_KEY_BYTES)
    keys = tuple(key for line in text.splitlines() if (key := line.strip()))
    if not keys:
        raise InvalidOption(f"--api-key-file {path}: there is no key in it")
    return keys


def server_settings(args: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        api_keys=read_keys(args),
        allowed_hosts=(*(args.allowed_host or ()), args.host.lower()),
        cors_origins=tuple(args.cors_origin or ()),
        n_sequences=args.parallel,
        queue_size=args.queue,
        cache_bytes=args.cache_ram,
        has_page=not args.no_page,
    )


def listen(args: argparse.Namespace) -> socket.socket:
    """Return a socket that listens at the address of the options. Raises InvalidOption."""
    try:
        found = socket.getaddrinfo(
            args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        number = error.errno or 0  # below 0: of getaddrinfo, which says why itself
        why = os.strerror(number) if number > 0 else error.strerror
        raise InvalidOption(f"--host {args.host} --port {args.port}: {why}") from error


@contextlib.contextmanager
def running(server: uvicorn.Server, listening: socket.socket) -> Iterator[None]:
    """Run the HTTP side on a thread of its own, because loading a model takes the main thread."""
    thread = threading.Thread(target=server.run, args=([listening],), name="hybrid-http")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class Ending:
    """Waits for SIGTERM or Ctrl-C. A second signal ends the process as usual."""

    def __init__(self) -> None:
        self._came = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._came.set()
        signal.signal(number, signal.SIG_DFL)

    def wait(self) -> None:
        while not self._came.wait(0.2):  # without a limit no signal would come through
            pass


def run(args: argparse.Namespace) -> int:
    if _MISSING is not None:
        raise MissingPackage(
            f"hybrid serve needs the package {_MISSING}; pip install 'hybrid-inference[server]'"
        )
    settings = server_settings(args)
    app = create_app(settings=settings)
    with listen(args) as listening:
        host, port = listening.getsockname()[:2]
        config = uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=round(args.drain) + 5,
        )
        with running(uvicorn.Server(config), listening), open_engine(args) as (engine, _):
            service = app.state.service
            try:
                service.open(engine)
                print_notices([*engine.notices, *service.model.loop.notices])
                address = f"[{host}]" if ":" in host else host
                print(
                    f"{printable(engine.name)} ({engine.quant}, -t {engine.n_threads}, "
                    f"-np {args.parallel}): http://{address}:{port}",
                    file=sys.stderr,
                )
                Ending().wait()
                print("no new requests; running answers may end", file=sys.stderr)
                service.drain(args.drain)
            finally:
                service.close()
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run_command("hybrid.serve", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
