"""`python -m hybrid.serve`: it listens, says where, and ends as it should."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import Client

from hybrid import serve


@contextlib.contextmanager
def command(*options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """Run the command with the bundled model, at a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid.serve", "--port", "0", "-t", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        match = re.fullmatch(r"stories \(q8, -t 1, -np 4\): http://127\.0\.0\.1:(\d+)\n", line)
        assert match, line + process.stderr.read()
        yield process, Client(int(match[1]))
    finally:
        process.kill()
        process.communicate()


def test_it_serves_until_a_signal_and_lets_answers_end():
    body = {"prompt": "Once", "max_tokens": 400, "logit_bias": {"2": -100}, "stream": True}
    found: list[Any] = []
    with command() as (process, client):
        assert client.get("/health").status == 200
        asking = threading.Thread(target=lambda: found.append(client.post("/v1/completions", body)))
        with client.begin("/v1/completions", body) as raw:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
            asking.start()
            while b"data" not in raw.recv(1000):
                pass
            process.send_signal(signal.SIGTERM)
            asking.join()
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "no new requests; running answers may end\n"
    assert found[0].status in (200, 503)  # 503 if the signal came first
    if found[0].status == 200:
        assert found[0].events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_key_of_the_environment_or_a_file_is_needed(tmp_path):
    with command(HYBRID_API_KEY="secret") as (_, client):
        assert client.get("/v1/models").status == 401
        assert client.get("/v1/models", x_api_key="secret").status == 200
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    with command("--api-key-file", str(file), HYBRID_API_KEY="secret") as (process, client):
        assert client.get("/v1/models", x_api_key="secret").status == 401
        assert client.get("/v1/models", authorization="Bearer two").status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_an_address_that_is_taken_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err == f"hybrid.serve: --host 127.0.0.1 --port {port}: Address already in use\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port: expected 0 to 65535, found 70000"),
        (["--drain", "-1"], "--drain: expected 0 to 3600 seconds, found -1"),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere: No such file or directory"),
        (["--cache-ram", "much"], "--cache-ram: expected an amount such as 512MiB"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8080"),
        (["-np", "0", "--port", "0"], "n_sequences: expected an integer from 1 to 32, found 0"),
        (["--queue", "0", "--port", "0"], "queue_size: expected an integer, 1 or more, found 0"),
        (["--api-key", "sk-1"], "unrecognized arguments: --api-key sk-1"),
    ],
)
def test_bad_options_are_one_line(capsys, options, message):
    try:
        code = serve.main(options)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_file_without_keys_is_refused(capsys, tmp_path):
    for content in (b"", b"\n  \n", b"\xff\xfe"):
        file = tmp_path / "keys"
        file.write_bytes(content)
        assert serve.main(["--api-key-file", str(file)]) == 2
        assert "--api-key-file" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert serve.read_keys(argparse.Namespace(api_key_file=file)) == ("one", "two")


def test_importing_the_server_does_nothing_else():
    code = """
import sys, threading
import hybrid.server, hybrid.serve
assert threading.active_count() == 1
loaded = {"torch", "numba", "transformers", "llguidance"} & set(sys.modules)
assert not loaded, loaded
from hybrid.server import create_app
first, second = create_app(), create_app()
assert first.state.service is not second.state.service
assert first.state.metrics is not second.state.metrics
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr(serve, "_MISSING", "starlette")
    assert serve.main([]) == 1
    assert "pip install 'hybrid-inference[server]'" in capsys.readouterr().err


def test_a_model_that_does_not_load_ends_the_command(capsys):
    assert serve.main(["-m", "./nowhere", "--port", "0"]) == 1
    assert "nowhere" in capsys.readouterr().err
