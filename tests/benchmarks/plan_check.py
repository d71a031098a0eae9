"""Compare the decode speed that the time model predicts with the measured one, on this CPU.

    python tests/benchmarks/plan_check.py -m synthetic:MiniCPM-S-1B --quant q8 --runs 7

Each run does the micro-benchmarks (some seconds) and then decodes real tokens. The two alternate,
because the speed of a machine's memory drifts. The output is the error of each run and the median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

import hybrid
from hybrid.kernels import Format, ThreadPool
from hybrid.placement.machine import Machine
from hybrid.placement.measurement import measure_cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="synthetic:MiniCPM-S-1B",
        help="model (default: synthetic:MiniCPM-S-1B)",
    )
    add("--quant", choices=("q8", "q4", "bf16"), default="q8", help="weight format (default: q8)")
    add("--runs", type=int, default=7, help="number of comparisons (default: 7)")
    add("-n", "--tokens", type=int, default=48, help="tokens decoded in each run (default: 48)")
    args = parser.parse_args()
    errors = []
    with hybrid.load(args.model, quant=args.quant, device="cpu") as engine:
        engine.wait_for_weights()
        spec, pool = engine.spec, ThreadPool(engine.n_threads)
        ids = np.random.default_rng(0).integers(3, engine.config.vocab_size, 512 + args.tokens)
        session = engine.open_session()
        session.prefill(ids[:512])
        for run in range(args.runs):
            cpu = measure_cpu(engine.config, Format[args.quant], pool)
            machine = Machine("here", args.quant, engine.n_threads, "", 0, cpu)
            session.truncate(512)
            started = time.perf_counter()
            for token in ids[512:].tolist():
                session.decode(token)
            measured = (time.perf_counter() - started) / args.tokens
            predicted = spec.time_model(machine).plan(spec.cpu_plan())
            errors.append(predicted / measured - 1)
            print(
                f"run {run}: predicted {1 / predicted:.1f} tok/s, measured {1 / measured:.1f}: "
                f"{errors[-1]:+.1%}",
                flush=True,
            )
    print(
        f"{args.model} {args.quant}: median {statistics.median(errors):+.1%}, "
        f"of absolute errors {statistics.median(map(abs, errors)):.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
