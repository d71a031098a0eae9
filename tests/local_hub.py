"""A server on this machine that imitates the Hugging Face Hub, and can misbehave.

It serves small files with git's SHA-1 as their etag. It redirects large files to another host, with
their SHA-256 in `X-Linked-Etag`.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"
CHUNK = 4096  # bytes that are written at a time in these tests
REPO = "someone/tiny"

SMALL = {
    "config.json": b'{"model_type": "minicpm"}',
    "generation_config.json": b'{"temperature": 0.8}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
    "added_tokens.json": b"{  }",
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED = {
    "README.md": b"# tiny",
    "modeling_minicpm.py": b"raise SystemExit",
    "tiny.Q4_0.gguf": b"GGUF",
    "consolidated.safetensors": b"the same once more",
}
WEIGHTS = bytes(i * i % 251 for i in range(10 * CHUNK))


class LocalHub(ThreadingHTTPServer):
    """Repositories (name -> file -> bytes), the requests that it saw, and faults on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.status: dict[str, int] = {}  # part of a path -> the status it answers
        self.cut_after: int | None = None  # close the next large download after this many bytes
        self.down_after_cut = False
        self.flip = False  # send large files with their first byte changed
        # (method, part of a path) -> what answers instead
        self.answers: dict[tuple[str, str], Callable[[Handler], None]] = {}
        self.pauses: list[float] = []  # that the client makes between attempts, in seconds
        self.n_given_up = threading.Semaphore(0)  # connections that the client closed
        self.has_ended = threading.Event()  # set at the end of a test: whatever loops must stop

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that gave up

    def seen(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path contains `part`."""
        return [headers for m, path, headers in self.requests if m == method and part in path]


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append((self.command, path, headers))
        for (method, part), answer in hub.answers.items():
            if method == self.command and part in path:
                return answer(self)
        for part, status in hub.status.items():
            if part in path:
                return self.answer(status)
        owner, name, *rest = path.removeprefix("/api/models").removeprefix("/cdn").split("/")[1:]
        files = hub.repos.get(f"{owner}/{name}")
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if path.startswith("/api/models"):
            return self.list_files(f"{owner}/{name}", files)
        body = files["/".join(rest if path.startswith("/cdn") else rest[2:])]
        if path.startswith("/cdn"):
            return self.send_large(body)
        sha256 = hashlib.sha256(body).hexdigest()
        sha1 = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        if not rest[-1].endswith((".safetensors", ".bin")):
            return self.answer(200, body, ETag=f'"{sha1}"', X_Repo_Commit=COMMIT)
        return self.answer(
            302,
            Location=f"http://localhost:{hub.server_port}/cdn/{owner}/{name}/{rest[-1]}",
            X_Linked_Etag=f'"{sha256}"',
            X_Linked_Size=str(len(body)),
            X_Repo_Commit=COMMIT,
        )

    do_HEAD = do_GET

    def list_files(self, repo_id: str, files: dict[str, bytes]) -> None:
        names = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "sha": COMMIT, "private": False, "siblings": names}
        self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_large(self, body: bytes) -> None:
        hub = self.server
        first = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        rest = body[first:]
        if hub.flip and first == 0:
            rest = bytes([body[0] ^ 1]) + body[1:]
        cut, hub.cut_after = hub.cut_after, None
        if cut is not None and hub.down_after_cut:
            hub.status["/cdn"] = 503
        self.answer(
            206 if first else 200,
            rest[:cut],
            Content_Length=str(len(rest)),
            Content_Range=f"bytes {first}-{len(body) - 1}/{len(body)}",
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def spoil(file: Path) -> None:
    """Change a file's bytes and date it well after its stamp, whatever the clock's resolution."""
    file.write_bytes(b"spoiled")
    os.utime(file, (2e9, 2e9))


def blobs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("hf/hub/models--*/blobs/*"))
