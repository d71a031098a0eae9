"""Record how often each FFN neuron of a model fires.

    python -m profiler.record -m stories --text stories.txt -o stories-profile
    python -m profiler.record -m MiniCPM-S-1B --trace -o minicpm-profile
    python -m profiler.report stories-profile

The command writes an activation profile. With --trace it also writes the training data of
predictors: the inputs and masks of an even sample of the tokens. Without --text the model writes
texts itself, from prompts in English, Chinese, code and maths. An interrupted recording continues
where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid import InvalidOption
from hybrid.cli.command_line import (
    ArgumentParser,
    add_bos_option,
    add_kv_option,
    add_model_options,
    byte_size,
    load_options,
    open_engine,
    print_notices,
    run_command,
)
from profiler.corpus import Corpus, TextFile
from profiler.recorder import RecordingOptions, record
from profiler.statistics import compiled_sums


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="profiler.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_options(parser)
    add_bos_option(parser)
    add_kv_option(parser)
    add("-o", "--out", type=Path, required=True, metavar="FOLDER", help="folder for the profile")
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 text files to record on (default: texts that the model writes itself)",
    )
    add("--separator", help="text between two documents of a file (default: none)")
    add("--max-tokens", type=int, help="maximum tokens to use of each text (default: all)")
    add("--window", type=int, default=512, help="tokens in one context (default: 512)")
    add("--trace", action="store_true", help="also record a trace, to train predictors on")
    add(
        "--trace-budget",
        type=byte_size,
        metavar="SIZE",
        help="maximum size of the trace (default: 2GiB)",
    )
    args = parser.parse_args(arguments)
    if args.max_tokens is not None and args.max_tokens < 1:
        parser.error("--max-tokens: expected 1 or more")
    if args.window < 2:
        parser.error("--window: expected 2 or more")
    if args.trace_budget is not None and not args.trace:
        parser.error("--trace-budget: needs --trace")
    return args


def run(args: argparse.Namespace) -> int:
    load_options(args)  # report a wrong value before a model is downloaded
    texts = [TextFile(path, args.separator) for path in args.text]
    print_notices(line for text in texts for line in text.notices)
    corpora: list[Corpus] = [*texts]
    if args.out.exists() and not args.out.is_dir():
        raise InvalidOption(f"-o {args.out}: is a file; expected a folder")
    options = RecordingOptions(
        model=args.model,
        window=args.window,
        max_tokens=args.max_tokens,
        trace_bytes=(args.trace_budget or 2 << 30) if args.trace else 0,
    )
    compiled_sums()  # report a missing package before a model is downloaded
    with open_engine(args) as (engine, progress):
        print_notices(engine.notices)
        result = record(engine, corpora, args.out, options, progress)
    print_notices(result.notices)
    profile = result.profile
    print(f"{profile.n_tokens} tokens, {profile.sparsity.mean():.2%} of neurons inactive")
    if result.trace_tokens:
        print(f"trace: {result.trace_tokens} tokens, {result.trace_bytes / 1e6:.0f} MB")
    if result.seconds > 0:
        print(f"{result.n_new_tokens / result.seconds:.0f} tok/s")
    print(f"to show it, run python -m profiler.report {args.out}", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("profiler.record", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
