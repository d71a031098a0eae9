"""Load on a server: many clients, good and bad ones, for some time.

    python tests/server_load.py --seconds 600 --clients 32

Most clients stream a text, and compare it with what the engine generates alone. Others go in the
middle, read slowly, open connections without a word, or send what is no request. At the end it says
how long clients waited between two pieces, and by how much the process grew.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import socket
import threading
import time
from array import array
from dataclasses import dataclass, field

import numpy as np
import psutil
from http_client import Client, serving
from hypothesis import strategies as st

import hybrid

PATH = "/v1/completions"
N_TEXTS = 48
OVERSIZED = b'{"prompt": "' + b"a" * (4 << 20) + b'"}'
# Bodies that are JSON or nearly, with the names of real fields.
BODIES = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(
        st.sampled_from(("prompt", "max_tokens", "stop", "n", "logit_bias", "stream", "seed")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.integers(0, 5000).map(lambda depth: b'{"prompt":' + b"[" * depth),
)


@dataclass
class Outcome:
    """What all clients met."""

    n_right: int = 0  # streams that are complete and right
    n_refused: int = 0  # 503, as the queue was full
    n_bad: int = 0  # requests that were bad on purpose
    gaps: array[float] = field(default_factory=lambda: array("f"))  # seconds between two pieces
    mistakes: list[str] = field(default_factory=list)
    growth_mb: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, **counts: int) -> None:
        with self.lock:
            for name, n in counts.items():
                setattr(self, name, getattr(self, name) + n)


class Load:
    """Clients of one server, and the texts that they must get."""

    def __init__(self, engine: hybrid.Engine, client: Client, bodies: list[bytes]) -> None:
        self._client, self._bodies, self.outcome = client, bodies, Outcome()
        self._requests = []
        for seed in range(N_TEXTS):
            prompt = f"Once upon a time, {('Tom', 'Mia', 'a robot')[seed % 3]} saw {seed} birds."
            options = {"seed": seed, "max_tokens": 8 + 5 * (seed % 9)}
            text = "".join(engine.generate(prompt, raw=True, **options))
            self._requests.append(({"prompt": prompt, "stream": True, **options}, text))

    def run(self, n_clients: int, seconds: float) -> Outcome:
        self._deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self._work, args=(i,)) for i in range(n_clients)]
        process, before = psutil.Process(), 0
        for thread in threads:
            thread.start()
        time.sleep(min(seconds / 4, 20))  # buffers and the prefix cache have their size then
        before = process.memory_info().rss
        for thread in threads:
            thread.join()
        self._client.wait_until_idle(30)
        self.outcome.growth_mb = (process.memory_info().rss - before) / 1e6
        return self.outcome

    def _work(self, index: int) -> None:
        draw = random.Random(index)
        acts = [self._stream] * 12 + [self._leave, self._read_slowly, self._flood, self._send_bad]
        while time.monotonic() < self._deadline:
            act = draw.choice(acts)
            try:
                act(draw)
            except Exception as error:
                self.outcome.mistakes.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def _stream(self, draw: random.Random, pause: float = 0.0) -> None:
        body, wanted = draw.choice(self._requests)
        connection = http.client.HTTPConnection("127.0.0.1", self._client.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", PATH, json.dumps(body))
            response = connection.getresponse()
            if response.status == 503:
                response.read()
                self.outcome.note(n_refused=1)
                time.sleep(0.05)
                return
            assert response.status == 200, response.status
            text, is_complete, last = "", False, None
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]\n":
                    is_complete = True
                    continue
                now = time.perf_counter()
                if last is not None and not pause:
                    self.outcome.gaps.append(now - last)
                last = now
                text += json.loads(line[6:])["choices"][0]["text"]
                if pause:
                    time.sleep(pause)
            assert is_complete, "a stream without its end"
            assert text == wanted, f"{text!r} instead of {wanted!r}"
            self.outcome.note(n_right=1)

    def _read_slowly(self, draw: random.Random) -> None:
        self._stream(draw, pause=0.03)

    def _leave(self, draw: random.Random) -> None:
        body, _ = draw.choice(self._requests)
        with self._client.begin(PATH, body | {"stream": draw.random() < 0.5}) as raw:
            time.sleep(draw.random() * 0.2)
            if draw.random() < 0.5:
                raw.settimeout(5)
                with contextlib.suppress(OSError):
                    raw.recv(50)
        self.outcome.note(n_bad=1)

    def _flood(self, draw: random.Random) -> None:
        held = [self._client.connect() for _ in range(10)]
        for raw in held[::2]:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        time.sleep(draw.random() * 0.1)
        for raw in held:
            raw.close()
        self.outcome.note(n_bad=len(held))

    def _send_bad(self, draw: random.Random) -> None:
        body = OVERSIZED if draw.random() < 0.1 else draw.choice(self._bodies)
        with contextlib.suppress(ConnectionError):  # what is too large is not read
            reply = self._client.post(PATH, body)
            assert reply.status in (200, 400, 413, 503), reply.status
        self.outcome.note(n_bad=1)


def run_load(seconds: float, n_clients: int, bodies: list[bytes]) -> Outcome:
    """Put load on a server of the bundled model with four sequences."""
    with (
        hybrid.load("stories", threads=2) as engine,
        serving(engine, n_sequences=4, queue_size=16, cache_bytes=8 << 20) as client,
    ):
        return Load(engine, client, bodies).run(n_clients, seconds)


def some_bodies(n: int) -> list[bytes]:
    """Return bodies for scripts; tests let Hypothesis choose them."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [BODIES.example() for _ in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    outcome = run_load(args.seconds, args.clients, some_bodies(300))
    p50, p95, p99 = (1e3 * np.percentile(outcome.gaps, (50, 95, 99))).round(1)
    print(
        f"{outcome.n_right} streams right, {outcome.n_refused} refused (queue full), "
        f"{outcome.n_bad} bad ones; between pieces p50 {p50} ms, p95 {p95} ms, p99 {p99} ms; "
        f"memory {outcome.growth_mb:+.1f} MB; mistakes: {len(outcome.mistakes)}"
    )
    for mistake in outcome.mistakes[:20]:
        print(" ", mistake)


if __name__ == "__main__":
    socket.setdefaulttimeout(120)
    main()
