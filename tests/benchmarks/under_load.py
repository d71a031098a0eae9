"""Measure decode speed on shared cores: with more threads than cores, and beside a busy process.

    python tests/benchmarks/under_load.py -m synthetic:MiniCPM-S-1B --quant q4

A fair share is what the engine gets if the operating system gives each runnable thread the same
time. With more threads than cores, it is the whole machine. With n threads beside one busy process,
it is n / (n + 1) of the machine. The runs alternate, and medians count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from hybrid import Engine, load
from hybrid.bench import spread
from hybrid.evaluation.speed import SHORT_CONTEXT, DecodeBench
from hybrid.placement.hardware import default_threads


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="synthetic:MiniCPM-S-1B",
        help="model (default: synthetic:MiniCPM-S-1B)",
    )
    add("--quant", choices=("q4", "q8", "bf16"), default="q4", help="weight format (default: q4)")
    add("-n", "--tokens", type=int, default=64, help="tokens decoded in each run (default: 64)")
    add("--runs", type=int, default=5, help="runs of each case (default: 5)")
    return parser.parse_args()


def spin() -> None:
    """Keep one core busy until the process is ended."""
    while True:
        pass


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Run a process that keeps one core busy."""
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def main() -> int:
    args, n_cores = parse_arguments(), default_threads()
    cases: list[tuple[str, int, float, Callable[[], Any]]] = [
        ("alone", n_cores, 1.0, nullcontext),
        ("one thread", 1, 1.0, nullcontext),
        ("twice as many threads", 2 * n_cores, 1.0, nullcontext),
        ("beside a busy process", n_cores, n_cores / (n_cores + 1), busy_neighbour),
    ]
    engines: dict[int, Engine] = {}
    benches = []
    for _, threads, _, _ in cases:
        if threads not in engines:
            engines[threads] = load(args.model, quant=args.quant, threads=threads)
            engines[threads].wait_for_weights()
        vocab_size = engines[threads].config.vocab_size
        ids = np.random.default_rng(0).integers(0, vocab_size, SHORT_CONTEXT + args.tokens)
        benches.append(DecodeBench(engines[threads], ids[:SHORT_CONTEXT], ids[SHORT_CONTEXT:]))
    for _ in range(args.runs):
        for (_, _, _, beside), bench in zip(cases, benches, strict=True):
            with beside():
                bench.run()
    alone = benches[0].tps
    print(f"{'':24}{'threads':>8}{'tok/s [min - max]':>24}{'of alone':>10}{'of a fair share':>17}")
    shares = {}
    for (name, threads, fair, _), bench in zip(cases, benches, strict=True):
        share = statistics.median(a / b for a, b in zip(bench.tps, alone, strict=True))
        shares[name] = round(share / fair, 3)
        fair_share = "–" if threads < n_cores else f"{share / fair:.0%}"
        print(f"{name:24}{threads:>8}{spread(bench.tps):>24}{share:>10.0%}{fair_share:>17}")
    print(json.dumps({"model": args.model, "quant": args.quant, "shares": shares}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
