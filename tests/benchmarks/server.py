"""Throughput and delays of servers under 1, 2, 4 and 8 clients, in rounds that alternate.

    python tests/benchmarks/server.py hybrid=http://127.0.0.1:8080 other=http://127.0.0.1:8081
    python tests/benchmarks/server.py ... --clients 1 2 4 8 --runs 5 -n 64 --pid other=1234

Each client streams completions of OpenAI's API, one after the other, each of a prompt of its own.
A round runs all numbers of clients on one server, then on the next. A ratio is the median of the
rounds' ratios to the first server, because a machine's own speed drifts. With --pid, resident and
proportional memory of a process and its children are reported at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil


@dataclass
class Measured:
    """What one run of several clients measured."""

    n_tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds until a first piece came
    gaps: list[float] = field(default_factory=list)  # seconds between two pieces
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / self.seconds


def complete(address: str, body: dict[str, Any], measured: Measured) -> None:
    """Stream one completion."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
    started = last = time.perf_counter()
    first, gaps, n_tokens = None, [], 0
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200, (response.status, response.read())
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk, now = json.loads(line[6:]), time.perf_counter()
        assert "error" not in chunk, chunk
        n_tokens = (chunk.get("usage") or {}).get("completion_tokens", n_tokens)
        # A model without a vocabulary has pieces without text.
        if chunk["choices"] and chunk["choices"][0].get("finish_reason") is None:
            if first is None:
                first = now - started
            else:
                gaps.append(now - last)
            last = now
    connection.close()
    with measured.lock:
        measured.n_tokens += n_tokens
        measured.first.append(first or 0.0)
        measured.gaps += gaps


def run(address: str, n_clients: int, args: argparse.Namespace, salt: int) -> Measured:
    """Let so many clients stream --requests completions each."""
    measured = Measured()

    def work(client: int) -> None:
        for i in range(args.requests):
            # Token ids, because the servers' tokenizers need not be the same.
            draw = random.Random(f"{salt} {client} {i}")
            prompt = [draw.randrange(300, args.vocabulary) for _ in range(args.prompt)]
            body = {"prompt": prompt, "max_tokens": args.tokens, "stream": True}
            body |= {"temperature": 0.8, "seed": 1000 * client + i, "ignore_eos": True}
            body |= {"stream_options": {"include_usage": True}, "cache_prompt": False}
            complete(address, body, measured)

    threads = [threading.Thread(target=work, args=(client,)) for client in range(n_clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured.seconds = time.perf_counter() - started
    return measured


def memory(pid: int) -> tuple[float, float]:
    """Return MB of a process and its children: resident, and with shared pages divided."""
    process = psutil.Process(pid)
    infos = [each.memory_full_info() for each in (process, *process.children(recursive=True))]
    return sum(info.rss for info in infos) / 1e6, sum(info.pss for info in infos) / 1e6


def row(name: str, n: int, results: Sequence[Measured], ratios: Sequence[float]) -> str:
    speeds = [result.tokens_per_s for result in results]
    gaps = 1e3 * np.array([gap for result in results for gap in result.gaps])
    first = 1e3 * np.array([each for result in results for each in result.first])
    speed = f"{statistics.median(speeds):.1f} [{min(speeds):.1f}-{max(speeds):.1f}]"
    p50, p95 = np.percentile(gaps, (50, 95))
    times = f"{np.median(first):.0f} | {p50:.1f} / {p95:.1f}"
    ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
    return f"| {name} | {n} | {speed} | {times} | {ratio} |"


def named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", type=named, metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a run")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("-p", "--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--vocabulary", type=int, default=4000, help="prompts have ids below")
    parser.add_argument("--pid", type=named, action="append", default=[], metavar="NAME=PID")
    args = parser.parse_args()
    found: dict[tuple[str, int], list[Measured]] = {}
    for _, address in args.servers:
        run(address, 2, args, -1)
    for salt in range(args.runs):
        for n in args.clients:
            for name, address in args.servers:
                found.setdefault((name, n), []).append(run(address, n, args, 100 * salt + n))
    print("| server | clients | tok/s | first piece, ms | between pieces p50 / p95, ms | ratio |")
    print("|---|---|---|---|---|---|")
    first = args.servers[0][0]
    for n in args.clients:
        for name, _ in args.servers:
            pairs = zip(found[name, n], found[first, n], strict=True)
            ratios = [mine.tokens_per_s / other.tokens_per_s for mine, other in pairs]
            print(row(name, n, found[name, n], ratios))
    for name, pid in args.pid:
        rss, pss = memory(int(pid))
        print(f"{name}: {rss:.0f} MB resident, {pss:.0f} MB with shared pages divided")


if __name__ == "__main__":
    main()
