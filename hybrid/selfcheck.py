"""Check a model on this machine before you trust it: files, weights, kernels, sparsity, text.

    python -m hybrid.selfcheck -m MiniCPM-S-1B
    python -m hybrid.selfcheck -m ./my-model --quant q4 --json
    python -m hybrid.selfcheck --gpu -o checks.json

The command compares the engine with a plain NumPy computation over 64 positions. A model of 1 B
parameters takes about a minute. For a GGUF file that records no activation, it first tries silu,
relu and fatrelu on a short text, and names the one that fits. With --gpu it checks and measures the
GPU instead, in under eight minutes, and writes one JSON file. Exit codes: 0 success (also with
warnings), 1 a check failed, 2 a bad option, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from hybrid import DeviceUnavailable
from hybrid.checking import Check, check_model
from hybrid.cli.command_line import (
    ArgumentParser,
    add_kv_option,
    add_model_options,
    load_options,
    printable,
    run_command,
)
from hybrid.cli.progress_bar import progress_bar

MARKS = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED "}
WIDTH = 100


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="hybrid.selfcheck",
        description="Check that a model computes correct results on this machine.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_kv_option(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--gpu", action="store_true", help="check and measure the GPU instead of the model")
    add(
        "-o",
        "--out",
        type=Path,
        default=Path("gpu_checks.json"),
        help="file that --gpu writes (default: gpu_checks.json)",
    )
    add(
        "--limit",
        type=float,
        default=480.0,
        metavar="S",
        help="maximum number of seconds for --gpu (default: 480)",
    )
    add("--rehearse", action="store_true", help="run the --gpu checks on the CPU, on a small model")
    return parser.parse_args(arguments)


def show(check: Check) -> None:
    first = f"{MARKS[check.verdict]} {check.name:17}"
    indent = " " * len(first)
    print(
        textwrap.fill(
            printable(check.message), WIDTH, initial_indent=first, subsequent_indent=indent
        )
    )
    for line in check.table:
        print(f"{indent}{printable(line)}")
    if check.advice:
        advice = printable(f"→ {check.advice}")
        print(textwrap.fill(advice, WIDTH, initial_indent=indent, subsequent_indent=indent))
    sys.stdout.flush()


def as_json(check: Check) -> dict[str, object]:
    """Return the check as a dict. Figures that are not finite become null: JSON has no NaN."""
    figures = {
        name: value if isinstance(value, str) or math.isfinite(value) else None
        for name, value in check.figures.items()
    }
    return asdict(check) | {"figures": figures}


def run_gpu(args: argparse.Namespace) -> int:
    try:
        from hybrid.checking.gpu import check_gpu
    except ImportError as error:
        raise DeviceUnavailable(
            f"--gpu needs PyTorch ({error}): pip install 'hybrid-inference[gpu]'"
        ) from error
    failed = check_gpu(
        args.out,
        limit_s=args.limit,
        is_rehearsal=args.rehearse,
        report=lambda line: print(printable(line), flush=True),
    )
    print(f"written to {args.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run(args: argparse.Namespace) -> int:
    if args.gpu:
        return run_gpu(args)
    load_options(args)  # report a wrong value before a model is downloaded
    checks = []
    with progress_bar() as progress:
        for check in check_model(
            args.model,
            quant=args.quant,
            kv=args.kv,
            threads=args.threads,
            activation=args.activation,
            offline=args.offline,
            progress=progress,
        ):
            checks.append(check)
            if not args.json:
                show(check)
    verdicts = [check.verdict for check in checks]
    n_failed, n_warnings = verdicts.count("failed"), verdicts.count("warning")
    verdict = "failed" if n_failed else "warning" if n_warnings else "ok"
    if args.json:
        used = (check.figures["quant"] for check in checks if "quant" in check.figures)
        quant = next(used, args.quant)  # None: the model could not be opened
        report = {"model": args.model, "quant": quant, "kv": args.kv, "verdict": verdict}
        print(json.dumps(report | {"checks": [as_json(check) for check in checks]}))
    elif n_failed:
        print(
            f"{n_failed} of {len(checks)} checks failed: do not trust this model on this machine."
        )
    elif n_warnings:
        print(f"Nothing is broken; {n_warnings} of {len(checks)} checks have a warning.")
    else:
        print(f"All {len(checks)} checks passed.")
    if not args.json and not n_failed:
        print(
            "Not checked: whether the weights are the authors' own, unless a checksum or expected"
        )
        print("figure is shown above; and the speed, which hybrid.bench measures.")
    return 1 if n_failed else 0


def main(arguments: list[str] | None = None) -> int:
    return run_command("hybrid.selfcheck", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
